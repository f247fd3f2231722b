"""Who may see whom in a packed row: one rule, written once, used as a dense mask on CPU and a block mask on GPU.

A query sees a key of its own group that does not come later and that lies in the prompt or in the query's own
response.  Padding sees itself only, so that no row of the softmax is empty.  The rule is handed to the model as
a ready four-dimensional mask, which transformers passes through untouched (`_preprocess_mask_arguments`).

Legend: R rows, S positions of a row, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from align.training.groups import PADDING, PackedBatch

ATTENTION = "align_packed"  # the name under which transformers finds `packed_attention`

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


def build_mask(batch: PackedBatch, dtype: torch.dtype) -> Any:
    """The mask for `packed_attention`: additive [R, 1, S, S] on CPU, made once for all layers; a BlockMask on GPU."""
    if batch.input_ids.device.type == "cuda":
        from torch.nn.attention.flex_attention import create_block_mask

        rows, width = batch.input_ids.shape
        return create_block_mask(visibility(batch), rows, None, width, width, device=str(batch.input_ids.device))
    return torch.zeros((), dtype=dtype).masked_fill(~dense_mask(batch), float("-inf"))


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' signature, [R, H, S, d] in and [R, S, H, d] out, without copying grouped key heads."""
    assert attention_mask is not None, "packed attention needs the mask of its rows"
    grouped = query.shape[1] != key.shape[1]
    if isinstance(attention_mask, Tensor):
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=grouped
        )
    else:
        out = _flex()(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


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
