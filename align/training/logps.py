"""Log-probabilities of response tokens without the [tokens, vocabulary] matrix of logits.

Only the hidden states in front of response tokens go through the output head, a chunk at a time, in float32
where it matters; the backward pass computes each chunk's logits again.  With z = h W^T + b and p = softmax(z):
d log p_y / d z = onehot(y) - p, so the gradients are g (W_y - p W), (onehot(y) - p)^T (g h) and sum g (onehot(y) - p).

Legend: N response tokens, D width, V vocabulary, C tokens of a chunk, K responses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenLogProbs:
    """What the head says of N response tokens."""

    logprobs: Tensor  # [N] float32, log π(token | everything before it)
    entropies: Tensor | None  # [N] float32, entropy of the whole next-token distribution in nats; carries no gradient


class _ChunkedHead(torch.autograd.Function):
    """log softmax(h W^T + b)[y], chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
        entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        count = hidden.shape[0]
        logprobs = torch.empty(count, dtype=torch.float32, device=hidden.device)
        normalisers = torch.empty_like(logprobs)
        entropies = torch.empty_like(logprobs) if entropy else None
        for start in range(0, count, chunk):
            part = slice(start, min(start + chunk, count))
            logits = torch.nn.functional.linear(hidden[part], weight, bias).float()
            normalisers[part] = torch.logsumexp(logits, dim=-1)
            picked = logits.gather(1, targets[part, None]).squeeze(1)
            logprobs[part] = picked - normalisers[part]
            if entropies is not None:
                probabilities = torch.exp(logits - normalisers[part, None])
                entropies[part] = normalisers[part] - torch.einsum("nv,nv->n", probabilities, logits)
        ctx.save_for_backward(hidden, targets, normalisers)
        # Not saved tensors: under ZeRO-3 the parameters are empty between forward and backward.
        ctx.weight, ctx.bias, ctx.chunk = weight, bias, chunk
        if entropies is not None:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, targets, normalisers = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight: Tensor | None = None
        grad_bias: Tensor | None = None
        for start in range(0, hidden.shape[0], ctx.chunk):
            part = slice(start, min(start + ctx.chunk, hidden.shape[0]))
            logits = torch.nn.functional.linear(hidden[part], ctx.weight, ctx.bias).float()
            # d loss / d logits = g (onehot - p), in place: this is the largest tensor of the step
            slope = logits.sub_(normalisers[part, None]).exp_().mul_(-grad[part, None])
            slope.scatter_add_(1, targets[part, None], grad[part, None])
            lean = slope.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(lean, ctx.weight, out=grad_hidden[part])
            if need_weight:
                share = lean.t() @ hidden[part]
                grad_weight = share.float() if grad_weight is None else grad_weight.add_(share)
            if need_bias:
                total = slope.sum(0)
                grad_bias = total if grad_bias is None else grad_bias.add_(total)
        if grad_weight is not None:
            grad_weight = grad_weight.to(ctx.weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(ctx.bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    chunk: int,
    entropy: bool = False,
) -> TokenLogProbs:
    """log softmax of the head at `targets`: hidden [N, D], weight [V, D], targets [N]."""
    assert hidden.ndim == 2 and targets.shape == hidden.shape[:1], (hidden.shape, targets.shape)
    return TokenLogProbs(*_ChunkedHead.apply(hidden, weight, bias, targets, chunk, entropy))


def per_response(values: Tensor, lengths: Tensor) -> Tensor:
    """[K] sum of the values [N] over each response's tokens."""
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)
