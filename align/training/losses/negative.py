"""Losses that learn from wrong answers: reinforcement by sign, unlikelihood, and self-samples against a bad answer.

π is the policy's probability of a token that was sampled, R = +1 at the tokens of a right response and -1 at those of
a wrong one.  "Decomposed reinforcement" (arXiv 2506.01347) writes its losses with the probability itself and its code
with PPO's ratio; both are here, by name (`form`):

    probability   -R π          pushes sampled token y by -R π_y (1-π_y) and any other v by +R π_y π_v (logits)
    ratio         max(-R ρ, -R clip(ρ, 1-c, 1+c)), ρ = π/π_old: at ρ = 1 the same without the factor π_y

Gradients of the probability fade as a token dies out; those of the ratio fade by clipping, once it has moved by c.

Legend: N response tokens, G prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from align.training.losses import policy_gradient
from align.training.losses.supervised import minus_log1m


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Tokens of right and wrong responses.

    Example: TokenBatch(logprobs=tensor([-0.1]), old=tensor([-0.1]), sign=tensor([-1.0]))
    """

    logprobs: Tensor  # [N] log π
    old: Tensor  # [N] the same when the round began
    sign: Tensor  # [N] R


def psr(batch: TokenBatch, *, form: str, clip: float) -> Tensor:
    """[N] Positive-sample reinforcement: right responses up; wrong ones say nothing."""
    return torch.where(batch.sign > 0, _reinforced(batch, form, clip), 0.0)


def nsr(batch: TokenBatch, *, form: str, clip: float) -> Tensor:
    """[N] Negative-sample reinforcement: wrong responses down; what they lose goes to all others as π has it."""
    return torch.where(batch.sign < 0, _reinforced(batch, form, clip), 0.0)


def w_reinforce(batch: TokenBatch, *, form: str, clip: float, positive_weight: float) -> Tensor:
    """[N] Weighted REINFORCE: λ PSR + NSR, λ = `positive_weight`.  λ = 1 is REINFORCE with rewards of ±1."""
    return positive_weight * psr(batch, form=form, clip=clip) + nsr(batch, form=form, clip=clip)


def unlikelihood(batch: TokenBatch) -> Tensor:
    """[N] -log(1 - π) at the tokens of wrong responses (arXiv 1908.04319).

    Its push is π_y at the sampled token and -π_y π_v / (1-π_y) at the others (logits): strongest where the policy is
    sure.
    """
    return torch.where(batch.sign < 0, minus_log1m(batch.logprobs), 0.0)


def d2o(own_ratio: Tensor, bad_ratio: Tensor, *, beta: float, d2o_alpha: float) -> Tensor:
    """[G] D2O (arXiv 2403.03419): -log σ(β mean_i Δ(y_i) - α Δ(y_l)), α = `d2o_alpha`.

    y_i are the policy's own samples and y_l is a bad answer.
    `own_ratio` [G] is that mean and `bad_ratio` [G] = Δ(y_l), Δ = log π/π_ref.  The mean stands inside σ, so by Jensen
    the loss is at most the mean of DPO's losses of y_i against y_l.  The formula was taken from an excerpt of the
    paper; there the bad answer has a reference of its own, which its experiments set to the same model.
    """
    return -F.logsigmoid(beta * own_ratio - d2o_alpha * bad_ratio)


def _reinforced(batch: TokenBatch, form: str, clip: float) -> Tensor:
    """[N] the loss of reward R, in the form that is named."""
    if form == "probability":
        return -batch.sign * batch.logprobs.exp()
    assert form == "ratio", form
    return policy_gradient.clipped(policy_gradient.TokenBatch(batch.logprobs, batch.old, batch.sign), clip, clip)
