"""Which responses of a round a supervised loss learns from, and what it is told of each.

A selector takes the round's responses prompt by prompt and returns what it keeps; whatever it leaves out is counted.
The result does not depend on the order of the scores.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from align.recipe_supervised import Supervised
from align.records import Sample, Score

Groups = dict[str, list["Target"]]


@dataclass(frozen=True, slots=True)
class Target:
    """A response and what is known of it.

    Example: Target(Sample(…), reward=0.8, p_good=0.9, score=0.9, value=0.6)
    """

    sample: Sample
    reward: float = 0.0  # the ensemble's, for ranking
    p_good: float = 0.0
    score: float = 0.0  # R: P(good) or the reward, as the recipe says
    value: float = 0.0  # V: mean R of the prompt's responses
    good: bool = True
    level: int = -1  # which control text or quantile, 0 the worst
    base: float = 0.0  # log π_base, summed over the response
    self_reward: float = 0.0
    aligned: float = 0.0  # mean token log-probability under the aligned models


def scored_targets(scores: Iterable[Score], samples: Mapping[str, Sample], settings: Supervised) -> Groups:
    """The scored responses by prompt, in the order of their ids, each with R, V and whether R reaches the threshold."""
    groups: Groups = {}
    for s in sorted(scores, key=lambda s: (s.prompt_id, s.sample_id)):
        score = s.p_good if settings.score == "p_good" else s.reward
        target = Target(samples[s.sample_id], s.reward, s.p_good, score, good=score >= settings.threshold)
        groups.setdefault(s.prompt_id, []).append(target)
    for members in groups.values():
        mean = sum(t.score for t in members) / len(members)
        members[:] = [replace(t, value=mean, level=int(t.good)) for t in members]
    return groups


def unscored_targets(samples: Iterable[Sample]) -> Groups:
    """All responses by prompt, for a loss that asks no verifier."""
    groups: Groups = {}
    for sample in sorted(samples, key=lambda s: (s.prompt_id, s.id)):
        groups.setdefault(sample.prompt_id, []).append(Target(sample))
    return groups


def keep(groups: Groups, wanted: Callable[[Target], bool], why: str, counts: Counter[str]) -> Groups:
    """The targets that are wanted; the others are counted under `why`, and prompts without one are gone."""
    kept = {prompt: [t for t in members if wanted(t)] for prompt, members in groups.items()}
    counts[why] += sum(map(len, groups.values())) - sum(map(len, kept.values()))
    return {prompt: members for prompt, members in kept.items() if members}


def long_enough(groups: Groups, min_tokens: int, counts: Counter[str]) -> Groups:
    """Without responses of fewer tokens."""
    why = "shorter than training.supervised.min_tokens" if min_tokens > 1 else "without a token"
    return keep(groups, lambda t: len(t.sample.response_ids) >= min_tokens, why, counts)


def finished(groups: Groups, counts: Counter[str]) -> Groups:
    """Without responses that were cut: to imitate one is to learn not to end."""
    return keep(groups, lambda t: t.sample.finish_reason == "stop", "cut at sampling.max_new_tokens", counts)


def above_threshold(groups: Groups, counts: Counter[str]) -> Groups:
    """Those whose score reaches the threshold."""
    return keep(groups, lambda t: t.good, "below training.supervised.threshold", counts)


def with_aligned(groups: Groups, means: Mapping[str, float], counts: Counter[str]) -> Groups:
    """Each target with its mean token log-probability under the aligned models, by sample id."""
    groups = keep(groups, lambda t: t.sample.id in means, "unknown to the aligned models", counts)
    return {p: [replace(t, aligned=means[t.sample.id]) for t in members] for p, members in groups.items()}


def with_base(groups: Groups, sums: Mapping[str, float], per_token: bool) -> Groups:
    """Each target with log π_base of its response, by sample id, and its self-reward: that, or the mean over tokens."""

    def told(target: Target) -> Target:
        total = sums[target.sample.id]
        return replace(target, base=total, self_reward=total / len(target.sample.response_ids) if per_token else total)

    return {prompt: [told(t) for t in members] for prompt, members in groups.items()}


def different(groups: Groups, counts: Counter[str]) -> Groups:
    """Without responses that the same prompt already has, token for token."""
    first: dict[tuple[str, tuple[int, ...]], str] = {}
    for prompt, members in groups.items():
        for target in members:
            first.setdefault((prompt, target.sample.response_ids), target.sample.id)
    kept = set(first.values())
    return keep(groups, lambda t: t.sample.id in kept, "the same as another", counts)


def best(groups: Groups, count: int, fraction: float | None, counts: Counter[str]) -> Groups:
    """The responses of each prompt with the highest reward; ties go by sample id, which is a hash."""
    chosen: set[str] = set()
    for members in groups.values():
        size = count if fraction is None else math.ceil(fraction * len(members))
        ranked = sorted(members, key=lambda t: (-t.reward, t.sample.id))
        chosen.update(t.sample.id for t in ranked[:size])
    return keep(groups, lambda t: t.sample.id in chosen, "not among the best of their prompt", counts)


def most_self_rewarded(groups: Groups, counts: Counter[str]) -> Groups:
    """The response of each prompt with the highest self-reward."""
    top = {min(m, key=lambda t: (-t.self_reward, t.sample.id)).sample.id for m in groups.values()}
    return keep(groups, lambda t: t.sample.id in top, "not of the highest self-reward of their prompt", counts)


def several(groups: Groups, counts: Counter[str]) -> Groups:
    """Prompts with at least two responses, for a loss of pairs."""
    alone = {t.sample.id for m in groups.values() if len(m) < 2 for t in m}
    return keep(groups, lambda t: t.sample.id not in alone, "alone with their prompt", counts)


def with_levels(groups: Groups, quantiles: int, over: str) -> Groups:
    """Each target with its quantile by reward, 0 the worst; ties go by sample id.

    `over` is "round" for quantiles of all responses together or "prompt" for each prompt's own.  Of n responses the
    one of rank i (from 1, the worst) is in quantile ceil(i * quantiles / n) - 1, so the best is always in the last.
    """
    pools: list[Sequence[Target]] = list(groups.values())
    if over == "round":
        pools = [[t for members in groups.values() for t in members]]
    level: dict[str, int] = {}
    for pool in pools:
        ranked = sorted(pool, key=lambda t: (t.reward, t.sample.id))
        level.update({t.sample.id: -(-i * quantiles // len(ranked)) - 1 for i, t in enumerate(ranked, 1)})
    return {prompt: [replace(t, level=level[t.sample.id]) for t in members] for prompt, members in groups.items()}


def best_quantile(groups: Groups, quantiles: int, over: str, counts: Counter[str]) -> Groups:
    """The targets of the best quantile."""
    levelled = with_levels(groups, quantiles, over)
    return keep(levelled, lambda t: t.level == quantiles - 1, "below the best quantile", counts)
