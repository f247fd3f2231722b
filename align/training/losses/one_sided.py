"""Losses that look at the chosen and the rejected response each by itself, not at their difference.

c and r are the log-ratios log π/π_ref of the chosen and the rejected response, p is the label, σ the logistic
function.

Legend: B pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from align.training.losses.pairs import PairBatch


def nca(batch: PairBatch, *, beta: float) -> Tensor:
    """[B] NCA for pairs (arXiv 2402.05369, eq. 15).

    -p log σ(βc) - (1-p) log σ(βr) - 1/2 log σ(-βc) - 1/2 log σ(-βr).  It holds absolute likelihoods, so that the
    chosen one does not sink with the rejected one.
    """
    c, r = beta * batch.chosen, beta * batch.rejected
    seen = -batch.label * F.logsigmoid(c) - (1.0 - batch.label) * F.logsigmoid(r)
    return seen - 0.5 * (F.logsigmoid(-c) + F.logsigmoid(-r))


def bco(batch: PairBatch, *, beta: float, shift: float = 0.0) -> Tensor:
    """[B] BCO for pairs (arXiv 2404.04656): -log σ(βc - δ) - log σ(-(βr - δ)).

    A classifier of good against bad responses; δ = `shift`, the running mean of all rewards βc and βr, centres it.
    """
    return -F.logsigmoid(beta * batch.chosen - shift) - F.logsigmoid(shift - beta * batch.rejected)


def sppo_hard(batch: PairBatch, *, beta: float) -> Tensor:
    """[B] SPPO (arXiv 2405.00675, eq. 4.7): (c - (p - 1/2)/β)^2 + (r + (p - 1/2)/β)^2, β the paper's 1/η.

    p = 1 is the form with hard labels that gives it its name.
    """
    target = (batch.label - 0.5) / beta
    return (batch.chosen - target).square() + (batch.rejected + target).square()


def apo_zero(batch: PairBatch, *, beta: float) -> Tensor:
    """[B] APO-zero (arXiv 2408.06266, eq. 7): (1 - σ(βc)) + σ(βr); no unit.

    For chosen responses that are better than what the model writes: chosen up, rejected down.
    """
    return torch.sigmoid(-beta * batch.chosen) + torch.sigmoid(beta * batch.rejected)


def apo_down(batch: PairBatch, *, beta: float) -> Tensor:
    """[B] APO-down (arXiv 2408.06266, eq. 8): σ(βc) + (1 - σ(β(c - r))); no unit.

    For chosen responses that are worse than what the model writes: chosen down, rejected further down.
    """
    return torch.sigmoid(beta * batch.chosen) + torch.sigmoid(-beta * batch.margin)


def sft(batch: PairBatch) -> Tensor:
    """[B] -log π(chosen) / (chosen tokens of the step / its pairs).

    Its mean over the step is the negative log-likelihood per chosen token, long and short responses alike.
    """
    return -batch.policy_chosen / batch.tokens_per_pair
