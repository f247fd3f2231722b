"""Who beats whom among a prompt's responses: a judge asked about every two of them, in both orders.

A judge that prefers what it reads first would otherwise be believed; `advantages.from_preferences` takes the half
difference of the two answers, in which such a liking cancels.

Legend: G responses of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Protocol

import numpy as np

Array = np.ndarray


class Judge(Protocol):
    """Compares two responses to one prompt, named by their sample ids."""

    def prefer(self, questions: Sequence[tuple[str, str]]) -> list[float | None]:
        """Per question how much better the first is than the second, -1 to 1; None where no answer could be read."""


@dataclass(frozen=True)
class ByChance:
    """The judge where no other is there: P(first good, second not) - P(second good, first not) = p - q.

    It has no liking for an order, and with it pairwise GRPO is GRPO on P(good).
    """

    chances: Mapping[str, float]  # P(good) by sample id

    def prefer(self, questions: Sequence[tuple[str, str]]) -> list[float | None]:
        """p - q, with independent P(good)."""
        return [self.chances[first] - self.chances[second] for first, second in questions]


def preference_matrices(judge: Judge, groups: Mapping[str, Sequence[str]]) -> tuple[dict[str, Array], int]:
    """By prompt [G, G]: D_ij the answer with i first, NaN where none could be read; and how many could not.

    The diagonal is 0.
    """
    questions = [pair for ids in groups.values() for pair in permutations(ids, 2)]
    answers = dict(zip(questions, judge.prefer(questions), strict=True))
    found = {}
    for prompt, ids in groups.items():
        matrix = np.zeros((len(ids), len(ids)))
        for i, j in permutations(range(len(ids)), 2):
            answer = answers[ids[i], ids[j]]
            matrix[i, j] = np.nan if answer is None else answer
        found[prompt] = matrix
    return found, sum(answer is None for answer in answers.values())
