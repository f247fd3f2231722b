"""Masked thought: part of a response is hidden from the policy that learns to write it (arXiv 2403.02178).

Each response token, as an input, is replaced by a mask token with probability p; what is to be predicted stays.  The
policy then has to lean on the prompt and on what is left of the response.

Legend: N response tokens of a batch, R rows, S positions of a row.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from align.records import content_id
from align.training.control import mask_id
from align.training.packing import PackedBatch

if TYPE_CHECKING:
    from align.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Masking:
    """How much is hidden, and behind what.

    Example: Masking(token=0, rate=0.2, warmup_steps=100, seed="0/2/0", step=50) hides a tenth.
    """

    token: int
    rate: float
    warmup_steps: int
    seed: str = ""
    step: int = 0  # optimizer steps so far, over the whole run

    @property
    def current_rate(self) -> float:
        """The rate now: it rises in a straight line over the warm-up."""
        return self.rate * min(1.0, self.step / self.warmup_steps if self.warmup_steps else 1.0)

    def hide(self, batch: PackedBatch, names: Sequence[str]) -> PackedBatch:
        """The batch with hidden inputs; names[k] seeds response k, so neither ranks nor batches change the draw.

        The input of response token t lies where token t + 1 is read from; the last token is nobody's input.
        """
        hidden: list[int] = []
        start = 0
        for name, length in zip(names, batch.lengths.tolist(), strict=True):
            draw = random.Random(content_id("mask", self.seed, name))
            hidden += [start + t for t in range(1, length) if draw.random() < self.current_rate]
            start += length
        ids = batch.input_ids.clone()
        ids.view(-1)[batch.read_from[torch.tensor(hidden, dtype=torch.int64)]] = self.token
        return replace(batch, input_ids=ids)


def masking_of(recipe: Recipe, tokenizer: Any) -> Masking:
    """The recipe's masking."""
    settings = recipe.training.supervised
    token = mask_id(recipe, tokenizer)
    assert token is not None
    return Masking(token, settings.mask_rate, settings.mask_warmup_steps)
