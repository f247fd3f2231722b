"""Policy-gradient losses: pure functions of per-token tensors that return one unreduced loss per token (or pair).

What they are summed with is `token_weights`, whose denominators are counted over all ranks and micro-batches.

Legend: N response tokens of a batch, K responses, B pairs of responses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from align.training.kl import bounded_exp

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "sequence_sum_fixed")


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Response tokens, as the policy sees them now and as it saw them at the start of the round.

    Example: TokenBatch(logprobs=tensor([-0.7]), old=tensor([-0.9]), advantages=tensor([1.3]))
    """

    logprobs: Tensor  # [N] log π(token), carries the gradient
    old: Tensor  # [N] the same from the trainer at the start of the round
    advantages: Tensor  # [N]

    def __post_init__(self) -> None:
        shapes = {tuple(t.shape) for t in (self.logprobs, self.old, self.advantages)}
        assert len(shapes) == 1 and self.logprobs.ndim == 1, shapes

    @property
    def ratio(self) -> Tensor:
        """[N] π / π_old."""
        return bounded_exp(self.logprobs - self.old)


def clipped(batch: TokenBatch, low: float = 0.2, high: float = 0.2, dual: float | None = None) -> Tensor:
    """[N] max(-A ρ, -A clip(ρ, 1 - low, 1 + high)), ρ = π / π_old (PPO, arXiv 1707.06347; two bounds: 2503.14476).

    `dual` bounds the loss of a token with A < 0 by -A * dual, however large ρ is (arXiv 1912.09729).
    """
    ratio, advantages = batch.ratio, batch.advantages
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - low, 1.0 + high))
    if dual is None:
        return losses
    return torch.where(advantages < 0, torch.minimum(losses, -advantages * dual), losses)


def clip_share(batch: TokenBatch, low: float, high: float) -> Tensor:
    """[N] 1 where the clipped branch is the larger one, so that the token gives no gradient."""
    ratio, advantages = batch.ratio, batch.advantages
    return (-advantages * ratio.clamp(1.0 - low, 1.0 + high) > -advantages * ratio).float()


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float | None = 0.2) -> Tensor:
    """[N] max((V - R)², (clip(V, V_old ± c) - R)²) / 2, the critic's loss; plain without a clip."""
    plain = (values - returns).square()
    if clip is None:
        return 0.5 * plain
    near = torch.minimum(torch.maximum(values, old - clip), old + clip)
    return 0.5 * torch.maximum(plain, (near - returns).square())


def joint(
    policy: tuple[Tensor, Tensor],
    old: tuple[Tensor, Tensor],
    rewards: tuple[Tensor, Tensor],
    low: float = 0.2,
    high: float = 0.2,
) -> Tensor:
    """[B] P3O on summed log-probabilities of two responses of one prompt, clipped jointly (arXiv 2310.00212).

        ρ = [π(y1) / π_old(y1)] / [π(y2) / π_old(y2)],   -min(a ρ, a clip(ρ, 1 - low, 1 + high)),   a = (r1 - r2) / 2

    Where the policy is the old one, the gradient is -(r1 - r2)/2 ∇[log π(y1) - log π(y2)], which no reward that
    depends on the prompt alone can change.  The clipped form follows a public description of the paper.
    """
    gap = (policy[0] - old[0]) - (policy[1] - old[1])
    ratio = bounded_exp(gap)
    half = 0.5 * (rewards[0] - rewards[1])
    return torch.maximum(-half * ratio, -half * ratio.clamp(1.0 - low, 1.0 + high))


def token_weights(lengths: Tensor, mode: str, *, tokens: int, responses: int, fixed_length: int) -> Tensor:
    """[N] factor of each token's loss, so that the loss of the step is one sum.

    token_mean 1/tokens; sequence_mean 1/(responses T), each response's mean; sequence_sum 1/responses;
    sequence_sum_fixed 1/(responses L) with one length L for all (Dr. GRPO, arXiv 2503.20783).  `tokens` and
    `responses` count the whole step.
    """
    per_response = torch.ones(len(lengths))
    if mode == "token_mean":
        per_response = per_response / max(tokens, 1)
    elif mode == "sequence_mean":
        per_response = per_response / (max(responses, 1) * lengths)
    elif mode == "sequence_sum":
        per_response = per_response / max(responses, 1)
    else:
        assert mode == "sequence_sum_fixed", mode
        per_response = per_response / (max(responses, 1) * fixed_length)
    return per_response.repeat_interleave(lengths)


def importance_weights(trainer: Tensor, sampler: Tensor, cap: float) -> Tensor:
    """[N] min(π_trainer / π_sampler, cap) of the same weights in two engines: truncated importance sampling."""
    return bounded_exp(trainer - sampler).clamp(max=cap)
