"""`align distil`: a run's ensemble, taught to one small classifier that enters other runs as a verifier.

The classifier begins as the run's trained policy, which can do the task, and learns P(good) of every response that the
run has scored, as a soft label; a tenth of the training prompts says when to stop.  Then it picks one of the responses
to each evaluation prompt, on which neither it nor the policy was trained, and so does the ensemble: the share of the
ensemble's accuracy that it keeps is what it is worth (arXiv 2506.18203, section 6).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.ensemble.combine import to_scores
from align.errors import InputError, RunError
from align.labels import combine_told, told
from align.model_files import check_model_dir, resolve_model
from align.progress import track
from align.records import Sample, Verdict, content_id
from align.verifiers.base import Item
from reward_models.scorer import Fitting, encode, fit, lessons, make_scorer, save, score

if TYPE_CHECKING:
    from align.recipe import Recipe
    from align.run import Run

NAME = "distilled"
VALIDATION = 0.1  # share of the training prompts that say when to stop
SERVED_FIRST = 64  # responses that warm the engine up
TOLERANCE = 0.05  # largest difference of a logit between transformers and the engine that serves it


@dataclass(frozen=True)
class Example:
    """A scored response.

    Example: Example("0/3f…", "3f…", "1+2=", "3", p_good=0.93, gold=1.0)
    """

    group: str  # round and prompt: the responses that one choice is made among
    prompt_id: str
    prompt: str
    response: str
    p_good: float
    gold: float | None

    @property
    def text(self) -> str:
        """What the classifier reads."""
        return self.prompt + self.response


@dataclass(frozen=True)
class Material:
    """What a run has to teach.

    Example: Material(train=[Example(…)], held_out=[Example(…)], seconds_per_1000=4.2)
    """

    train: list[Example]
    held_out: list[Example]  # to evaluation prompts
    seconds_per_1000: float | None  # what the ensemble's verifiers took for 1000 responses, all together


@dataclass(frozen=True)
class Selection:
    """Accuracy of picking one response of each prompt, on gold where there is gold, else on the ensemble's P(good).

    Example: Selection(prompts=100, student=0.80, ensemble=0.82, first=0.55, best=0.90, judged_by="gold")
    """

    prompts: int
    student: float
    ensemble: float
    first: float  # of a response picked blindly
    best: float  # of a choice that knows the truth
    judged_by: str

    @property
    def retained(self) -> float:
        """The student's share of the ensemble's accuracy."""
        return self.student / self.ensemble if self.ensemble > 0 else float("nan")


def split(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """(to learn from, to say when to stop), by a hash of the prompt: a prompt is never on both sides."""
    learnt = [int(content_id("distil", e.prompt_id), 16) / 2.0**64 >= VALIDATION for e in examples]
    return [e for e, i in zip(examples, learnt, strict=True) if i], [
        e for e, i in zip(examples, learnt, strict=True) if not i
    ]


def merged(examples: Sequence[Example]) -> list[Example]:
    """Equal responses once, with their mean P(good): rare ones are what a choice depends on, and time is saved."""
    found: dict[tuple[str, str], list[Example]] = {}
    for example in examples:
        found.setdefault((example.prompt_id, example.response), []).append(example)
    return [replace(rows[0], p_good=sum(e.p_good for e in rows) / len(rows)) for rows in found.values()]


def selection(examples: Sequence[Example], student: Sequence[float], *, gold: bool = True) -> Selection:
    """Both choices over every group with at least two responses; a tie counts the mean of those that tie.

    Groups with a response that gold did not judge are left out; with `gold` false the ensemble judges.
    """
    groups: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(example.group, []).append(i)
    by_gold = gold and any(e.gold is not None for e in examples)
    truth = [e.gold if by_gold else e.p_good for e in examples]
    sums, count = [0.0] * 4, 0
    for rows in groups.values():
        values = [truth[i] for i in rows]
        known = [v for v in values if v is not None]
        if len(rows) < 2 or len(known) < len(rows):
            continue
        count += 1
        sums[0] += _picked([student[i] for i in rows], known)
        sums[1] += _picked([examples[i].p_good for i in rows], known)
        sums[2] += sum(known) / len(known)
        sums[3] += max(known)
    if not count:
        raise InputError("no held-out prompt has two responses that can be compared; score more prompts first")
    student_, ensemble, first, best = (s / count for s in sums)
    return Selection(count, student_, ensemble, first, best, "gold" if by_gold else "the ensemble itself")


def _picked(scores: Sequence[float], truth: Sequence[float]) -> float:
    """Truth of the best-scored response, the mean over those that share the top."""
    top = max(scores)
    best = [t for s, t in zip(scores, truth, strict=True) if s == top]
    return sum(best) / len(best)


def teach(
    material: Material, base: Path, settings: Fitting, layers: int | None = None
) -> tuple[Any, Any, dict[str, Any]]:
    """The trained classifier, its tokenizer and the report: how training went, and the selection accuracy."""
    began = time.monotonic()
    model, tokenizer = make_scorer(base, layers, settings.seed)
    context = getattr(model.config, "max_position_embeddings", 2**31)
    learnt, asked = split(material.train)
    given = lessons(tokenizer, [(e.prompt, e.response, e.p_good, e.prompt_id) for e in merged(learnt)])
    fitting = [lesson for lesson in given if 0 < len(lesson.ids) <= context]
    if not fitting:
        why = f"takes {context} tokens, and every response is longer; give another --base" if given else ""
        raise InputError(f"{base}: {why or 'no response to learn from; score more prompts'}")
    steps = settings.epochs * -(-len(fitting) // settings.batch_size)

    def pick() -> float:
        return selection(asked, rated(model, tokenizer, asked), gold=False).student if asked else 0.0

    with track("distil", total=steps, unit="steps") as bar:
        fitted = fit(model, fitting, settings, pick, lambda: bar.advance(1))
    seconds = time.monotonic() - began
    scores = rated(model, tokenizer, material.held_out)
    chosen = selection(material.held_out, scores)
    report = {
        "base": str(base),
        "trained_on": len(fitting),
        "held_out": len(material.held_out),
        "too_long": len(given) - len(fitting) + scores.count(-math.inf),
        **asdict(fitted),
        "train_seconds": seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "selection": {**asdict(chosen), "retained": chosen.retained},
    }
    return model, tokenizer, report


def rated(model: Any, tokenizer: Any, examples: Sequence[Example]) -> list[float]:
    """The classifier's logits; minus infinity for what it cannot read, which is never picked before what it can."""
    context = getattr(model.config, "max_position_embeddings", 2**31)
    inputs = encode(tokenizer, [e.text for e in examples])
    fits = [i for i, ids in enumerate(inputs) if 0 < len(ids) <= context]
    scores = [-math.inf] * len(inputs)
    for i, value in zip(fits, score(model, [inputs[i] for i in fits]), strict=True):
        scores[i] = value
    return scores


def read_material(run: Run) -> Material:
    """Every scored response of the run, and what its ensemble says of the responses to its evaluation prompts.

    Verdicts that were remembered took no time and are not counted; the time is None where all were.
    """
    texts = {p.id: p.text for p in (*run.prompts().train, *run.prompts().eval)}
    train: list[Example] = []
    held_out: list[Example] = []
    seconds, judged = dict[str, float](), dict[str, int]()
    for index in range(run.recipe.rounds.count + 1):
        if run.store.stage_done(index, "scores"):
            scores = {s.sample_id: s.p_good for s in run.read(index, "scores")}
            train += examples_of(run, index, "samples", "gold", texts, scores)
            _count_seconds(run.read(index, "verdicts"), seconds, judged)
        if run.store.stage_done(index, "eval_verdicts"):
            held_out += examples_of(run, index, "eval_samples", "eval_gold", texts, _eval_scores(run, index))
    if not train:
        raise InputError(f"{run.store.root}: no round is scored yet; run `align score` first")
    if not held_out:
        raise InputError(f"{run.store.root}: nothing is evaluated yet; run `align evaluate` first")
    return Material(train, held_out, sum(1000.0 * seconds[n] / judged[n] for n in seconds) if seconds else None)


def _eval_scores(run: Run, version: int) -> dict[str, float]:
    """P(good) by sample id of what was drawn for evaluation: the ensemble is fitted on the round's responses and these.

    The last version has no round of its own and stands beside the last scored one's.
    """
    rounds = [i for i in range(version + 1) if run.store.stage_done(i, "scores")]
    samples: list[Sample] = list(run.store.read(version, "eval_samples"))
    verdicts: list[Verdict] = list(run.store.read(version, "eval_verdicts"))
    wanted, known = {s.id for s in samples}, None
    if rounds:
        samples += run.read(rounds[-1], "samples")
        verdicts += run.read(rounds[-1], "verdicts")
        known = told(run, rounds[-1])
    combined = combine_told(run, samples, verdicts, run.recipe.verifiers, known)
    found, _ = to_scores(samples, combined, run.recipe.ensemble.min_voters)
    return {s.sample_id: s.p_good for s in found if s.sample_id in wanted}


def examples_of(
    run: Run, index: int, source: str, gold_stage: str, texts: Mapping[str, str], scores: Mapping[str, float]
) -> list[Example]:
    """The scored responses of a stage."""
    gold: Mapping[str, float | None] = {}
    if run.store.stage_done(index, gold_stage):
        gold = {v.sample_id: v.value for v in run.store.read(index, gold_stage)}
    return [
        Example(f"{index}/{s.prompt_id}", s.prompt_id, texts[s.prompt_id], s.text, scores[s.id], gold.get(s.id))
        for s in run.store.read(index, source)
        if s.id in scores
    ]


def _count_seconds(verdicts: Sequence[Verdict], seconds: dict[str, float], judged: dict[str, int]) -> None:
    """Add up each verifier's time and the verdicts that it took it for."""
    for v in verdicts:
        if v.seconds > 0:
            seconds[v.verifier] = seconds.get(v.verifier, 0.0) + v.seconds
            judged[v.verifier] = judged.get(v.verifier, 0) + 1


def default_base(run: Run) -> Path:
    """The policy after training, which can do the task best; before the export, or where it is an adapter only, the
    policy before training."""
    trained = run.store.verify_directory("export")
    if trained is None or not (trained / "config.json").is_file():
        return run.model_dir()
    return trained


def serve(directory: Path, examples: Sequence[Example]) -> tuple[list[float], float]:
    """The checkpoint as a `reward_model` verifier: its scores of these responses, and its seconds for 1000 of them.

    The first pass only warms the engine up.  What does not fit gets minus infinity.
    """
    from align.verifiers.reward_model import RewardModel
    from align.verifiers.spec import RewardModelSpec

    items = [Item(str(i), e.prompt_id, e.prompt, e.response, None, 0, "stop") for i, e in enumerate(examples)]
    spec = RewardModelSpec.model_validate({"kind": "reward_model", "name": NAME, "model": str(directory)})
    verifier = RewardModel(spec, dtype="float32")
    try:
        verifier.verify(items[:SERVED_FIRST])
        began = time.monotonic()
        found = verifier.verify(items)
        seconds = time.monotonic() - began
    finally:
        verifier.close()
    return [v if isinstance(v, float) else -math.inf for v in found], 1000.0 * seconds / len(items)


def distil(run: Run, base: str | None, layers: int | None, settings: Fitting) -> list[str]:
    """Teach, commit the checkpoint as `distilled/` of the run, keep the report; returns it as lines.

    The checkpoint is loaded again as the verifier that it will be; RunError, and no directory, where that disagrees.
    """
    if run.store.verify_directory(NAME) is not None:
        raise InputError(f"{run.store.root / NAME}: is there already; delete it to distil again")
    start = resolve_model(base, key="--base") if base else default_base(run)
    check_model_dir(start, key="--base")
    material = read_material(run)
    model, tokenizer, report = teach(material, start, settings, layers)
    with run.store.commit_directory(NAME) as directory:
        save(model, tokenizer, directory)
        served, seconds = serve(directory, material.held_out)
        expected = rated(model, tokenizer, material.held_out)
        worst = max(0.0 if a == b else abs(a - b) for a, b in zip(expected, served, strict=True))
        if not worst <= TOLERANCE:
            raise RunError(f"distil: served by vLLM, a score differs from the trained classifier's by {worst:.3g}")
    report |= {
        "seconds_per_1000": seconds,
        "ensemble_seconds_per_1000": material.seconds_per_1000,
        "served_difference": worst,
        "settings": asdict(settings),
    }
    run.store.commit_json(None, f"{NAME}_report", report)
    return [
        *render(report),
        f"checkpoint: {run.store.root / NAME}; use it as `kind: reward_model`, `model:` that folder",
    ]


def render(report: Mapping[str, Any]) -> list[str]:
    """The report as a person reads it."""
    chosen, losses = report["selection"], report["losses"]
    return [
        f"began as {report['base']}; learnt from {report['trained_on']:,} different responses in {report['kept']} of "
        f"{len(losses)} epochs ({report['parameters']:,} parameters; loss {losses[0]:.3f} to {losses[-1]:.3f})",
        f"selection accuracy by {chosen['judged_by']} on {chosen['prompts']:,} choices for evaluation prompts: student "
        f"{chosen['student']:.3f}, ensemble {chosen['ensemble']:.3f}, blind {chosen['first']:.3f}, best possible "
        f"{chosen['best']:.3f}; retained {chosen['retained']:.3f}",
        *_render_seconds(report),
    ]


def _render_seconds(report: Mapping[str, Any]) -> list[str]:
    took = report["ensemble_seconds_per_1000"]
    if took is None:
        return []
    ours = report["seconds_per_1000"]
    return [
        f"1000 responses: student {ours:.3f} s, ensemble {took:.3f} s (its verifiers' own times in the run, added up), "
        f"a ratio of {ours / took:.3f}"
    ]


def run_distil(recipe: Recipe, base: str | None, layers: int | None, settings: Fitting) -> list[str]:
    """What `align distil` does, in this process."""
    from align import distributed
    from align.launcher import apply_environment, loopback_environment, rank_environment
    from align.run import Run

    apply_environment({**rank_environment(1), **loopback_environment()})
    ranks = distributed.connect(recipe.rank_timeout_s)
    try:
        with Run.open(recipe, ranks, allow_new=False) as run:
            return distil(run, base, layers, settings)
    finally:
        distributed.close(ranks)
