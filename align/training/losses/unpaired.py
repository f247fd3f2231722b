"""Losses of single responses, each good or bad by itself: KTO and its relative without a reference point.

Δ = log π/π_ref of the response, p = P(good), σ the logistic function.  A soft p mixes the two sides, which is the
expected loss where the response is good with that probability; p of 0 or 1 is the published form.

Legend: K responses.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kto(
    ratio: Tensor, label: Tensor, *, z_ref: Tensor, beta: float, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    """[K] KTO (arXiv 2402.01306, eq. 7): p λ_D (1 - σ(β(Δ - z))) + (1-p) λ_U (1 - σ(β(z - Δ))); no unit.

    z = max(0, mean of Δ over responses put behind prompts they do not belong to) estimates the KL of policy and
    reference over the whole step (`reference_point`) and carries no gradient.
    """
    gap = beta * (ratio - z_ref)
    return label * desirable_weight * torch.sigmoid(-gap) + (1.0 - label) * undesirable_weight * torch.sigmoid(gap)


def apo_zero_unpaired(
    ratio: Tensor, label: Tensor, *, beta: float, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    """[K] APO-zero for single responses (arXiv 2408.06266, eq. 7): KTO with z = 0; no unit.

    For good responses that are better than what the model writes.
    """
    gap = beta * ratio
    return label * desirable_weight * torch.sigmoid(-gap) + (1.0 - label) * undesirable_weight * torch.sigmoid(gap)


def reference_point(mismatched_ratio: Tensor) -> Tensor:
    """[] KTO's z: the mean log-ratio of mismatched responses, no less than 0; 0 where there are none."""
    if not mismatched_ratio.numel():
        return mismatched_ratio.new_zeros(())
    return mismatched_ratio.detach().mean().clamp(min=0.0)
