"""Log-probabilities of response tokens without the [tokens, vocabulary] matrix of logits.

Only the hidden states in front of response tokens go through the output head, a chunk at a time, in float32
where it matters.  The backward pass computes the logits again, unless all of them fit into one chunk: then they are
kept, for they would all be there at once in any case.  With z = h W^T + b and p = softmax(z):
d log p_y / d z = onehot(y) - p, so the gradients are g (W_y - p W), (onehot(y) - p)^T (g h) and sum g (onehot(y) - p).

Legend: N response tokens, D width, V vocabulary, C tokens of a chunk, K responses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CACHED_LOGITS = 2**20  # float32 numbers; 4 MiB


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
        keep = count <= chunk and any(ctx.needs_input_grad[:3])
        logprobs = torch.empty(count, dtype=torch.float32, device=hidden.device)
        normalisers, totals = torch.empty_like(logprobs), torch.empty_like(logprobs)
        entropies = torch.empty_like(logprobs) if entropy else None
        ctx.parts = _parts(count, chunk, weight)
        ctx.kept = []
        for part in ctx.parts:
            logits = torch.nn.functional.linear(hidden[part], weight, bias).float()
            picked = logits.gather(1, targets[part, None]).squeeze(1)
            largest = logits.amax(dim=-1)
            powers = logits.sub_(largest[:, None]).exp_()  # in place: the logits are the largest tensor of the step
            totals[part] = powers.sum(dim=-1)
            normalisers[part] = largest + totals[part].log()
            logprobs[part] = picked - normalisers[part]
            if entropies is not None:
                entropies[part] = torch.special.entr(powers / totals[part, None]).sum(dim=-1)
            if keep:
                ctx.kept.append(powers)
        ctx.save_for_backward(hidden, targets, normalisers, totals)
        # Not saved tensors: under ZeRO-3 the parameters are empty between forward and backward.
        ctx.weight, ctx.bias = weight, bias
        if entropies is not None:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, targets, normalisers, totals = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight: Tensor | None = None
        grad_bias: Tensor | None = None
        kept, ctx.kept = ctx.kept, []  # used up in place; a second backward computes them again
        for index, part in enumerate(ctx.parts):
            if kept:
                slope = kept[index].mul_(-(grad[part] / totals[part])[:, None])
            else:
                logits = torch.nn.functional.linear(hidden[part], ctx.weight, ctx.bias).float()
                slope = logits.sub_(normalisers[part, None]).exp_().mul_(-grad[part, None])
            slope.scatter_add_(1, targets[part, None], grad[part, None])  # d loss / d logits = g (onehot - p)
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


def _parts(count: int, chunk: int, weight: Tensor) -> list[slice]:
    """The N tokens in chunks; on a CPU in parts small enough that a part's logits stay in the cache."""
    if weight.device.type == "cpu":
        chunk = min(chunk, max(64, CACHED_LOGITS // weight.shape[0]))
    return [slice(start, min(start + chunk, count)) for start in range(0, count, chunk)]


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
