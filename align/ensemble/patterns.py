"""Vote patterns: what an EM over many channels has to know of a table, and no more.

The channels are put into blocks with few enough joint patterns that each block's pattern is one number.  Then a pass
over the samples reads one number per block instead of one per channel: thirty voters that may abstain are five blocks.
Where few distinct rows occur, each is kept once with its count.  The answers are those of a pass over every vote.

Legend: N samples, U distinct rows (or N), C channels, B blocks, L levels of all channels together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCK_PATTERNS = 4096  # joint patterns of a block at most; its tables then stay in the processor's cache
SAMPLE_ROWS = 50_000  # rows looked at to see whether distinct rows are few


@dataclass(frozen=True, slots=True)
class Block:
    """Neighbouring channels as one.

    Example: two voters of whom the second abstained: Block(slots=np.array([[0, 0, 0, 1, …], [4, 2, 3, 4, …]]), first=0)
    """

    slots: np.ndarray  # [channels, patterns] slot of the channel's level; L where it is silent
    first: int  # index of its first channel


@dataclass(frozen=True, slots=True)
class Patterns:
    """A table as pattern numbers.

    Example: patterns([np.array([0, 1, 1])], [2]) has one block of three patterns and two distinct rows.
    """

    codes: tuple[np.ndarray, ...]  # [B] of [U] int64: pattern of the block in each row
    blocks: tuple[Block, ...]  # [B]
    counts: np.ndarray  # [U] how many samples have this row
    inverse: np.ndarray | None  # [N] row of each sample; none: sample i is row i
    levels: int  # L

    def votes(self, weight: np.ndarray) -> np.ndarray:
        """[L]: sum over rows of weight [U] x count, by level."""
        total = np.zeros(self.levels + 1)
        for code, block in zip(self.codes, self.blocks, strict=True):
            by_pattern = np.bincount(code, weight * self.counts, block.slots.shape[1])
            for slots in block.slots:
                total += np.bincount(slots, by_pattern, self.levels + 1)
        return total[:-1]

    def sums(self, per_level: np.ndarray) -> np.ndarray:
        """[U]: sum over channels of the value [L] of the row's level; a silent channel adds nothing."""
        padded = np.append(per_level, 0.0)
        found = np.zeros(len(self.counts))
        for code, block in zip(self.codes, self.blocks, strict=True):
            found += padded[block.slots].sum(axis=0)[code]
        return found

    def rows(self, samples: np.ndarray) -> np.ndarray:
        """[N] -> [U]: the mean over the samples of each row."""
        if self.inverse is None:
            return samples
        return np.bincount(self.inverse, samples, len(self.counts)) / self.counts

    def samples(self, rows: np.ndarray) -> np.ndarray:
        """[U] -> [N]."""
        return rows if self.inverse is None else rows[self.inverse]


def patterns(codes: Sequence[np.ndarray], sizes: Sequence[int], marks: np.ndarray | None = None) -> Patterns:
    """The patterns of channel codes [C] of [N] (-1 silent), of which channel c has sizes[c] levels.

    Rows with different `marks` [N] are never counted as one; that keeps labelled samples apart.
    """
    if not len(sizes):
        raise ValueError("no channel to make patterns of")
    blocks = make_blocks(sizes)
    joint = [pattern_numbers(codes, sizes, block) for block in blocks]
    inverse, counts = _distinct(joint, blocks, marks)
    if inverse is None:
        return Patterns(tuple(joint), tuple(blocks), np.ones(len(codes[0])), None, sum(sizes))
    first = np.empty(len(counts), dtype=np.int64)
    first[inverse[::-1]] = np.arange(len(inverse))[::-1]
    return Patterns(tuple(j[first] for j in joint), tuple(blocks), counts.astype(float), inverse, sum(sizes))


def pattern_numbers(codes: Sequence[np.ndarray], sizes: Sequence[int], block: Block) -> np.ndarray:
    """[N]: the number of the pattern of the block's channels, from all channels' codes."""
    number = np.zeros(len(codes[0]), dtype=np.int64)
    for c in range(block.first, block.first + len(block.slots)):
        number *= sizes[c] + 1
        number += codes[c]
        number += 1
    return number


def make_blocks(sizes: Sequence[int]) -> list[Block]:
    """Channels in order, a new block where the joint patterns would be too many."""
    offsets = np.cumsum([0, *sizes])
    blocks, start = [], 0
    while start < len(sizes):
        end, count = start + 1, sizes[start] + 1
        while end < len(sizes) and count * (sizes[end] + 1) <= BLOCK_PATTERNS:
            count, end = count * (sizes[end] + 1), end + 1
        numbers, slots = np.arange(count), []
        for c in reversed(range(start, end)):
            level = numbers % (sizes[c] + 1) - 1
            slots.append(np.where(level < 0, offsets[-1], level + offsets[c]))
            numbers = numbers // (sizes[c] + 1)
        blocks.append(Block(np.array(slots[::-1]), start))
        start = end
    return blocks


def _distinct(
    joint: Sequence[np.ndarray], blocks: Sequence[Block], marks: np.ndarray | None
) -> tuple[np.ndarray | None, np.ndarray]:
    """Row of each sample and samples of each row; none where most rows occur once, as counting would not pay."""
    columns = [*joint] if marks is None else [*joint, marks]
    sizes = [b.slots.shape[1] for b in blocks] + ([] if marks is None else [int(marks.max(initial=0)) + 1])
    if np.log2(np.array(sizes, dtype=float)).sum() >= 62:
        if len(joint[0]) > SAMPLE_ROWS:
            return None, np.empty(0)
        _, inverse, counts = np.unique(np.column_stack(columns), axis=0, return_inverse=True, return_counts=True)
        return inverse.ravel(), counts
    key = np.zeros(len(joint[0]), dtype=np.int64)
    for column, size in zip(columns, sizes, strict=True):
        key *= size
        key += column
    sample = key[:: max(1, len(key) // SAMPLE_ROWS)]
    if len(key) > SAMPLE_ROWS and len(np.unique(sample)) > len(sample) / 2:
        return None, np.empty(0)
    _, inverse, counts = np.unique(key, return_inverse=True, return_counts=True)
    return inverse, counts
