"""Supervised losses on the policy's own responses: imitate the good ones, each in its own way.

The losses of tokens take `TokenBatch` and named numbers and return one value per token; `poft` returns one per
response, `rlhf_sharpening` one per pair and `mml` one per prompt.  What is averaged over, and over which responses,
is the trainer's.

Legend: N response tokens, K responses, B pairs, P prompts, G most responses of a prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NEARLY_CERTAIN = 1e-6
"""Where 1 - p falls below this, -log(1 - p) goes on along its tangent, so that it and its slope stay finite."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """What a supervised loss knows of N response tokens; what belongs to a response is repeated for its tokens.

    Example: TokenBatch(logprobs=tensor([-0.5, -0.1]), score=tensor([0.9, 0.9]), value=tensor([0.6, 0.6]),
    good=tensor([True, True]))
    """

    logprobs: Tensor  # [N] log π(token | everything before it), in nats
    score: Tensor  # [N] the response's score R
    value: Tensor  # [N] mean score V of the responses to its prompt
    good: Tensor  # [N] bool: the response is one to imitate
    kl: Tensor | None = None  # [N] exact KL(π ‖ initial policy) of the next-token distribution

    def __post_init__(self) -> None:
        fields = (self.logprobs, self.score, self.value, self.good)
        assert all(t.ndim == 1 and t.shape == self.logprobs.shape for t in fields), [tuple(t.shape) for t in fields]


def nll(tokens: TokenBatch) -> Tensor:
    """[N] -log π: plain supervised fine-tuning, on whatever the builder selected.

    Best-of-n is expert iteration, with half of the responses Binary FeedME (AlpacaFarm, arXiv 2305.14387); the
    responses with the highest log π_base are SFT-sharpening (arXiv 2412.01951); behind a control text it is
    conditional training (arXiv 2302.08582); with part of the input hidden, masked thought (arXiv 2403.02178).
    """
    return -tokens.logprobs


def unlikelihood(tokens: TokenBatch, unlikelihood_weight: float) -> Tensor:
    """[N] -log π for tokens of good responses, -α log(1 - π) for those of bad ones (arXiv 2302.08582, sect. 2).

    At π = 1/2 both are ln 2 (α = 1).
    """
    return torch.where(tokens.good, -tokens.logprobs, unlikelihood_weight * minus_log1m(tokens.logprobs))


def minus_log1m(logprobs: Tensor) -> Tensor:
    """-log(1 - e^x) of log-probabilities x, with a finite slope where e^x is nearly 1.

    A plain clamp would have no gradient there, just where the policy is surest of a token that it should not write.
    """
    edge = math.log1p(-NEARLY_CERTAIN)
    inner = -torch.log(-torch.expm1(logprobs.clamp(max=edge)))
    return inner + (1.0 - NEARLY_CERTAIN) / NEARLY_CERTAIN * (logprobs - edge).clamp(min=0.0)


def rwr(tokens: TokenBatch, beta: float, weight_cap: float) -> Tensor:
    """[N] reward-weighted regression: -min(exp(R / β), cap) log π (arXiv 2302.08582, sect. 2)."""
    return -capped_exp(tokens.score / beta, weight_cap) * tokens.logprobs


def awr(tokens: TokenBatch, beta: float, weight_cap: float) -> Tensor:
    """[N] advantage-weighted regression: -min(exp((R - V) / β), cap) log π, V the mean score of the prompt's responses.

    The paper (arXiv 1910.00177; for language arXiv 2302.08582) learns V with a head of its own and adds its squared
    error.  Several responses to each prompt give V without one: nothing is learned for it, so that term is absent.
    """
    return -capped_exp((tokens.score - tokens.value) / beta, weight_cap) * tokens.logprobs


def capped_exp(exponent: Tensor, cap: float) -> Tensor:
    """min(e^x, cap), without overflow on the way."""
    return exponent.clamp(max=math.log(cap)).exp()


def quark(tokens: TokenBatch, kl_weight: float) -> Tensor:
    """[N] -log π + λ KL(π ‖ π_0) on responses of the best quantile (Quark, arXiv 2205.13636, as AlpacaFarm runs it).

    The KL is exact over the vocabulary.  With one quantile and λ = 0 this is plain supervised fine-tuning.
    """
    if tokens.kl is None:
        assert kl_weight == 0, "quark with a KL needs the KL"
        return -tokens.logprobs
    return -tokens.logprobs + kl_weight * tokens.kl


def poft(mean_logprobs: Tensor, aligned_logprobs: Tensor) -> Tensor:
    """[K] PoFT: -log σ(r_θ - r̄) (arXiv 2412.12865, eq. 4).

    r_θ is the mean token log-probability of the response, r̄ the mean of the same under the aligned models.  The
    gradient is that of the mean token cross-entropy times e^r̄ / (e^r̄ + e^r_θ): what they like more counts more.
    """
    return -F.logsigmoid(mean_logprobs - aligned_logprobs)


def rlhf_sharpening(ratio_margin: Tensor, self_reward_margin: Tensor, beta: float) -> Tensor:
    """[B] (β (Δ_1 - Δ_2) - (s_1 - s_2))², Δ = log π - log π_base, s the self-reward (arXiv 2412.01951, sect. 3.2).

    With s = log π_base it is 0 exactly at π ∝ π_base^(1 + 1/β).
    """
    return (beta * ratio_margin - self_reward_margin).square()


def mml(totals: Tensor, counted: Tensor, mml_beta: float) -> Tensor:
    """[P] maximum marginal likelihood: -(1/β) log Σ exp(β log π(y)) over a prompt's good responses (arXiv 2205.14318).

    totals [P, G] are summed log-probabilities; counted [P, G] says which places hold a response, at least one in each
    row.  β = 1 is the marginal likelihood; towards 0 the gradient is that of the mean of -log π, and with growing β
    only the likeliest counts.
    """
    return -torch.logsumexp((mml_beta * totals).masked_fill(~counted, -math.inf), dim=1) / mml_beta
