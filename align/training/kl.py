"""Estimates of the KL divergence from samples, where each may stand, and the adaptive coefficient.

With y drawn from π and u = log π_ref(y) - log π(y) (Schulman, "Approximating KL divergence", 2020):

    k1 = -u            unbiased
    k2 = u² / 2        biased, but its gradient is that of the KL
    k3 = e^u - 1 - u   unbiased and never negative

In the reward only k1 is right: the reward's expectation counts, and its maximiser is π ∝ π_ref e^{R/β} for k1 alone.
As a loss, k1 and k3 have the right value and the wrong gradient: E[∇k1] = 0, and E[∇k3] = ∇KL(π_ref ‖ π).  So a KL
loss here shows one estimate and follows the gradient of k2.

Legend: N response tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from align.recipe_rl import LARGEST_ERROR

LOG_RATIO_LIMIT = 20.0
"""A log-ratio beyond this is cut in an exponential: e^20 is already no number to average."""
WEIGHT_LIMIT = 10.0
"""Largest weight of a sample that an older policy drew."""


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """e^x with x kept within ±20; no gradient beyond."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """[N] log π - log π_ref."""
    return logprobs - reference


def k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """[N] (log π - log π_ref)² / 2."""
    return 0.5 * (logprobs - reference).square()


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """[N] e^u - 1 - u, u = log π_ref - log π."""
    u = (reference - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(u) - u


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def penalty(logprobs: Tensor, reference: Tensor, old: Tensor, estimator: str) -> Tensor:
    """[N] the estimate as value, w * ∇k2 as gradient: the gradient of each state's KL, in expectation.

    w = π / π_old, at most 10, corrects for tokens that the policy at the start of the round drew.  The gradient is
    that of the next-token KL in the states that were visited; that other states are visited with a changed policy is
    left to the reward.
    """
    shown = ESTIMATORS[estimator](logprobs, reference).detach()
    weight = bounded_exp(logprobs.detach() - old).clamp(max=WEIGHT_LIMIT)
    pull = weight * k2(logprobs, reference)
    return shown + pull - pull.detach()


def adapted(coefficient: float, kl: float, target: float, horizon: float, responses: int) -> float:
    """β after a round: β (1 + clip(KL / target - 1, ±0.2) n / horizon), with n responses (arXiv 1909.08593, §2.2).

    `kl` and `target` are in nats per response.  The recipe keeps n below 5 horizons, so that β stays positive.
    """
    error = min(LARGEST_ERROR, max(-LARGEST_ERROR, kl / target - 1.0))
    return coefficient * (1.0 + error * responses / horizon)
