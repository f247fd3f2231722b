"""Before round 0 of negative-only training: does this model find right answers to this task at all?

Negative-only training (NSR, D2O, unlikelihood) takes probability from wrong answers and gives it to what the policy
believes already.  It works where the model and the task fit and fails where they do not (arXiv 2508.21188), and pass@k
tells the two apart: it must be high for the largest k, and still rise on the way there.  A curve that is flat has
nothing to be found by pushing wrong answers down.

The curve is measured once, on held-out prompts, with samples of the policy as the run begins, and kept as
`preflight.json` of round 0; every later look at it, after a restart too, reads that file.  All its points are
means over the same prompts, or a rise could come from another choice of them: it ends at the largest k for which
`REACH` of the prompts have k judged responses, and prompts with fewer are left out and counted.

Legend: P prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from align.ensemble.combine import combine
from align.ensemble.table import from_records
from align.errors import RunError
from align.evaluation.metrics import pass_at_k
from align.progress import track
from align.prompts import round_prompts
from align.recipe import Recipe
from align.recipe_negative import FALLBACK, Preflight, looks_before, preflight_judge
from align.recipe_training import Loss
from align.records import Prompt, Sample

if TYPE_CHECKING:
    from align.run import Run

SAMPLES, VERDICTS, REPORT = "preflight_samples", "preflight_verdicts", "preflight"
NEARLY_ALL = 0.99
"""From this pass@k on there is nothing left to rise to."""
REACH = 0.9
"""The curve ends at the largest k for which at least this share of the prompts have k judged responses."""


@dataclass(frozen=True)
class PassCurve:
    """pass@k by k, all of them means over the same prompts.

    Example: PassCurve({1: 0.4, 2: 0.7, 4: 0.9}, prompts=190, left_out=10)
    """

    values: Mapping[int, float]  # empty where no prompt, or too few, have even one judged response
    prompts: int  # behind every value
    left_out: int  # prompts with fewer judged responses than the largest k


def preflight(run: Run) -> None:
    """Measure, decide, keep and say; returns at once where the recipe asks for none.  Collective.

    Raises RunError where negative-only training has no chance and the recipe says to refuse.
    """
    training = run.recipe.training
    look = training.negative.preflight
    if not looks_before(run.recipe):
        return
    if run.store.read_json(0, REPORT) is None:
        with run.timed(REPORT):
            held_out = run.prompts().eval
            prompts = round_prompts(held_out, 0, min(look.prompts, len(held_out)), run.recipe.seed)
            _draw(run, prompts)
            judge = preflight_judge(run.recipe)
            _verify(run, prompts, gold=judge == "gold")
            with run.ranks.stage(REPORT):
                if run.ranks.rank == 0:
                    curve = _curve(run, judge)
                    run.keep(0, REPORT, report(training.algorithm, judge, curve, look))
            run.ranks.barrier(REPORT)
        run.say(f"pre-flight: {run.kept(0, REPORT)['explain']}")
    found = run.kept(0, REPORT)
    if found["decision"] == "refuse":
        raise RunError(
            f"pre-flight: {found['explain']}. Choose w_reinforce or another algorithm under another `name`, or let "
            "training.negative.preflight.mode fall back to it (`fallback`) or not look (`off`)"
        )


def settled(recipe: Recipe, found: Mapping[str, Any] | None) -> Recipe:
    """The recipe that training follows: the fallback's where the pre-flight decided so."""
    if found is None or found["decision"] != "fallback":
        return recipe
    training = recipe.training.model_copy(update={"algorithm": FALLBACK, "loss": Loss()})
    return recipe.model_copy(update={"training": training})


def report(algorithm: str, judge: str, curve: PassCurve, look: Preflight) -> dict[str, Any]:
    """What is kept of the look: the curve, whether there is a chance, and what is done about it."""
    chance, why = has_chance(curve.values, look)
    decision = "go" if chance else look.mode
    trains = {"go": algorithm, "fallback": FALLBACK}.get(decision)
    told = f"training goes on with {trains}" if trains else "training is refused"
    return {
        "algorithm": algorithm,
        "judge": judge,
        "prompts": curve.prompts,
        "prompts_left_out": curve.left_out,
        "samples_per_prompt": look.samples_per_prompt,
        "pass": {str(k): value for k, value in curve.values.items()},
        "chance": chance,
        "decision": decision,
        "trains_with": trains,
        "explain": f"{_shown(curve, look)} by {judge}; {why}; {told}",
    }


def _shown(curve: PassCurve, look: Preflight) -> str:
    """The curve in words, with what it leaves out."""
    drawn, top = curve.prompts + curve.left_out, max(curve.values, default=0)
    if not curve.values:
        return f"fewer than {REACH:.0%} of {drawn} held-out prompts have a judged response"
    shown = ", ".join(f"pass@{k} {value:.3f}" for k, value in curve.values.items())
    left = f" ({curve.left_out} of {drawn} have fewer than {top} judged responses)" if curve.left_out else ""
    short = f", no further than k={top} for want of judged responses" if top < look.samples_per_prompt else ""
    return f"{shown} on {curve.prompts} held-out prompts{left}{short}"


def has_chance(curve: Mapping[int, float], look: Preflight) -> tuple[bool, str]:
    """Whether negative-only training can be expected to work, and why, from pass@k by k."""
    top, start = max(curve, default=0), look.rise_from
    if not curve or start not in curve:
        return False, "too few responses were judged to say anything"
    if curve[top] < look.min_pass:
        return False, f"pass@{top} is below {look.min_pass:g}: right answers are too rare for negative-only training"
    rise = curve[top] - curve[start]
    if rise < look.min_rise and curve[start] < NEARLY_ALL:
        return False, f"from k={start} on pass@k rises by {rise:.3f} only: more samples find nothing new"
    return True, "negative-only training has a chance"


def pass_curve(judged: np.ndarray, right: np.ndarray, ks: Sequence[int]) -> PassCurve:
    """pass@k for each k up to the largest that `REACH` of the prompts reach; judged and right count responses [P]."""
    reached = [k for k in ks if (judged >= k).mean() >= REACH] if len(judged) else []
    if not reached:
        return PassCurve({}, 0, len(judged))
    enough = judged >= max(reached)
    values = {k: float(pass_at_k(judged[enough], right[enough], k).mean()) for k in sorted(reached)}
    return PassCurve(values, int(enough.sum()), int((~enough).sum()))


def sizes(look: Preflight) -> list[int]:
    """The k of the curve: powers of two, where the rise is counted from, and the number of samples."""
    powers = [2**i for i in range(look.samples_per_prompt.bit_length()) if 2**i <= look.samples_per_prompt]
    return sorted({*powers, look.rise_from, look.samples_per_prompt})


def _prompts_per_shard(recipe: Recipe) -> int:
    """Fewer than in a round, so that a shard has as many responses."""
    sampling = recipe.sampling
    wanted = sampling.prompts_per_shard * sampling.samples_per_prompt
    return max(1, wanted // recipe.training.negative.preflight.samples_per_prompt)


def _draw(run: Run, prompts: Sequence[Prompt]) -> None:
    """Sample the shards that are not committed yet, in turn over the ranks."""
    store, ranks, recipe = run.store, run.ranks, run.recipe
    if store.stage_done(0, SAMPLES):
        return
    size = _prompts_per_shard(recipe)
    shards = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    pending = ranks.broadcast([i for i in range(len(shards)) if not store.shard_done(0, SAMPLES, i)])
    sampler = run.synced_sampler() if pending else None
    with ranks.stage(SAMPLES):
        mine = pending[ranks.rank :: ranks.world_size]
        with track("pre-flight: samples", total=sum(len(shards[i]) for i in mine), unit="prompts") as bar:
            for i in mine:
                assert sampler is not None
                rows = sampler.sample(
                    shards[i],
                    policy_version=0,
                    n=recipe.training.negative.preflight.samples_per_prompt,
                    temperature=recipe.sampling.temperature,
                    top_p=recipe.sampling.top_p,
                    top_k=recipe.sampling.top_k,
                    purpose="preflight",
                    seed=recipe.seed,
                )
                store.commit_shard(0, SAMPLES, i, rows)
                bar.advance(len(shards[i]))
    store.commit_stage(0, SAMPLES, len(shards))


def _verify(run: Run, prompts: Sequence[Prompt], *, gold: bool) -> None:
    """Ask the gold verifier, or all the others, about the shards that are not committed yet."""
    from align.stages import items

    store, ranks = run.store, run.ranks
    if store.stage_done(0, VERDICTS):
        return
    by_id = {p.id: p for p in prompts}
    samples: list[Sample] = run.read(0, SAMPLES)
    size = _prompts_per_shard(run.recipe) * run.recipe.training.negative.preflight.samples_per_prompt
    shards = [samples[i : i + size] for i in range(0, len(samples), size)]
    pending = ranks.broadcast([i for i in range(len(shards)) if not store.shard_done(0, VERDICTS, i)])
    with ranks.stage(VERDICTS):
        pool = run.verifier_pool(gold=gold)
        for i in pending[ranks.rank :: ranks.world_size]:
            store.commit_shard(0, VERDICTS, i, pool.verify(items(shards[i], by_id)))
    store.commit_stage(0, VERDICTS, len(shards))


def _curve(run: Run, judge: str) -> PassCurve:
    """Rank 0: pass@k from the committed verdicts."""
    recipe, samples, verdicts = run.recipe, run.read(0, SAMPLES), run.read(0, VERDICTS)
    if judge == "gold":
        values = {v.sample_id: v.value for v in verdicts}
        right = [values.get(s.id) for s in samples]
    else:
        combined = combine(from_records(samples, verdicts, recipe.verifiers), recipe.ensemble)
        good = combined.p_good >= recipe.training.negative.right_from
        voted = combined.voters >= recipe.ensemble.min_voters
        right = [float(yes) if known else None for yes, known in zip(good, voted, strict=True)]
    place: dict[str, int] = {}
    for s in samples:
        place.setdefault(s.prompt_id, len(place))
    counts = np.zeros((2, len(place)))
    for s, value in zip(samples, right, strict=True):
        if value is not None:
            counts[:, place[s.prompt_id]] += (1.0, value)
    return pass_curve(counts[0], counts[1], sizes(recipe.training.negative.preflight))
