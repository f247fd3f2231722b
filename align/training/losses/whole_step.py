"""Losses that couple all pairs of an optimizer step: the record holds every pair of every rank.

The trainer computes the step's log-probabilities first, differentiates these losses once on all of them, and then
trains on the exact linear form sum_i (d loss / d log π_i) log π_i, so neither ranks nor micro-batches change them.

c and r are the log-ratios log π/π_ref of the chosen and the rejected response, σ the logistic function.

Legend: B pairs of the whole step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from align.training.losses.pairs import PairBatch
from align.training.losses.pairwise import soft_logistic


def aot(batch: PairBatch, *, beta: float, label_smoothing: float) -> Tensor:
    """[B] AOT, paired (arXiv 2406.05882, alg. 2): the sorted policy margins against the sorted reference margins.

    d_i = sort(log π(c) - log π(r))_i - sort(log π_ref(c) - log π_ref(r))_i; -(1-ε) log σ(β d_i) - ε log σ(-β d_i).
    It asks that the policy's margins dominate the reference's as distributions, quantile by quantile, so no value
    belongs to one pair, and neither a label nor a weight per pair has a meaning.
    """
    policy = (batch.policy_chosen - batch.policy_rejected).sort().values
    reference = (batch.ref_chosen - batch.ref_rejected).sort().values
    return soft_logistic(beta * (policy - reference), torch.full_like(policy, 1.0 - label_smoothing))


def aot_unpaired(batch: PairBatch, *, beta: float, label_smoothing: float) -> Tensor:
    """[B] AOT, unpaired (arXiv 2406.05882, alg. 1): sorted c against sorted r, quantile by quantile."""
    gap = batch.chosen.sort().values - batch.rejected.sort().values
    return soft_logistic(beta * gap, torch.full_like(gap, 1.0 - label_smoothing))


def dr_dpo(batch: PairBatch, *, beta: float, dr_temperature: float) -> Tensor:
    """[B] Dr. DPO (arXiv 2407.07880): -b log E exp(-l / b), the same value for every pair; l is DPO's loss, b > 0.

    A pair whose loss is high, because its label may be wrong, counts less: its gradient is that of DPO times
    exp(-l/b) / E exp(-l/b).  E is the mean over the step by the pairs' weights.  b to infinity is DPO.  The formula
    was taken from a summary of the paper.
    """
    losses = soft_logistic(beta * batch.margin, batch.label)
    total = torch.logsumexp(batch.weight.log() - losses / dr_temperature, 0) - batch.weight.sum().log()
    return (-dr_temperature * total).expand_as(losses)
