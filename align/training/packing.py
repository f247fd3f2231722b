"""Whole prompt groups packed into rows: `[prompt][response 1]…[response G]`, so that a prompt is computed once.

Every response continues the positions of its prompt and sees the prompt and itself only; groups that share a
row never see each other.  Response token t is predicted by the hidden state one step before it, and for the
first token of every response that is the prompt's last hidden state, which all G responses share.

Prefix sharing for preference training: Wang and Hegde, arXiv 2410.20305.

Legend: R rows, S positions of a row, K responses of a batch, N response tokens of a batch, M positions that the
head reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

PADDING = -1  # group number of a position that belongs to no group


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt and some of its responses.

    Example: Group(prompt=(4, 5, 15), responses=((8, 1), (9, 9, 1)))
    """

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError(
                "a group needs a prompt of at least one token: the first response token is read from its end"
            )
        if not self.responses or not all(self.responses):
            raise ValueError("a group needs at least one response, and no response may be empty")

    @property
    def tokens(self) -> int:
        return len(self.prompt) + sum(len(r) for r in self.responses)


@dataclass(frozen=True)
class PackedBatch:
    """Rows of packed groups, and where the response tokens are to be found in them.

    Example: the group ((4, 5, 15); (8, 1), (9, 9, 1)) alone in a row of 8:
      input_ids    4 5 15 8 1 9 9 1      read_from  2 3 2 5 6   (position before each response token)
      position_ids 0 1 2  3 4 3 4 5      targets    8 1 9 9 1
      response_of  0 0 0  1 1 2 2 2      lengths    2 3         members ((0, 0), (0, 1))
      read_at      2 3 5 6               read_row   0 1 0 2 3   (each position once, and where it stands in read_at)
    """

    input_ids: Tensor  # [R, S]
    position_ids: Tensor  # [R, S]
    group_of: Tensor  # [R, S] number of the group within its row, PADDING outside
    response_of: Tensor  # [R, S] 0 in a prompt, 1 … G in its responses
    read_from: Tensor  # [N] index into the R*S positions
    read_at: Tensor  # [M] the positions in read_from, ascending, each once
    read_row: Tensor  # [N] index into read_at
    targets: Tensor  # [N] the response tokens, response after response
    lengths: Tensor  # [K] tokens of each response; sums to N
    members: tuple[tuple[int, int], ...]  # [K] (index of the group among those packed, index of the response)
    tokens: int  # positions that are not padding

    def to(self, device: torch.device | str) -> PackedBatch:
        """On the device; to a GPU from pinned memory, so that the host does not wait for what was asked before."""
        pin = torch.device(device).type == "cuda"
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}
        moved: dict[str, Any] = {
            k: v.pin_memory().to(device, non_blocking=True) if pin and not v.is_cuda else v.to(device)
            for k, v in tensors.items()
        }
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class Plan:
    """Which groups share which rows of one batch."""

    rows: tuple[tuple[int, ...], ...]  # [R] indices of groups
    width: int  # S


def plan_batches(groups: Sequence[Group], token_budget: int, multiple: int = 1) -> list[Plan]:
    """Split the groups into batches of at most `token_budget` positions, padding included, longest group first.

    A row is as long as the longest group of its batch, rounded up to `multiple`; shorter groups share rows.  A
    group that alone exceeds the budget gets a batch of its own: it is never cut, so the budget cannot change a loss.
    """
    waiting = sorted(range(len(groups)), key=lambda i: -groups[i].tokens)
    plans: list[Plan] = []
    while waiting:
        width = -(-groups[waiting[0]].tokens // multiple) * multiple
        rows, waiting = _fill_rows(groups, waiting, width, max(1, token_budget // width))
        plans.append(Plan(tuple(tuple(row) for row in rows), width))
    return plans


def pack(groups: Sequence[Group], token_budget: int, multiple: int = 1) -> list[PackedBatch]:
    """The batches of `plan_batches`, as tensors."""
    return [lay_out(groups, plan) for plan in plan_batches(groups, token_budget, multiple)]


def _fill_rows(
    groups: Sequence[Group], waiting: Sequence[int], width: int, row_limit: int
) -> tuple[list[list[int]], list[int]]:
    """First fit, longest first, into at most `row_limit` rows; returns the rows and what did not fit."""
    rows: list[list[int]] = []
    room: list[int] = []
    left: list[int] = []
    first_open = 0  # rows before this one are full
    for index in waiting:
        size = groups[index].tokens
        row = next((r for r in range(first_open, len(rows)) if room[r] >= size), None)
        if row is None and len(rows) < row_limit:
            rows.append([])
            room.append(width)
            row = len(rows) - 1
        if row is None:
            left.append(index)
            continue
        rows[row].append(index)
        room[row] -= size
        while first_open < len(rows) and room[first_open] < 2:
            first_open += 1
    return rows, left


def lay_out(groups: Sequence[Group], plan: Plan) -> PackedBatch:
    """Write one batch's groups into tensors."""
    read_from: list[int] = []
    targets: list[int] = []
    lengths: list[int] = []
    members: list[tuple[int, int]] = []
    shape = (len(plan.rows), plan.width)
    ids, positions, response_of = torch.zeros((3, *shape), dtype=torch.int64)
    group_of = torch.full(shape, PADDING)
    for row_number, row in enumerate(plan.rows):
        row_ids: list[int] = []
        row_positions: list[int] = []
        row_groups: list[int] = []
        row_responses: list[int] = []
        for number, index in enumerate(row):
            prompt, responses = groups[index].prompt, groups[index].responses
            row_start = row_number * plan.width
            last_of_prompt = row_start + len(row_ids) + len(prompt) - 1
            row_ids.extend(prompt)
            row_positions.extend(range(len(prompt)))
            row_responses.extend([0] * len(prompt))
            for r, response in enumerate(responses):
                start = row_start + len(row_ids)
                read_from.append(last_of_prompt)
                read_from.extend(range(start, start + len(response) - 1))
                targets.extend(response)
                lengths.append(len(response))
                members.append((index, r))
                row_ids.extend(response)
                row_positions.extend(range(len(prompt), len(prompt) + len(response)))
                row_responses.extend([r + 1] * len(response))
            row_groups.extend([number] * groups[index].tokens)
        used = len(row_ids)
        ids[row_number, :used] = torch.tensor(row_ids)
        positions[row_number, :used] = torch.tensor(row_positions)
        group_of[row_number, :used] = torch.tensor(row_groups)
        response_of[row_number, :used] = torch.tensor(row_responses)
    read_at, read_row = torch.unique(torch.tensor(read_from), return_inverse=True)
    return PackedBatch(
        input_ids=ids,
        position_ids=positions,
        group_of=group_of,
        response_of=response_of,
        read_from=torch.tensor(read_from),
        read_at=read_at,
        read_row=read_row,
        targets=torch.tensor(targets),
        lengths=torch.tensor(lengths),
        members=tuple(members),
        tokens=sum(groups[i].tokens for row in plan.rows for i in row),
    )
