"""From scores and verdicts to the one number per response that a policy gradient maximises.

Nothing is ever silently 0: a response without the number leaves the round, and so does a prompt that has too few left;
both are counted.

Legend: K responses kept, G responses of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from align.recipe_rl import DROPS_EQUAL, NEEDS_GREEDY, Reward
from align.records import Sample, Score, Verdict
from align.training.advantages import EPSILON, ratings, zero_spread
from align.training.preference_matrix import Answers, ByChance, preference_matrix

Array = np.ndarray
SURE = 1e-6
"""P(good) is kept this far from 0 and 1 before a logit."""
GROUPS = ("grpo", "rloo", "pairwise_grpo", "p3o")
"""Algorithms that compare the responses of a prompt, so that one alone is of no use."""


@dataclass(frozen=True)
class Rewarded:
    """The responses that are left, in a fixed order, prompt by prompt.

    Example: Rewarded(samples=[Sample(…)], scores=array([0.9]), masked=array([False]), baselines=None, strengths={},
    counts={"unscored": 2})
    """

    samples: Sequence[Sample]
    scores: Array  # [K]
    masked: Array  # [K] responses whose loss is left out
    baselines: Array | None  # [K] what the prompt's greedy response got
    strengths: dict[str, Array] = field(default_factory=dict)  # by prompt [G, G]
    counts: dict[str, int] = field(default_factory=dict)  # what was left out, by reason


def is_greedy(sample: Sample) -> bool:
    """Whether this is the prompt's greedy response: a baseline or an anchor, never trained on."""
    return sample.temperature == 0.0


def rewarded(
    algorithm: str,
    settings: Reward,
    samples: Mapping[str, Sample],
    scores: Sequence[Score],
    verdicts: Iterable[Verdict],
    state: dict[str, Any],
    *,
    anchor_reward: str = "logit",
    answers: Answers | None = None,
) -> Rewarded:
    """What each response gets.  `state` keeps the first round's mean and spread for `normalise: initial`.

    With a judge's `answers` the pairwise algorithms look at nothing else.
    """
    chances = {s.sample_id: s.p_good for s in scores}
    ordered = sorted(samples.values(), key=lambda s: (s.prompt_id, s.index))
    drawn = [s for s in ordered if not is_greedy(s)]
    greedy = {s.prompt_id: s for s in ordered if is_greedy(s)}
    if answers is not None:
        found = judged(algorithm, drawn, greedy, answers, anchor_reward)
    else:
        found = raw_rewards(settings, scores, verdicts)
        greedy = {prompt: s for prompt, s in greedy.items() if s.id in found}
    kept = [s for s in drawn if s.id in found and s.response_ids]
    counts = {"unscored" if answers is None else "uncompared": len(drawn) - len(kept)}  # or without a token
    if algorithm in NEEDS_GREEDY:
        counts["no_greedy"] = sum(s.prompt_id not in greedy for s in kept)
        kept = [s for s in kept if s.prompt_id in greedy]
    if answers is not None:
        raw, counts["unread_preferences"] = found, answers.unread
    elif algorithm == "pairwise_ppo":
        raw = {s.id: against(chances[s.id], chances[greedy[s.prompt_id].id], anchor_reward) for s in kept}
    else:
        used = [*kept, *greedy.values()]
        raw = normalised(settings, {s.id: found[s.id] for s in used}, [s.id for s in kept], state)
        raw = {s.id: _cut(settings, s, raw[s.id]) for s in used}
    kept, counts = _usable(algorithm, kept, raw, counts)
    masked = np.array([settings.truncated == "mask" and s.finish_reason == "length" for s in kept], dtype=bool)
    counts["masked"] = int(masked.sum())
    groups = _by_prompt(kept) if algorithm == "pairwise_grpo" else {}
    return Rewarded(
        samples=kept,
        scores=np.array([raw[s.id] for s in kept]),
        masked=masked,
        baselines=np.array([raw[greedy[s.prompt_id].id] for s in kept]) if algorithm == "remax" else None,
        strengths={prompt: preference_matrix(answers or ByChance(chances), ids) for prompt, ids in groups.items()},
        counts=counts,
    )


def judged(
    algorithm: str, drawn: Sequence[Sample], greedy: Mapping[str, Sample], answers: Answers, anchor_reward: str
) -> dict[str, float]:
    """By sample id what a judge's answers make of a response; one that was compared with none is not in it.

    Pairwise GRPO: its rating among the prompt's responses.  Pairwise PPO: how it does against the greedy one, with
    P(better) = (1 + d) / 2 of the half difference d of both orders, or its logit.
    """
    if algorithm == "pairwise_grpo":
        found: dict[str, float] = {}
        for ids in _by_prompt(drawn).values():
            found |= dict(zip(ids, ratings(preference_matrix(answers, ids)).tolist(), strict=True))
        return {i: rating for i, rating in found.items() if not math.isnan(rating)}
    gaps = {s.id: answers.both_ways(s.id, greedy[s.prompt_id].id) for s in drawn if s.prompt_id in greedy}
    chances = {i: (1.0 + d) / 2.0 for i, d in gaps.items() if d is not None}
    return {i: logit(p) if anchor_reward == "logit" else p for i, p in chances.items()}


def raw_rewards(settings: Reward, scores: Sequence[Score], verdicts: Iterable[Verdict]) -> dict[str, float]:
    """By sample id; a response that the source says nothing of is not in it."""
    values: dict[str, float] = {}
    if settings.verifier is not None:
        values = {v.sample_id: v.value for v in verdicts if v.verifier == settings.verifier and v.value is not None}
    if settings.shaping == "qwen_math":
        return {
            s.sample_id: qwen_math(values[s.sample_id], s.p_good, settings.alpha)
            for s in scores
            if s.sample_id in values
        }
    if settings.source == "verifier":
        return values
    if settings.source == "logit":
        return {s.sample_id: logit(s.p_good) for s in scores}
    return {s.sample_id: s.p_good if settings.source == "p_good" else s.reward for s in scores}


def qwen_math(model_score: float, correct: float, alpha: float) -> float:
    """σ(α r_m) + (r_v - 1) (arXiv 2409.12122): a correct answer gets (0, 1), a wrong one (-1, 0)."""
    return 0.5 * (1.0 + math.tanh(0.5 * alpha * model_score)) + (correct - 1.0)


def logit(chance: float) -> float:
    """log p / (1 - p), with p kept off 0 and 1."""
    p = min(max(chance, SURE), 1.0 - SURE)
    return math.log(p / (1.0 - p))


def against(chance: float, anchor: float, kind: str) -> float:
    """How a response does against its prompt's anchor, given that one of the two is good and the other is not.

    With independent P(good) that chance is p (1-q) / (p (1-q) + q (1-p)) = σ(logit p - logit q).  The chance saturates;
    its logit does not.
    """
    gap = logit(chance) - logit(anchor)
    return gap if kind == "logit" else 0.5 * (1.0 + math.tanh(0.5 * gap))


def normalised(
    settings: Reward, raw: dict[str, float], trained: Sequence[str], state: dict[str, Any]
) -> dict[str, float]:
    """The rewards as `normalise` and `clip` want them; the statistics are those of the responses to be trained on."""
    ids, values = list(raw), np.array(list(raw.values()))
    mine = np.array([raw[i] for i in trained])
    if settings.normalise == "initial" and len(mine) > 1:
        if "reward_mean" not in state:
            state["reward_mean"], state["reward_std"] = float(mine.mean()), float(mine.std(ddof=1))
        values = (values - state["reward_mean"]) / math.sqrt(state["reward_std"] ** 2 + EPSILON)
    elif settings.normalise == "std" and len(mine) > 1:
        values = values / math.sqrt(mine.var(ddof=1) + EPSILON)  # the mean stays: taking it off would reward length
    if settings.clip is not None:
        values = values.clip(-settings.clip, settings.clip)
    return dict(zip(ids, values.tolist(), strict=True))


def _usable(
    algorithm: str, kept: Sequence[Sample], raw: Mapping[str, float], counts: dict[str, int]
) -> tuple[list[Sample], dict[str, int]]:
    """Without prompts that cannot be compared within, and without those whose responses all got the same."""
    if algorithm in GROUPS:
        sizes: dict[str, int] = {}
        for s in kept:
            sizes[s.prompt_id] = sizes.get(s.prompt_id, 0) + 1
        counts["single"] = sum(sizes[s.prompt_id] < 2 for s in kept)
        kept = [s for s in kept if sizes[s.prompt_id] >= 2]
    if algorithm in DROPS_EQUAL and kept:
        flat = zero_spread(np.array([raw[s.id] for s in kept]), [s.prompt_id for s in kept])
        counts["equal_reward"] = int(flat.sum())
        kept = [s for s, drop in zip(kept, flat, strict=True) if not drop]
    return list(kept), counts


def _cut(settings: Reward, sample: Sample, score: float) -> float:
    """The score after the rule for responses that hit the length limit, as the engine told, not by a missing token."""
    if sample.finish_reason != "length" or settings.truncated in ("keep", "mask"):
        return score
    return settings.penalty if settings.truncated == "penalty" else 0.0


def _by_prompt(kept: Sequence[Sample]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for s in kept:
        found.setdefault(s.prompt_id, []).append(s.id)
    return found
