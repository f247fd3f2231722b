"""The pair stage of the builders that look inside responses: rollouts from prefixes, their values, and the pairs.

Rollouts are drawn and judged shard by shard, split over the ranks like samples: a shard holds some prompts, and what is
drawn in it depends on the weights and on these prompts alone.  What the rollouts can cost at most is said before the
first one, and refused above `pairs.steps.max_tokens`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from align.builders.partial import partly_correct
from align.builders.per_step import NO_CORRECT, Candidates, per_step
from align.builders.steps import Prefix, Stepped, cut, first_step
from align.builders.tree import Place, expand, records, select, tree_pairs
from align.builders.values import Drawn, Valued, tokens_at_most, value_prefixes, wrong_responses
from align.errors import InputError, RunError
from align.faults import reach
from align.pairs import PairReport, keep_pairs
from align.progress import track
from align.recipe_steps import SETTING_OF, Steps
from align.records import PrefixValue, Prompt, Sample, Score
from align.rollout_judge import Judge, judged_scores

if TYPE_CHECKING:
    from align.run import Run

NO_WRONG, UNSPLIT = "no_wrong", "unsplit"
REASONS = {
    "no_wrong": "prompts had no wrong response",
    "no_correct": "prompts or places had no correct response to set against the wrong one",
    "unsplit": "wrong responses were not cut, because the rule found no step in them",
    "all_zero": "wrong responses could not be saved from any of their steps",
    "unjudged": "places could not be judged: every verifier abstained",
    "no_loss": "wrong responses had no step that loses value",
    "repeated": "candidates were there already with the same tokens",
    "one_child": "places of the tree had one child only",
    "too_close": "places had children closer than pairs.steps.tree.min_gap",
    "too_alike": "places had steps more alike than pairs.steps.tree.max_similarity",
    "too_bad": "places had no child worth pairs.steps.tree.min_best",
}
"""Why something gave no candidate."""

Rows = tuple[list[PrefixValue], list[Sample]]
Work = Callable[["Rollouts", Sequence[Any]], Rows]
"""What is done with one shard's jobs."""


@dataclass(frozen=True)
class Question:
    """One prompt's responses, as the builders want them."""

    prompt_id: str
    wrong: list[Stepped]
    correct: list[Score]  # best first


class PairStage(NamedTuple):
    """How a builder's pairs are made: `prepare` on every rank, then `build` on rank 0."""

    prepare: Callable[[Run, int], None]
    build: Callable[[Run, int], tuple[PairReport, list[Sample]]]
    makes: tuple[str, ...] = ()  # stages that hold further samples, which the pairs name


# ---- rollouts ------------------------------------------------------------------------------------------------------


class Rollouts:
    """Draws continuations of prefixes and judges the responses that they complete.  Making one is collective."""

    def __init__(self, run: Run, round_index: int) -> None:
        if round_index != run.version:
            raise InputError(
                f"round {round_index} has no rollouts, and the policy stands at round {run.version}: the weights that "
                "would have to draw them are gone"
            )
        self._run, self._sampler = run, run.synced_sampler()
        self._prompts = {p.id: p for p in run.round_prompts(round_index)}
        self._judge = Judge(run, round_index)

    def draw(self, prefixes: Sequence[Prefix], n: int, temperature: float) -> list[list[Drawn]]:
        """`n` continuations of each prefix."""
        recipe = self._run.recipe
        asked = [self._prompt(prefix) for prefix in prefixes]
        rows = self._sampler.sample(
            asked,
            policy_version=self._run.version,
            n=n,
            temperature=temperature,
            top_p=recipe.sampling.top_p,
            top_k=recipe.sampling.top_k,
            purpose="rollout",
            seed=recipe.seed,
            used=[len(prefix.ids) for prefix in prefixes],
        )
        owners = [prefix for prefix in prefixes for _ in range(n)]
        questions = [self._prompts[prefix.sample.prompt_id] for prefix in owners]
        values = self._judge.p_good(rows, questions, [prefix.text for prefix in owners])
        drawn = [Drawn(row, value) for row, value in zip(rows, values, strict=True)]
        return [drawn[i : i + n] for i in range(0, len(drawn), n)]

    def _prompt(self, prefix: Prefix) -> Prompt:
        question = self._prompts[prefix.sample.prompt_id]
        ids = prefix.sample.prompt_ids + prefix.ids
        return Prompt(prefix.id, question.text + prefix.text, ids, question.answer, question.split, question.columns)

    def close(self) -> None:
        """End what only the judging needed."""
        self._judge.close()


def _in_shards(run: Run, round_index: int, jobs: Sequence[Any], work: Work) -> None:
    """Do the shards of jobs, one job a prompt, that are not committed yet, in turn over the ranks."""
    store, ranks, size = run.store, run.ranks, run.recipe.pairs.steps.prompts_per_shard
    stages = ("rollouts", "prefix_values")
    shards = [jobs[i : i + size] for i in range(0, len(jobs), size)]
    done = [all(store.shard_done(round_index, stage, i) for stage in stages) for i in range(len(shards))]
    pending = ranks.broadcast([i for i, there in enumerate(done) if not there])
    source = Rollouts(run, round_index) if pending else None
    with run.timed("rollouts"), ranks.stage("rollouts"), closing(source) if source is not None else nullcontext():
        mine = pending[ranks.rank :: ranks.world_size]
        total = sum(len(shards[i]) for i in mine)
        with track(f"round {round_index}: rollouts", total=total, unit="prompts") as bar:
            for i in mine:
                assert source is not None
                values, samples = work(source, shards[i])
                store.commit_shard(round_index, "rollouts", i, samples)
                store.commit_shard(round_index, "prefix_values", i, values)
                bar.advance(len(shards[i]))
                reach("pair.rollouts.shard")
    for stage in stages:
        if not store.stage_done(round_index, stage):
            store.commit_stage(round_index, stage, len(shards))
    reach("pair.rollouts.after")


def _say_cost(run: Run, round_index: int, what: str, draws: int, tokens: int) -> None:
    """What the rollouts can take at most, before the first; refused over the recipe's limit."""
    limit = run.recipe.pairs.steps.max_tokens
    told = f"{what}: at most {draws:,} continuations and {tokens:,} tokens"
    run.say(f"round {round_index}: {told} (pairs.steps.max_tokens: {limit:,})")
    if tokens > limit:
        raise RunError(
            f"round {round_index}: {told}, over pairs.steps.max_tokens: {limit:,}. Lower pairs.steps.rollouts, "
            "best_of, wrong_per_prompt, max_steps, the tree's numbers or rounds.prompts_per_round, or raise the limit"
        )


# ---- per step ------------------------------------------------------------------------------------------------------


def _value_steps(run: Run, round_index: int) -> None:
    """Commit the values of the prefixes of this round's wrong responses."""
    if run.store.stage_done(round_index, "prefix_values"):
        return
    settings = run.recipe.pairs.steps
    with run.ranks.stage("rollouts' cost"):
        questions, _ = _questions(run, round_index)
        wrong = [response for question in questions for response in question.wrong]
        prefixes, tokens = tokens_at_most(wrong, settings)
        draws = prefixes * settings.rollouts * settings.best_of
        what = f"{prefixes:,} prefixes of {len(wrong):,} wrong responses x {settings.rollouts} x {settings.best_of}"
        _say_cost(run, round_index, what, draws, tokens)

    def work(source: Rollouts, shard: Sequence[Question]) -> Rows:
        n, temperature = settings.rollouts * settings.best_of, run.recipe.sampling.temperature
        responses = [response for question in shard for response in question.wrong]
        found = value_prefixes(responses, lambda prefixes: source.draw(prefixes, n, temperature), settings)
        return list(found.values.values()), list(found.best.values())

    _in_shards(run, round_index, questions, work)


def _questions(run: Run, round_index: int) -> tuple[list[Question], Counter[str]]:
    """The prompts with a wrong response that can be looked into, in the order of the samples, and what was left out."""
    settings = run.recipe.pairs.steps
    samples = {s.id: s for s in run.read(round_index, "samples")}
    groups: dict[str, list[Score]] = {s.prompt_id: [] for s in samples.values()}
    for score in judged_scores(run, round_index):
        groups[score.prompt_id].append(score)
    decode, counts, tried = _decoder(run), Counter[str](), list[Sample]()
    found = []
    for prompt_id, scores in groups.items():
        wrong, correct = wrong_responses(scores, samples, settings)
        if not wrong:
            counts[NO_WRONG] += 1
            continue
        if not correct and not settings.shared_prefix:
            counts[NO_CORRECT] += 1
            continue
        stepped: list[Stepped] = []
        for response in wrong:
            if len(stepped) < settings.wrong_per_prompt:
                tried.append(response)
                stepped.append(cut(response, settings, decode))
                if len(stepped[-1].ends) < 2:
                    stepped.pop()
                    counts[UNSPLIT] += 1
        if stepped:
            found.append(Question(prompt_id, stepped, correct))
    if tried and not found:
        raise _cannot_split(settings, tried)
    return found, counts


def _cannot_split(settings: Steps, tried: Sequence[Sample]) -> RunError:
    key = SETTING_OF[settings.rule]
    return RunError(
        f"pairs.steps.{key}: {getattr(settings, key)!r} finds no step inside any of the {len(tried)} responses that "
        f"were to be cut; the first, {tried[0].id}, begins {tried[0].text[:60]!r}. Give a rule that these texts follow"
    )


def _decoder(run: Run) -> Callable[[list[int]], str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.model_dir())
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))


def _pair_steps(run: Run, round_index: int) -> tuple[PairReport, list[Sample]]:
    questions, counts = _questions(run, round_index)
    samples = {s.id: s for s in run.read(round_index, "samples")}
    settings, best = run.recipe.pairs.steps, {s.prompt_id: s for s in run.read(round_index, "rollouts")}
    if settings.against == "step":
        decode = _decoder(run)
        best = {place: first_step(s, settings, decode) for place, s in best.items()}
    valued = Valued({v.id: v for v in run.read(round_index, "prefix_values")}, best)
    out = Candidates()
    for question in questions:
        per_step(question.wrong, question.correct, samples, valued, settings, out)
    return _report(run, round_index, out, counts)


# ---- partly correct ------------------------------------------------------------------------------------------------


def _pair_partial(run: Run, round_index: int) -> tuple[PairReport, list[Sample]]:
    settings, decode = run.recipe.pairs.steps, _decoder(run)
    questions, counts = _questions(run, round_index)
    samples = {s.id: s for s in run.read(round_index, "samples")}
    out = Candidates()
    for question in questions:
        correct = [(score, cut(samples[score.sample_id], settings, decode)) for score in question.correct]
        partly_correct(question.wrong, correct, samples, settings.state, out)
    return _report(run, round_index, out, counts)


# ---- tree ----------------------------------------------------------------------------------------------------------


def _search_trees(run: Run, round_index: int) -> None:
    """Commit the places of one tree per prompt of this round."""
    if run.store.stage_done(round_index, "prefix_values"):
        return
    sampling, settings = run.recipe.sampling, run.recipe.pairs.steps
    tree = settings.tree
    with run.ranks.stage("rollouts' cost"):
        first = {s.prompt_id: s for s in reversed(run.read(round_index, "samples"))}
        draws = len(first) * tree.iterations * tree.actions
        what = f"{len(first):,} trees x {tree.iterations} places x {tree.actions}"
        _say_cost(run, round_index, what, draws, draws * sampling.max_new_tokens)
        decode = _decoder(run)

    def work(source: Rollouts, shard: Sequence[Sample]) -> Rows:
        roots = [Place(Prefix(s.prompt_id, s, 0, (), ""), None) for s in shard]
        for _ in range(tree.iterations):
            paths = [path for path in (select(root, tree) for root in roots) if path is not None]
            prefixes = [path[-1].prefix for path in paths]
            drawn = source.draw(prefixes, tree.actions, tree.temperature or sampling.temperature) if paths else []
            for path, rows in zip(paths, drawn, strict=True):
                expand(path, [(cut(d.sample, settings, decode), d.p_good) for d in rows])
        found = [records(root) for root in roots]
        return [v for values, _ in found for v in values], [s for _, steps in found for s in steps]

    _in_shards(run, round_index, [first[p] for p in sorted(first)], work)


def _pair_trees(run: Run, round_index: int) -> tuple[PairReport, list[Sample]]:
    settings = run.recipe.pairs.steps
    values = run.read(round_index, "prefix_values")
    steps = {s.id: s for s in run.read(round_index, "rollouts")}
    if values and settings.tree.depth > 1 and settings.tree.iterations > 1 and all(v.step == 1 for v in values):
        raise _cannot_split(settings, list(steps.values()))
    groups: dict[str, list[PrefixValue]] = {s.prompt_id: [] for s in run.read(round_index, "samples")}
    for value in values:
        groups[value.prompt_id].append(value)
    out = Candidates()
    for prompt_id, group in groups.items():
        tree_pairs(prompt_id, group, [steps[v.sample_id] for v in group], settings.tree, out)
    return _report(run, round_index, out, Counter())


# ---- what all have in common ---------------------------------------------------------------------------------------


def _report(run: Run, round_index: int, out: Candidates, counts: Counter[str]) -> tuple[PairReport, list[Sample]]:
    """The pairs of these candidates, and the samples they name that are not the round's own."""
    samples = {s.id: s for s in run.read(round_index, "samples")}
    counts = counts + Counter(out.counts)
    remarks = [f"{counts[reason]} {text}" for reason, text in REASONS.items() if counts[reason]]
    base = {
        "samples": len(samples),
        "unscored": len(samples) - len(run.read(round_index, "scores")),
        "prompts": len({s.prompt_id for s in samples.values()}),
        "single": 0,
        **{reason: counts[reason] for reason in REASONS},
    }
    report = keep_pairs(list(out.pairs.values()), {**samples, **out.samples}, run.recipe.pairs, base, remarks)
    named = {i for pair in report.pairs for i in (pair.chosen_id, pair.rejected_id)}
    return report, [s for i, s in sorted(out.samples.items()) if i in named and i not in samples]


def _nothing(run: Run, round_index: int) -> None:
    """Nothing to prepare."""


_MADE = ("step_samples",)
STEP_BUILDERS: dict[str, PairStage] = {
    "per_step": PairStage(_value_steps, _pair_steps, _MADE),
    "partial": PairStage(_nothing, _pair_partial, _MADE),
    "tree": PairStage(_search_trees, _pair_trees, _MADE),
}
"""The builders that look inside responses."""
