"""Scored responses as the units of trainers that learn from scores: prompt by prompt, in a seeded order."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from align.records import Sample, Score
from align.training.packing import Group, PackedBatch
from align.training.steps import Unit
from align.training.trainers import RoundData

Row = TypeVar("Row")
Piece = TypeVar("Piece")


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """A response and what the verifiers together say of it."""

    sample: Sample
    score: Score


def scored_groups(data: RoundData) -> dict[str, list[ScoredRow]]:
    """The scored responses of each prompt, in the order of their ids; prompts without one are left out.

    The order does not depend on that of the scores.  A response without a token has nothing to learn from.
    """
    groups: dict[str, list[ScoredRow]] = {}
    for score in sorted(data.scores, key=lambda s: (s.prompt_id, s.sample_id)):
        sample = data.samples[score.sample_id]
        if sample.response_ids:
            groups.setdefault(score.prompt_id, []).append(ScoredRow(sample, score))
    return groups


def make_steps(
    groups: Mapping[str, Sequence[Row]],
    prompts_per_step: int,
    seed: str,
    to_units: Callable[[Sequence[Row]], Sequence[Piece]],
) -> list[list[Piece]]:
    """The groups in a seeded order, cut into steps of whole prompts; `to_units` lays one prompt's rows out."""
    prompts = sorted(groups)
    random.Random(seed).shuffle(prompts)
    units = [to_units(groups[prompt]) for prompt in prompts]
    return [
        [unit for of_prompt in units[i : i + prompts_per_step] for unit in of_prompt]
        for i in range(0, len(units), prompts_per_step)
    ]


def whole_unit(rows: Sequence[Row], sample: Callable[[Row], Sample]) -> list[Unit]:
    """One unit for all the rows, for a loss that couples the responses of a prompt."""
    samples = [sample(row) for row in rows]
    return [Unit(Group(tuple(samples[0].prompt_ids), tuple(tuple(s.response_ids) for s in samples)), tuple(rows))]


def split_units(rows: Sequence[Row], sample: Callable[[Row], Sample], token_budget: int) -> list[Unit]:
    """As few units as the token budget allows, for a loss that looks at one response at a time."""
    parts: list[list[Row]] = []
    used = 0
    for row in rows:
        size = len(sample(row).response_ids)
        if not parts or used + size > token_budget:
            parts.append([])
            used = len(sample(row).prompt_ids)
        parts[-1].append(row)
        used += size
    return [unit for part in parts for unit in whole_unit(part, sample)]


def rows_of(batch: PackedBatch, units: Sequence[Unit[Row]]) -> list[Row]:
    """[K] the row of each of the batch's responses."""
    return [units[unit].rows[response] for unit, response in batch.members]


def per_token(values: Tensor, lengths: Tensor, tokens: int) -> Tensor:
    """[N] each response's value [K] at every one of its tokens; their number is told, so that no device is asked."""
    return torch.repeat_interleave(values, lengths, output_size=tokens)
