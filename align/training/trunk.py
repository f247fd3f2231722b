"""The layers below a head, computed only where the head reads them.

A head reads the last hidden state in front of every response token, and nowhere else.  Other positions matter to the
last layer through their keys and values alone, so there it computes queries, the output projection and the MLP at
the positions that are read: the prompt but for its last token, the last token of a response and padding are left out.
The numbers at the positions that are read are the same.

Legend: R rows, S positions of a row, C columns with a query in the last layer, M positions that are read, N response
tokens, D width, d width of an attention head.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from align.training import attention
from align.training.packing import PackedBatch

PLAIN_LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
"""Layers that are x + attention(norm(x)), then x + mlp(norm(x)), with rotary positions.  Others compute everything."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Where the last hidden state is read."""

    places: Tensor  # [M] ascending, among the R * S positions
    columns: Tensor | None  # [C] positions of a row that have a query; None: all of them
    among_columns: Tensor  # [M] the same places among the R * C queries
    mask: Any  # the packed mask of these queries


def states(backbone: Any, batch: PackedBatch) -> Tensor:
    """[N, D] the last hidden state in front of every response token."""
    mask = attention.build_mask(batch, backbone.dtype)
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "packed_mask": mask}
    if not _trim_last_layer(backbone):
        hidden = backbone(**inputs, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, batch.read_from)
    hidden = backbone(**inputs, use_cache=False, reading=_reading(batch, mask)).last_hidden_state  # [M, D]
    return hidden.index_select(0, batch.read_row)


def _trim_last_layer(backbone: Any) -> bool:
    """Make the last layer obey `reading`; False where its kind is not known."""
    layers = getattr(backbone, "layers", None)
    if not layers or type(layers[-1]).__name__ not in PLAIN_LAYERS:
        return False
    if "forward" not in vars(layers[-1]):
        layers[-1].forward = MethodType(_last_layer, layers[-1])
    return True


def _reading(batch: PackedBatch, mask: Any) -> Reading:
    if not isinstance(mask, list):  # FlexAttention skips blocks by itself; the rest of the layer is left out here
        return Reading(batch.read_at, None, batch.read_at, mask)
    rows, width = batch.input_ids.shape
    read = torch.zeros(rows * width, dtype=torch.bool).index_fill_(0, batch.read_at, True).view(rows, width).any(0)
    wanted = [block for block in mask if read[block.queries].any()]
    columns = torch.cat([torch.arange(block.queries.start, block.queries.stop) for block in wanted])
    place = torch.zeros(width, dtype=torch.int64).index_copy_(0, columns, torch.arange(len(columns)))
    among = (batch.read_at // width) * len(columns) + place[batch.read_at % width]
    blocks, start = [], 0
    for block in wanted:
        end = start + block.queries.stop - block.queries.start
        blocks.append(attention.Block(slice(start, end), block.keys, block.mask))
        start = end
    return Reading(batch.read_at, columns, among, blocks)


def _last_layer(
    layer: Any,
    hidden_states: Tensor,
    *args: Any,
    reading: Reading | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """[M, D] of the positions that are read, or what the layer's own forward gives where nothing says which."""
    if reading is None:
        kwargs["position_embeddings"] = position_embeddings
        return type(layer).forward(layer, hidden_states, *args, **kwargs)
    assert position_embeddings is not None
    normed = layer.input_layernorm(hidden_states)  # [R, S, D]
    heads = _attend(layer.self_attn, normed, position_embeddings, reading)
    rows = hidden_states.flatten(0, 1).index_select(0, reading.places)
    rows = rows + layer.self_attn.o_proj(heads.index_select(0, reading.among_columns))
    return rows + layer.mlp(layer.post_attention_layernorm(rows))


def _attend(module: Any, normed: Tensor, embeddings: tuple[Tensor, Tensor], reading: Reading) -> Tensor:
    """[R * C, heads * d] attention of the queries that are wanted, before the output projection."""
    cos, sin = (e.unsqueeze(1) for e in embeddings)  # [R or 1, 1, S, d]

    def heads(projection: Any, norm: str, of: Tensor) -> Tensor:
        split = projection(of).unflatten(-1, (-1, module.head_dim))
        return getattr(module, norm, _same)(split).transpose(1, 2)  # [R, heads, S or C, d]

    asking, own_cos, own_sin = normed, cos, sin
    if reading.columns is not None:
        asking = normed.index_select(1, reading.columns)
        own_cos, own_sin = (e.index_select(2, reading.columns) for e in (cos, sin))
    query = _rotate(heads(module.q_proj, "q_norm", asking), own_cos, own_sin)
    key = _rotate(heads(module.k_proj, "k_norm", normed), cos, sin)
    value = heads(module.v_proj, "", normed)
    found, _ = attention.packed_attention(
        module, query, key, value, None, scaling=module.scaling, packed_mask=reading.mask
    )
    return found.flatten(2).flatten(0, 1)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: the two halves of a head are the two coordinates that are turned."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


def _same(heads: Tensor) -> Tensor:
    return heads
