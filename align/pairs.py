"""From scored responses to preference pairs.

With q = P(good), taken as independent of each other: P(win) = q_a (1 - q_b), P(loss) = q_b (1 - q_a), and the rest
is a tie. Labels say how far responses to one prompt are good together, and then that covariance leaves both (see
align/ensemble/calibrate.py).  A best-against-worst pair is hardly ever the wrong way round; where it misleads, both
are good or both are bad, and the weight P(win) + P(loss) says so.  Everything that does not become a pair is counted
under the stage that dropped it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from align.ensemble.calibrate import PairProbability
from align.recipe import Pairs, Recipe
from align.records import Pair, Sample, Score, content_id

DROPPED = {
    "ties": "had equal rewards",
    "identical": "were two identical responses",
    "below_margin": "differed by no more than pairs.min_margin",
    "too_likely_tie": "were ties with more than pairs.max_tie, or for certain",
    "over_limit": "were beyond pairs.max_per_prompt",
}
"""Why a candidate pair did not become one, in the order in which the stages look."""

INDEPENDENT = PairProbability()  # the product rule: what is left to say where no label tells how siblings go together
CERTAIN_TIE = 1e-9  # a soft pair of less weight teaches nothing, and its label would be rounding error


@dataclass(frozen=True, slots=True)
class PairReport:
    """The pairs of a round, and what became of everything else.

    Example: PairReport(pairs=(…), counts={"samples": 64, "unscored": 2, "prompts": 8, "single": 0, "candidates": 8,
    "ties": 3, "identical": 0, "below_margin": 0, "too_likely_tie": 0, "over_limit": 0, "pairs": 5},
    length_gap_tokens=1.2)
    """

    pairs: tuple[Pair, ...]
    counts: Mapping[str, int]  # candidates = the stages of DROPPED + pairs
    length_gap_tokens: float  # mean length of the chosen minus that of the rejected, 0 without pairs
    remarks: tuple[str, ...] = ()  # what a builder left out before there was a candidate

    def explain(self) -> str:
        """One sentence per stage that lost something; enough to mend a round without pairs."""
        c = self.counts
        said = [f"{c['pairs']} pairs from {c['samples']} responses to {c['prompts']} prompts"]
        if c["unscored"]:
            said.append(f"{c['unscored']} responses had no score (too few verdicts, see ensemble.min_voters)")
        if c["single"]:
            said.append(f"{c['single']} prompts had fewer than two scored responses")
        said += self.remarks
        said += [f"{c[stage]} of {c['candidates']} candidates {why}" for stage, why in DROPPED.items() if c[stage]]
        return "; ".join(said)


def build_pairs(
    scores: Sequence[Score],
    samples_by_id: Mapping[str, Sample],
    settings: Pairs,
    chances: PairProbability = INDEPENDENT,
) -> PairReport:
    """The pairs of these scores.  The result does not depend on the order of the scores.

    `samples_by_id` holds the round's samples; those without a score are counted as `unscored`.  `chances` is what the
    ensemble calibrated on labelled pairs of responses.
    """
    by_prompt: dict[str, list[Score]] = {}
    for score in sorted(scores, key=lambda s: (s.prompt_id, -s.reward, s.sample_id)):
        if score.sample_id not in samples_by_id:
            raise ValueError(f"score of {score.sample_id!r} belongs to no sample")
        by_prompt.setdefault(score.prompt_id, []).append(score)
    if len({score.sample_id for score in scores}) != len(scores):
        raise ValueError("two scores of one sample")
    counts = {
        "samples": len(samples_by_id),
        "unscored": len(samples_by_id) - len(scores),
        "prompts": len({sample.prompt_id for sample in samples_by_id.values()}),
    }
    counts["single"] = counts["prompts"] - sum(len(group) > 1 for group in by_prompt.values())
    candidates = [BUILDERS[settings.builder](group, settings.k) for group in by_prompt.values()]
    return keep_pairs(candidates, samples_by_id, settings, counts, chances=chances)


def keep_pairs(
    candidates: Sequence[Sequence[tuple[Score, Score]]],
    samples_by_id: Mapping[str, Sample],
    settings: Pairs,
    counts: Mapping[str, int],
    remarks: Sequence[str] = (),
    chances: PairProbability = INDEPENDENT,
) -> PairReport:
    """The (better, worse) candidates of each prompt that become pairs; `counts` are those of their builder.

    `samples_by_id` holds whatever a candidate names.  P(good) of what is inside a response comes from rollouts, which
    no label calibrated: such candidates keep the product rule.
    """
    told = {**counts, **dict.fromkeys(("candidates", *DROPPED, "pairs"), 0)}
    pairs: list[Pair] = []
    for of_prompt in candidates:
        pairs += _of_prompt(of_prompt, samples_by_id, settings, chances, told)
    told["pairs"] = len(pairs)
    return PairReport(tuple(pairs), told, _length_gap(pairs, samples_by_id), tuple(remarks))


def _of_prompt(
    candidates: Sequence[tuple[Score, Score]],
    samples: Mapping[str, Sample],
    settings: Pairs,
    chances: PairProbability,
    counts: dict[str, int],
) -> list[Pair]:
    """One prompt's pairs, widest margin first; adds what it drops to `counts`."""
    kept = []
    for better, worse in candidates:
        counts["candidates"] += 1
        pair = make_pair(better, worse, settings, chances)
        stage = _dropped_at(better, worse, pair, samples, settings, chances)
        if stage is None:
            kept.append(pair)
        else:
            counts[stage] += 1
    kept.sort(key=lambda p: (-p.margin, p.id))
    limit = settings.max_per_prompt or len(kept)
    counts["over_limit"] += max(0, len(kept) - limit)
    return kept[:limit]


def _dropped_at(
    better: Score,
    worse: Score,
    pair: Pair,
    samples: Mapping[str, Sample],
    settings: Pairs,
    chances: PairProbability,
) -> str | None:
    """The stage that drops this candidate, if one does."""
    if samples[better.sample_id].response_ids == samples[worse.sample_id].response_ids:
        return "identical"
    if better.reward == worse.reward:
        return "ties"
    if pair.margin <= settings.min_margin:
        return "below_margin"
    win, _, loss = chances(better.p_good, worse.p_good)
    decided = win + loss
    if 1.0 - decided > settings.max_tie or (settings.labels == "soft" and decided < CERTAIN_TIE):
        return "too_likely_tie"
    return None


def make_pair(better: Score, worse: Score, settings: Pairs, chances: PairProbability = INDEPENDENT) -> Pair:
    """The pair of two scores of one prompt, soft or hard.

    Example: q = 0.9 against 0.2 gives P(win) = 0.72, P(loss) = 0.02, P(tie) = 0.26 and weight 0.74.
    """
    win, tie, loss = chances(better.p_good, worse.p_good)
    soft = settings.labels == "soft"
    return Pair(
        id=content_id(better.sample_id, worse.sample_id),
        prompt_id=better.prompt_id,
        chosen_id=better.sample_id,
        rejected_id=worse.sample_id,
        p_win=win if soft else 1.0,
        p_tie=tie if soft else 0.0,
        weight=win + loss if soft else 1.0,
        margin=better.reward - worse.reward,
        builder=settings.builder,
    )


def best_worst(group: Sequence[Score], k: int) -> list[tuple[Score, Score]]:
    """The best against the worst."""
    return [(group[0], group[-1])] if len(group) > 1 else []


def all_margin(group: Sequence[Score], k: int) -> list[tuple[Score, Score]]:
    """Every response against every worse one; the margin is looked at later."""
    return list(combinations(group, 2))


def top_bottom(group: Sequence[Score], k: int) -> list[tuple[Score, Score]]:
    """Each of the best k against each of the worst k; with fewer than 2k, the better half against the worse half."""
    k = min(k, len(group) // 2)
    return [(better, worse) for better in group[:k] for worse in group[len(group) - k :]]


def pairs_per_prompt(recipe: Recipe) -> int:
    """Most pairs that one prompt can give."""
    n, pairs = recipe.sampling.samples_per_prompt, recipe.pairs
    wrong = min(pairs.steps.wrong_per_prompt, n)
    most = {
        "best_worst": 1,
        "all_margin": n * (n - 1) // 2,
        "top_bottom": min(pairs.k, n // 2) ** 2,
        "per_step": wrong,
        "partial": 2 * wrong,
        "tree": pairs.steps.tree.iterations,
    }[pairs.builder]
    return min(most, pairs.max_per_prompt or most)


BUILDERS: dict[str, Callable[[Sequence[Score], int], list[tuple[Score, Score]]]] = {
    "best_worst": best_worst,
    "all_margin": all_margin,
    "top_bottom": top_bottom,
}
"""Each takes one prompt's scores, best first with ties broken by sample id, and returns (better, worse)."""


def _length_gap(pairs: Sequence[Pair], samples: Mapping[str, Sample]) -> float:
    """Mean tokens of the chosen minus mean tokens of the rejected."""
    if not pairs:
        return 0.0
    gaps = [len(samples[p.chosen_id].response_ids) - len(samples[p.rejected_id].response_ids) for p in pairs]
    return sum(gaps) / len(gaps)
