"""Who beats whom among a prompt's responses, as matrices: from a judge's committed answers, or from P(good).

Legend: G responses of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Protocol

import numpy as np

from align.records import Comparison

Array = np.ndarray


class Judge(Protocol):
    """Compares two responses to one prompt, named by their sample ids."""

    def prefer(self, first: str, second: str) -> float | None:
        """How much better the first is than the second, -1 to 1; None where no answer could be read."""


@dataclass(frozen=True)
class ByChance:
    """The judge where no other is there: P(first good, second not) - P(second good, first not) = p - q.

    It has no liking for an order, and with it pairwise GRPO is GRPO on P(good).
    """

    chances: Mapping[str, float]  # P(good) by sample id

    def prefer(self, first: str, second: str) -> float | None:
        """p - q, with independent P(good)."""
        return self.chances[first] - self.chances[second]


@dataclass(frozen=True)
class Answers:
    """A judge's answers of a round, as the store keeps them."""

    strengths: Mapping[tuple[str, str], float]  # those that could be read
    unread: int

    @staticmethod
    def of(rows: Iterable[Comparison]) -> Answers:
        """From the committed rows."""
        every = {(row.first_id, row.second_id): row.strength for row in rows}
        read = {pair: strength for pair, strength in every.items() if strength is not None}
        return Answers(read, len(every) - len(read))

    def prefer(self, first: str, second: str) -> float | None:
        """What the judge said when `first` came first."""
        return self.strengths.get((first, second))

    def both_ways(self, one: str, other: str) -> float | None:
        """Half the difference of the two orders; None where one of them has no answer."""
        there, back = self.prefer(one, other), self.prefer(other, one)
        return None if there is None or back is None else (there - back) / 2.0


def preference_matrix(judge: Judge, ids: Sequence[str]) -> Array:
    """[G, G] D_ij the answer with i first, NaN where none could be read; the diagonal is 0."""
    matrix = np.zeros((len(ids), len(ids)))
    for i, j in permutations(range(len(ids)), 2):
        answer = judge.prefer(ids[i], ids[j])
        matrix[i, j] = np.nan if answer is None else answer
    return matrix
