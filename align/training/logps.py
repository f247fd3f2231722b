"""Log-probabilities of response tokens without the [tokens, vocabulary] matrix of logits.

Only the hidden states in front of response tokens go through the output head, a chunk at a time, in float32
where it matters.  The backward pass computes the logits again, unless all of them fit into one chunk: then they are
kept, for they would all be there at once in any case.  With z = (h W^T + b) / τ, p = softmax(z) and the entropy
H = -sum_v p_v log p_v:

    d log p_y / d z = onehot(y) - p          d H / d z = -p (log p + H)

so a slope s = d loss / d z gives the gradients s W / τ, s^T h / τ and sum s / τ.

Legend: N response tokens, D width, V vocabulary, C tokens of a chunk, K responses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align.training.exact_kl import OtherHead

CACHED_LOGITS = 2**20  # float32 numbers; 4 MiB


@dataclass(frozen=True, slots=True)
class HeadOptions:
    """What the head is asked for."""

    chunk: int  # tokens whose logits exist at the same time
    temperature: float = 1.0  # divides the logits
    entropy: bool = False
    squares: bool = False
    other: OtherHead | None = None  # what an exact KL is asked from

    def __post_init__(self) -> None:
        assert self.chunk >= 1 and self.temperature > 0, self


@dataclass(frozen=True, slots=True)
class TokenLogProbs:
    """What the head says of N response tokens; float32, or float64 where the hidden states are."""

    logprobs: Tensor  # [N] log π(token | everything before it)
    entropies: Tensor | None = None  # [N] entropy of the whole next-token distribution in nats; carries a gradient
    squares: Tensor | None = None  # [N] log sum_v p_v^2, the log-probability that two draws agree; no gradient
    divergence: Tensor | None = None  # [N] exact KL from another model's next-token distribution, in nats


class _ChunkedHead(torch.autograd.Function):
    """log softmax((h W^T + b) / τ)[y], chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: HeadOptions
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        count = hidden.shape[0]
        keep = count <= options.chunk and any(ctx.needs_input_grad[:3])
        logprobs = torch.empty(count, dtype=_precise(hidden), device=hidden.device)
        normalisers, totals = torch.empty_like(logprobs), torch.empty_like(logprobs)
        entropies = torch.empty_like(logprobs) if options.entropy else None
        squares = torch.empty_like(logprobs) if options.squares else None
        ctx.parts = _parts(count, options.chunk, weight)
        ctx.kept = []
        for part in ctx.parts:
            logits = _logits(hidden[part], weight, bias, options.temperature)
            picked = logits.gather(1, targets[part, None]).squeeze(1)
            largest = logits.amax(dim=-1)
            powers = logits.sub_(largest[:, None]).exp_()  # in place: the logits are the largest tensor of the step
            totals[part] = powers.sum(dim=-1)
            normalisers[part] = largest + totals[part].log()
            logprobs[part] = picked - normalisers[part]
            if entropies is not None:
                entropies[part] = torch.special.entr(powers / totals[part, None]).sum(dim=-1)
            if squares is not None:  # the largest power is 1, so the sum of squares is at least 1
                squares[part] = powers.square().sum(dim=-1).log() - 2.0 * totals[part].log()
            if keep:
                ctx.kept.append(powers)
        ctx.save_for_backward(hidden, targets, normalisers, totals, entropies)
        # Not saved tensors: under ZeRO-3 the parameters are empty between forward and backward.
        ctx.weight, ctx.bias, ctx.temperature = weight, bias, options.temperature
        ctx.set_materialize_grads(False)  # no gradient of an entropy that no loss uses
        if squares is not None:
            ctx.mark_non_differentiable(squares)
        return logprobs, entropies, squares

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, targets, normalisers, totals, entropies = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad = torch.zeros_like(normalisers) if grad is None else grad
        pull = grad if grad_entropy is None else grad + grad_entropy * entropies  # what multiplies -p
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight: Tensor | None = None
        grad_bias: Tensor | None = None
        kept, ctx.kept = ctx.kept, []  # used up in place; a second backward computes them again
        for index, part in enumerate(ctx.parts):
            if kept:
                powers, scale = kept[index], totals[part]
            else:
                logits = _logits(hidden[part], ctx.weight, ctx.bias, ctx.temperature)
                powers, scale = logits.sub_(normalisers[part, None]).exp_(), None
            slope = _slope(powers, scale, pull[part], None if grad_entropy is None else grad_entropy[part])
            slope.scatter_add_(1, targets[part, None], grad[part, None])
            if ctx.temperature != 1.0:
                slope.div_(ctx.temperature)
            lean = slope.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(lean, ctx.weight, out=grad_hidden[part])
            if need_weight:
                share = lean.t() @ hidden[part]
                grad_weight = share.to(slope.dtype) if grad_weight is None else grad_weight.add_(share)
            if need_bias:
                total = slope.sum(0)
                grad_bias = total if grad_bias is None else grad_bias.add_(total)
        if grad_weight is not None:
            grad_weight = grad_weight.to(ctx.weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(ctx.bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None


def _slope(powers: Tensor, scale: Tensor | None, pull: Tensor, grad_entropy: Tensor | None) -> Tensor:
    """[C, V] d loss / d z without the one-hot part: -p (g + g_H H) - g_H p log p, written over `powers`.

    p = powers / scale.  Written with p log p, not with log p, so that a power of 0 gives 0.
    """
    if grad_entropy is None:
        return powers.mul_(-(pull if scale is None else pull / scale)[:, None])
    chances = powers if scale is None else powers.div_(scale[:, None])
    bonus = torch.special.entr(chances).mul_(grad_entropy[:, None])
    return chances.mul_(-pull[:, None]).add_(bonus)


def _precise(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """[C, V] in at least float32, and free to be written over."""
    logits = torch.nn.functional.linear(hidden, weight, bias).to(_precise(hidden))
    return logits if temperature == 1.0 else logits.div_(temperature)


def _parts(count: int, chunk: int, weight: Tensor) -> list[slice]:
    """The N tokens in chunks; on a CPU in parts small enough that a part's logits stay in the cache."""
    if weight.device.type == "cpu":
        chunk = min(chunk, max(64, CACHED_LOGITS // weight.shape[0]))
    return [slice(start, min(start + chunk, count)) for start in range(0, count, chunk)]


def token_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: HeadOptions
) -> TokenLogProbs:
    """log softmax of the head at `targets`: hidden [N, D], weight [V, D], targets [N]."""
    assert hidden.ndim == 2 and targets.shape == hidden.shape[:1], (hidden.shape, targets.shape)
    return TokenLogProbs(*_ChunkedHead.apply(hidden, weight, bias, targets, options))


def per_response(values: Tensor, lengths: Tensor) -> Tensor:
    """[K] sum of the values [N] over each response's tokens."""
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)
