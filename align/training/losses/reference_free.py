"""Losses of pairs that know no reference policy: what they compare is the policy's own log-probability.

lc and lr are the summed log-probabilities of the chosen and the rejected response, |c| and |r| their tokens, p the
label and σ the logistic function.  The reference part of the record is not read.  Most add a negative
log-likelihood of the chosen response (`training.loss.nll_weight`), which is all that holds the policy where it was.

Legend: B pairs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from align.training.losses.pairs import PairBatch
from align.training.losses.pairwise import smoothed, soft_logistic


def simpo(batch: PairBatch, *, beta: float, simpo_gamma: float, label_smoothing: float) -> Tensor:
    """[B] SimPO (arXiv 2405.14734, eq. 6): DPO's form on z = beta (lc/|c| - lr/|r|) - gamma.

    The paper takes beta 2 to 10 and gamma/beta 0.3 to 0.5.  With a soft label gamma is subtracted before the two
    sides are mixed, as in TRL, so p = 1/2 still pulls to z = 0.
    """
    margin = batch.policy_chosen / batch.chosen_length - batch.policy_rejected / batch.rejected_length
    return soft_logistic(beta * margin - simpo_gamma, smoothed(batch.label, label_smoothing))


def cpo(batch: PairBatch, *, beta: float, label_smoothing: float) -> Tensor:
    """[B] CPO (arXiv 2401.08417, eq. 3, its preference term): DPO with a uniform reference, z = beta (lc - lr)."""
    z = beta * (batch.policy_chosen - batch.policy_rejected)
    return soft_logistic(z, smoothed(batch.label, label_smoothing))


def cpo_hinge(batch: PairBatch, *, beta: float) -> Tensor:
    """[B] SLiC-HF's rank term (arXiv 2305.10425): p max(0, 1-z) + (1-p) max(0, 1+z), z = beta (lc - lr)."""
    z = beta * (batch.policy_chosen - batch.policy_rejected)
    return batch.label * F.relu(1.0 - z) + (1.0 - batch.label) * F.relu(1.0 + z)


def cpo_ipo(batch: PairBatch, *, beta: float) -> Tensor:
    """[B] IPO without a reference: p (m - 1/(2 beta))^2 + (1-p) (m + 1/(2 beta))^2, m = lc/|c| - lr/|r|."""
    margin = batch.policy_chosen / batch.chosen_length - batch.policy_rejected / batch.rejected_length
    target = 1.0 / (2.0 * beta)
    return batch.label * (margin - target).square() + (1.0 - batch.label) * (margin + target).square()


def orpo(batch: PairBatch, *, beta: float) -> Tensor:
    """[B] ORPO's odds-ratio term (arXiv 2403.07691, eq. 7) times beta, the paper's λ.

    DPO's form on log odds(lc/|c|) - log odds(lr/|r|), log odds(l) = l - log(1 - e^l).  The paper adds the negative
    log-likelihood of the chosen response: that is `nll_weight` 1.  (TRL counts the prompt's tokens in that too.)
    """
    chosen = log_odds(batch.policy_chosen / batch.chosen_length)
    rejected = log_odds(batch.policy_rejected / batch.rejected_length)
    return beta * soft_logistic(chosen - rejected, batch.label)


def log_odds(logprob: Tensor) -> Tensor:
    """[B] log(P / (1 - P)) of log P < 0, without cancellation at either end."""
    near_one = logprob > -math.log(2.0)
    # The branch not taken must have a finite gradient too, or `where` passes on its NaN.
    low = torch.log1p(-torch.exp(torch.where(near_one, torch.full_like(logprob, -1.0), logprob)))
    high = torch.log(-torch.expm1(torch.where(near_one, logprob, torch.full_like(logprob, -0.5))))
    return logprob - torch.where(near_one, high, low)
