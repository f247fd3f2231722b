"""Losses of the margin of a pair: how much more than the reference the policy prefers the chosen response.

Each is a pure function of a `PairBatch` and named numbers, [B] in nats unless said otherwise.  Throughout,
c and r are the log-ratios log π/π_ref of the chosen and the rejected response, z = beta * (c - r), p is the label and
σ the logistic function.

Legend: B pairs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from align.training.losses.pairs import PairBatch


def dpo(batch: PairBatch, *, beta: float) -> Tensor:
    """[B] DPO with a soft label p: -p log σ(z) - (1-p) log σ(-z).

    p = 1 is DPO (Rafailov et al., arXiv 2305.18290, eq. 7); p = 1 - ε is its label-smoothed form, which the paper's
    code calls conservative DPO.  At z = 0 the loss is ln 2 and the gradient with respect to the chosen
    log-probability is beta * (1/2 - p).
    """
    return soft_logistic(beta * batch.margin, batch.label)


def cdpo(batch: PairBatch, *, beta: float, label_smoothing: float) -> Tensor:
    """[B] Conservative DPO: every label is the wrong way round with probability ε beside what p says of it.

    -q log σ(z) - (1-q) log σ(-z), q = p (1-ε) + (1-p) ε (Mitchell, "A note on DPO with noisy preferences", 2023).
    With p = 1 the minimum is at z = log((1-ε)/ε).
    """
    return soft_logistic(beta * batch.margin, smoothed(batch.label, label_smoothing))


def rdpo(batch: PairBatch, *, beta: float, label_smoothing: float) -> Tensor:
    """[B] Robust DPO (arXiv 2403.00409, eq. 12): [-(1-ε) log σ(z) + ε log σ(-z)] / (1-2ε), ε < 1/2.

    Its mean over labels flipped with probability ε is DPO's loss on clean labels, so it is unbiased.  It is
    unbounded below and needs gradient clipping.  ε is one number: with an ε per pair the factor 1/(1-2ε)
    has no bound, and training diverges on the pairs that say least.
    """
    z = beta * batch.margin
    clean, flipped = -F.logsigmoid(z), -F.logsigmoid(-z)
    return ((1.0 - label_smoothing) * clean - label_smoothing * flipped) / (1.0 - 2.0 * label_smoothing)


def hinge(batch: PairBatch, *, beta: float) -> Tensor:
    """[B] SLiC's hinge on the same margin (arXiv 2305.10425, 2309.06657): p max(0, 1-z) + (1-p) max(0, 1+z)."""
    z = beta * batch.margin
    return batch.label * F.relu(1.0 - z) + (1.0 - batch.label) * F.relu(1.0 + z)


def ipo(batch: PairBatch, *, beta: float) -> Tensor:
    """[B] IPO (arXiv 2310.12036, eq. 17): p (m - 1/(2 beta))^2 + (1-p) (m + 1/(2 beta))^2, beta the paper's τ.

    m is the margin PER TOKEN: each log-ratio is divided by the length of its response.  The paper sums; its authors
    confirmed to TRL that their results come from this form.  beta is therefore a number per token.
    """
    target, margin = 1.0 / (2.0 * beta), batch.margin_per_token
    return batch.label * (margin - target).square() + (1.0 - batch.label) * (margin + target).square()


def dpo_norm(batch: PairBatch, *, beta: float) -> Tensor:
    """[B] Length-normalised DPO (arXiv 2411.15124): DPO on the margin per token.

    With responses of one length T it is DPO at beta / T, so beta is larger: about 5 where DPO has 0.1.
    """
    return soft_logistic(beta * batch.margin_per_token, batch.label)


def exo(batch: PairBatch, *, beta: float, label_smoothing: float) -> Tensor:
    """[B] EXO for pairs (arXiv 2402.00856, eq. 16): KL(softmax(z, 0) || (q, 1-q)), q as in cDPO.

    σ(z) [log σ(z) - log q] + σ(-z) [log σ(-z) - log(1-q)].  The KL runs the other way than DPO's, so a label that
    is certain (q = 1) costs infinitely much: ε must be positive.
    """
    z, q = beta * batch.margin, smoothed(batch.label, label_smoothing)
    win, lose = F.logsigmoid(z), F.logsigmoid(-z)
    return win.exp() * (win - q.log()) + lose.exp() * (lose - torch.log1p(-q))


def weighted(batch: PairBatch, *, beta: float) -> Tensor:
    """[B] DPO weighted by how sure the label is: (2p-1) (-log σ(z)).

    A pair with p < 1/2 counts as the opposite pair with 1-p, which keeps the loss bounded below.
    """
    sureness = 2.0 * batch.label - 1.0
    return -sureness.abs() * F.logsigmoid(beta * torch.where(sureness < 0, -batch.margin, batch.margin))


def gdpo(batch: PairBatch, *, beta: float) -> Tensor:
    """[B] Geometric-averaged DPO (arXiv 2409.06691): -log σ((2p-1) z).

    The policy ratio of responses averaged geometrically by the label; no gradient at p = 1/2.  The formula was
    taken from a summary of the paper.
    """
    return -F.logsigmoid((2.0 * batch.label - 1.0) * beta * batch.margin)


def discopop(batch: PairBatch, *, beta: float, discopop_tau: float) -> Tensor:
    """[B] DiscoPOP, log-ratio modulated loss (arXiv 2406.08414, eq. 5).

    (1 - m) (-log σ(z)) + m exp(-z), m = σ(z / τ).  It is not convex and was found by search with τ = 0.05.
    """
    z = beta * batch.margin
    share = torch.sigmoid(z / discopop_tau)
    return -F.logsigmoid(z) * (1.0 - share) + torch.exp(-z) * share


def soft_logistic(z: Tensor, label: Tensor) -> Tensor:
    """[B] -p log σ(z) - (1-p) log σ(-z): the cross-entropy of a pair whose logit is z."""
    return -label * F.logsigmoid(z) - (1.0 - label) * F.logsigmoid(-z)


def smoothed(label: Tensor, noise: float) -> Tensor:
    """[B] P(chosen better), where the label is flipped with this probability."""
    assert 0.0 <= noise < 0.5 and math.isfinite(noise), noise
    return label * (1.0 - noise) + (1.0 - label) * noise
