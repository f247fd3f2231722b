"""KL between two next-token distributions over the whole vocabulary, a chunk of tokens at a time.

With z = h W^T + b, p = softmax(z) the policy and q = softmax(z') the other,

    KL(p ‖ q) = sum_v p_v (log p_v - log q_v)        d KL / d z_v = p_v (log p_v - log q_v - KL)

The backward pass computes the logits of both heads again, so no [tokens, vocabulary] matrix outlives its chunk.

Legend: N response tokens, D width, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class OtherHead:
    """The distribution that is compared with: another model's hidden states and output head; none has a gradient."""

    hidden: Tensor  # [N, D']
    weight: Tensor  # [V, D']
    bias: Tensor | None = None  # [V]


class _ChunkedKl(torch.autograd.Function):
    """KL(softmax(h W^T + b) ‖ other) per token."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, other: OtherHead, chunk: int) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.weight, ctx.bias, ctx.other, ctx.chunk = weight, bias, other, chunk
        found = torch.empty(len(hidden), dtype=_precise(hidden), device=hidden.device)
        for part in _parts(len(hidden), chunk):
            chances, ratio = _compared(hidden[part], weight, bias, other, part)
            found[part] = (chances * ratio).sum(-1)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros(ctx.weight.shape, dtype=grad.dtype, device=grad.device) if need_weight else None
        grad_bias = torch.zeros(len(ctx.weight), dtype=grad.dtype, device=grad.device) if need_bias else None
        for part in _parts(len(hidden), ctx.chunk):
            chances, ratio = _compared(hidden[part], ctx.weight, ctx.bias, ctx.other, part)
            ratio.sub_((chances * ratio).sum(-1, keepdim=True))
            slope = chances.mul_(ratio).mul_(grad[part, None])  # [C, V]
            lean = slope.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = lean @ ctx.weight
            if grad_weight is not None:
                grad_weight += lean.t() @ hidden[part]
            if grad_bias is not None:
                grad_bias += slope.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(ctx.weight.dtype),
            None if grad_bias is None else grad_bias.to(ctx.bias.dtype),
            None,
            None,
        )


def _compared(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, other: OtherHead, part: slice
) -> tuple[Tensor, Tensor]:
    """[C, V] p and log p - log q of one chunk, in at least float32."""
    own = torch.nn.functional.linear(hidden, weight, bias).to(_precise(hidden)).log_softmax(-1)
    theirs = torch.nn.functional.linear(other.hidden[part], other.weight, other.bias).to(own.dtype).log_softmax(-1)
    return own.exp(), own - theirs


def _precise(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _parts(count: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, count)) for start in range(0, count, chunk)]


def exact_kl(hidden: Tensor, weight: Tensor, bias: Tensor | None, other: OtherHead, chunk: int) -> Tensor:
    """[N] KL of the head at each token from the other one, in nats: hidden [N, D], weight [V, D]."""
    assert hidden.ndim == 2 and other.hidden.shape[0] == hidden.shape[0], (hidden.shape, other.hidden.shape)
    found: Tensor = _ChunkedKl.apply(hidden, weight, bias, other, chunk)
    return found
