"""Who may see whom in a packed row: one rule, written once, used as a dense mask on CPU and a block mask on GPU.

A query sees a key of its own group that does not come later and that lies in the prompt or in the query's own
response.  Padding sees itself only, so that no row of the softmax is empty.  The rule is handed to the model as
a ready four-dimensional mask, which transformers passes through untouched (`_preprocess_mask_arguments`).

Legend: R rows, S positions of a row, H heads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align.training.packing import PADDING, PackedBatch

ATTENTION = "align_packed"  # the name under which transformers finds `packed_attention`

LONGEST_BLOCK = 64  # queries computed together

_compiled_flex: Callable[..., Any] | None = None


def visibility(batch: PackedBatch) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The rule, in FlexAttention's form: (row, head, query, key) -> may the query see the key."""
    group_of, response_of = batch.group_of, batch.response_of

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_group = (group_of[row, query] == group_of[row, key]) & (group_of[row, key] != PADDING)
        key_response = response_of[row, key]
        readable = (key_response == 0) | (key_response == response_of[row, query])
        return (query == key) | ((query > key) & same_group & readable)

    return sees


def dense_mask(batch: PackedBatch) -> Tensor:
    """[R, 1, S, S] boolean, true where the query (dimension 2) sees the key (dimension 3)."""
    rows, width = batch.input_ids.shape
    device = batch.input_ids.device
    row = torch.arange(rows, device=device)[:, None, None]
    place = torch.arange(width, device=device)
    return visibility(batch)(row, torch.zeros_like(row), place[None, :, None], place[None, None, :])[:, None]


@dataclass(frozen=True, slots=True)
class Block:
    """Neighbouring queries that are computed together, and the key ranges that any of them sees in any row."""

    queries: slice
    keys: tuple[slice, ...]
    mask: Tensor  # [R, 1, queries, keys] additive


def cut_into_blocks(
    seen: Tensor, starts: Sequence[int], dtype: torch.dtype, longest: int = LONGEST_BLOCK
) -> list[Block]:
    """What of the mask `seen` [R, S, S] has to be computed at all, for a kernel that knows no sparse masks.

    Queries are cut at `starts`, the places where every row begins a new segment, and between them every `longest`.
    Keys that no query of a block sees in any row are left out: those that come later, and other responses where the
    rows agree on where these lie.
    """
    width = seen.shape[1]
    anywhere = seen.any(0)  # [S, S]
    nothing = torch.zeros((), dtype=dtype, device=seen.device)
    blocks = []
    for begin, end in itertools.pairwise([0, *starts, width]):
        for first in range(begin, end, longest):
            queries = slice(first, min(first + longest, end))
            keys = _ranges(anywhere[queries].any(0))
            mask = torch.cat([seen[:, None, queries, k] for k in keys], dim=-1)
            blocks.append(Block(queries, keys, nothing.masked_fill(~mask, float("-inf"))))
    return blocks


def _ranges(wanted: Tensor) -> tuple[slice, ...]:
    """The runs of true values."""
    places = wanted.nonzero().flatten().tolist()
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][1]:
            runs[-1][1] = place + 1
        else:
            runs.append([place, place + 1])
    return tuple(slice(a, b) for a, b in runs)


def common_starts(batch: PackedBatch) -> list[int]:
    """Positions where every row begins a prompt, a response or its padding."""
    segment = batch.group_of * (1 + int(batch.response_of.max())) + batch.response_of
    begins = (segment[:, 1:] != segment[:, :-1]).all(0)
    return (begins.nonzero().flatten() + 1).tolist()


def build_mask(batch: PackedBatch, dtype: torch.dtype) -> Any:
    """The rule made ready for `packed_attention`, once for all layers: Blocks on CPU, a BlockMask on GPU."""
    if batch.input_ids.device.type == "cuda":
        return flex_mask(batch)
    return cut_into_blocks(dense_mask(batch)[:, 0], common_starts(batch), dtype)


def flex_mask(batch: PackedBatch) -> Any:
    """The rule as FlexAttention's BlockMask."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, width = batch.input_ids.shape
    return create_block_mask(visibility(batch), rows, None, width, width, device=str(batch.input_ids.device))


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_mask: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' signature, [R, H, S, d] in and [R, S, H, d] out, without copying grouped key heads."""
    assert packed_mask is not None, "packed attention needs the mask of its rows"
    grouped = query.shape[1] != key.shape[1]
    if not isinstance(packed_mask, list):
        out = _flex()(query, key, value, block_mask=packed_mask, scale=scaling, enable_gqa=grouped)
        return out.transpose(1, 2).contiguous(), None
    assert dropout == 0.0, "packed attention has no dropout"
    return _BlockedAttention.apply(query, key, value, packed_mask, scaling).transpose(1, 2), None


class _BlockedAttention(torch.autograd.Function):
    """Flash attention on the CPU, one block after the other.

    ATen's kernel is called directly, because it computes masked scores like any other (a causal mask saves it
    nothing), and because autograd would write out a whole zero-filled gradient for every slice of the keys.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: list[Block], scaling: float | None
    ) -> Tensor:
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        sums = []
        for b in blocks:
            part, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, b.queries], _take(key, b.keys), _take(value, b.keys), attn_mask=b.mask, scale=scaling
            )
            out[:, :, b.queries] = part
            sums.append(log_sum)
        ctx.save_for_backward(query, key, value, out, *sums)
        ctx.blocks, ctx.scaling = blocks, scaling
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *sums = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        for b, log_sum in zip(ctx.blocks, sums, strict=True):
            of_query, of_key, of_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad[:, :, b.queries], query[:, :, b.queries], _take(key, b.keys), _take(value, b.keys),
                out[:, :, b.queries], log_sum, 0.0, False, attn_mask=b.mask, scale=ctx.scaling,
            )  # fmt: skip
            grad_query[:, :, b.queries] = of_query
            start = 0
            for keys in b.keys:
                end = start + keys.stop - keys.start
                grad_key[:, :, keys] += of_key[:, :, start:end]
                grad_value[:, :, keys] += of_value[:, :, start:end]
                start = end
        return grad_query, grad_key, grad_value, None, None


def _take(tensor: Tensor, ranges: tuple[slice, ...]) -> Tensor:
    """The keys of some ranges; a view where there is one range."""
    parts = [tensor[:, :, r] for r in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _flex() -> Callable[..., Any]:
    """FlexAttention, compiled once per process; uncompiled it would write out the whole score matrix."""
    global _compiled_flex
    if _compiled_flex is None:
        from torch.nn.attention.flex_attention import flex_attention

        _compiled_flex = torch.compile(flex_attention, dynamic=True)
    return _compiled_flex


def register() -> None:
    """Make `packed_attention` known to transformers; loading a model with `attn_implementation=ATTENTION` needs it."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, packed_attention)
