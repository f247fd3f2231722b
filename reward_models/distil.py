"""`align distil`: a run's ensemble, taught to one small classifier that enters other runs as a verifier.

The classifier learns P(good) of every response that the run has scored, as a soft label, on four fifths of the
prompts.  On the rest it picks one of each prompt's responses, and so does the ensemble: the share of the ensemble's
accuracy that it keeps is what it is worth (arXiv 2506.18203, section 6).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import InputError
from align.model_files import resolve_model
from align.progress import track
from align.records import content_id
from reward_models.scorer import Fitting, encode, fit, make_scorer, save, score

if TYPE_CHECKING:
    from align.recipe import Recipe
    from align.run import Run

NAME = "distilled"
HELD_OUT = 0.2  # share of the prompts that the classifier does not learn from


@dataclass(frozen=True)
class Example:
    """A scored response.

    Example: Example("0/3f…", "3f…", "1+2=3", p_good=0.93, gold=1.0)
    """

    group: str  # round and prompt: the responses that one choice is made among
    prompt_id: str
    text: str  # prompt and response joined
    p_good: float
    gold: float | None


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
    """Training and held-out examples, by a hash of the prompt: a prompt is never on both sides."""
    inside = [int(content_id("distil", e.prompt_id), 16) / 2.0**64 >= HELD_OUT for e in examples]
    return [e for e, i in zip(examples, inside, strict=True) if i], [
        e for e, i in zip(examples, inside, strict=True) if not i
    ]


def merged(examples: Sequence[Example]) -> list[Example]:
    """Equal texts once, with their mean P(good): rare responses are what a choice depends on, and time is saved."""
    found: dict[str, list[Example]] = {}
    for example in examples:
        found.setdefault(example.text, []).append(example)
    return [replace(rows[0], p_good=sum(e.p_good for e in rows) / len(rows)) for rows in found.values()]


def selection(examples: Sequence[Example], student: Sequence[float]) -> Selection:
    """Both choices over every group with at least two responses; a tie counts the mean of those that tie.

    Groups with a response that gold did not judge are left out.
    """
    groups: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(example.group, []).append(i)
    by_gold = any(e.gold is not None for e in examples)
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
    examples: Sequence[Example], base: Path, settings: Fitting, layers: int | None = None
) -> tuple[Any, Any, dict[str, Any]]:
    """The trained classifier, its tokenizer and the report: losses, selection accuracy, seconds per 1000 responses."""
    train, held_out = split(examples)
    if not train:
        raise InputError("no response to learn from: every prompt fell among the held-out ones; score more prompts")
    train = merged(train)
    model, tokenizer = make_scorer(base, layers, settings.seed)
    began, context = time.monotonic(), getattr(model.config, "max_position_embeddings", 2**31)
    inputs = encode(tokenizer, [e.text for e in train])
    train = [e for e, ids in zip(train, inputs, strict=True) if 0 < len(ids) <= context]
    too_long, inputs = len(inputs) - len(train), [ids for ids in inputs if 0 < len(ids) <= context]
    if not inputs:
        raise InputError(f"{base}: takes {context} tokens, and every response is longer; give another --base")
    steps = settings.epochs * -(-len(inputs) // settings.batch_size)
    with track("distil", total=steps, unit="steps") as bar:
        losses = fit(model, inputs, [e.p_good for e in train], settings, lambda: bar.advance(1))
    trained_s, began = time.monotonic() - began, time.monotonic()
    asked = encode(tokenizer, [e.text for e in held_out])
    fits = [i for i, ids in enumerate(asked) if 0 < len(ids) <= context]
    scores = [-math.inf] * len(asked)  # what cannot be read is never picked before what can
    for i, value in zip(fits, score(model, [asked[i] for i in fits]), strict=True):
        scores[i] = value
    seconds = time.monotonic() - began
    chosen = selection(held_out, scores)
    report = {
        "trained_on": len(train),
        "held_out": len(held_out),
        "too_long": too_long + len(asked) - len(fits),
        "losses": losses,
        "train_seconds": trained_s,
        "parameters": sum(p.numel() for p in model.parameters()),
        "selection": {**asdict(chosen), "retained": chosen.retained},
        "seconds_per_1000": 1000.0 * seconds / max(1, len(held_out)),
    }
    return model, tokenizer, report


def read_examples(run: Run) -> tuple[list[Example], float | None]:
    """Every scored response of the run, and what the ensemble's verifiers took for 1000 of them, in seconds.

    Verdicts that were remembered took no time and are not counted; None where all were.
    """
    texts = {p.id: p.text for p in run.prompts().train}
    examples: list[Example] = []
    seconds, judged = dict[str, float](), dict[str, int]()
    for index in range(run.recipe.rounds.count):
        if not run.store.stage_done(index, "scores"):
            break
        samples = {s.id: s for s in run.store.read(index, "samples")}
        gold: Mapping[str, float | None] = {}
        if run.store.stage_done(index, "gold"):
            gold = {v.sample_id: v.value for v in run.store.read(index, "gold")}
        for s in run.store.read(index, "scores"):
            text = texts[s.prompt_id] + samples[s.sample_id].text
            examples.append(Example(f"{index}/{s.prompt_id}", s.prompt_id, text, s.p_good, gold.get(s.sample_id)))
        for v in run.store.read(index, "verdicts"):
            if v.seconds > 0:
                seconds[v.verifier] = seconds.get(v.verifier, 0.0) + v.seconds
                judged[v.verifier] = judged.get(v.verifier, 0) + 1
    if not examples:
        raise InputError(f"{run.store.root}: no round is scored yet; run `align score` first")
    return examples, sum(1000.0 * seconds[n] / judged[n] for n in seconds) if seconds else None


def distil(run: Run, base: str | None, layers: int | None, settings: Fitting) -> list[str]:
    """Teach, commit the checkpoint as `distilled/` of the run, keep the report; returns it as lines."""
    if run.store.verify_directory(NAME) is not None:
        raise InputError(f"{run.store.root / NAME}: is there already; delete it to distil again")
    examples, ensemble_s = read_examples(run)
    model, tokenizer, report = teach(
        examples, resolve_model(base, key="--base") if base else run.model_dir(), settings, layers
    )
    report |= {"ensemble_seconds_per_1000": ensemble_s, "settings": asdict(settings)}
    with run.store.commit_directory(NAME) as directory:
        save(model, tokenizer, directory)
    run.store.commit_json(None, f"{NAME}_report", report)
    return [*told(report), f"checkpoint: {run.store.root / NAME}; use it as `kind: reward_model`, `model:` that folder"]


def told(report: Mapping[str, Any]) -> list[str]:
    """The report as a person reads it."""
    chosen, took = report["selection"], report["ensemble_seconds_per_1000"]
    lines = [
        f"learnt from {report['trained_on']:,} different responses, held out {report['held_out']:,} "
        f"({report['parameters']:,} parameters; loss {report['losses'][0]:.3f} to {report['losses'][-1]:.3f})",
        f"selection accuracy by {chosen['judged_by']} on {chosen['prompts']:,} held-out choices: student "
        f"{chosen['student']:.3f}, ensemble {chosen['ensemble']:.3f}, blind {chosen['first']:.3f}, best possible "
        f"{chosen['best']:.3f}; retained {chosen['retained']:.3f}",
    ]
    if took is not None:
        ratio = report["seconds_per_1000"] / took
        lines.append(
            f"1000 responses: student {report['seconds_per_1000']:.3f} s, ensemble {took:.3f} s (the sum of its "
            f"verifiers' own times), a ratio of {ratio:.3f}"
        )
    return lines


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
