"""Verifiers of a response's outer form: a pattern, its length, its repetitions."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Self

from align.verifiers.base import Abstain, Item, PerItem
from align.verifiers.spec import FormatSpec, LengthSpec, RepetitionSpec, compile_pattern
from align.verifiers.text import terms


class Format(PerItem):
    """1 where the pattern matches the response (`whole`: from first to last character; `.` is newlines too)."""

    kind = "binary"

    def __init__(self, name: str, pattern: re.Pattern[str], where: str) -> None:
        super().__init__(name)
        self._match = pattern.fullmatch if where == "whole" else pattern.search

    @classmethod
    def from_spec(cls, spec: FormatSpec) -> Self:
        return cls(spec.name, compile_pattern(spec.pattern), spec.where)

    def value(self, item: Item) -> float:
        """0.0 or 1.0."""
        return float(self._match(item.response) is not None)


class Length(PerItem):
    """1 where the length lies between the bounds, both included."""

    kind = "binary"

    def __init__(self, name: str, unit: str, minimum: int, maximum: int | None) -> None:
        super().__init__(name)
        self._measure = MEASURES[unit]
        self._minimum, self._maximum = minimum, maximum

    @classmethod
    def from_spec(cls, spec: LengthSpec) -> Self:
        return cls(spec.name, spec.unit, spec.minimum, spec.maximum)

    def value(self, item: Item) -> float:
        """0.0 or 1.0."""
        length = self._measure(item)
        return float(length >= self._minimum and (self._maximum is None or length <= self._maximum))


MEASURES: dict[str, Callable[[Item], int]] = {
    "tokens": lambda item: item.response_tokens,
    "words": lambda item: len(terms(item.response)),
    "characters": lambda item: len(item.response),
}


class Repetition(PerItem):
    """Share of n-grams of words and numbers that did not occur before in the response: distinct / all, 1 is best."""

    kind = "score"

    def __init__(self, name: str, n: int) -> None:
        super().__init__(name)
        self._n = n

    @classmethod
    def from_spec(cls, spec: RepetitionSpec) -> Self:
        return cls(spec.name, spec.n)

    def value(self, item: Item) -> float:
        """In (0, 1]; abstains on a response of fewer than n words."""
        found = terms(item.response)
        count = len(found) - self._n + 1
        if count < 1:
            raise Abstain(f"fewer than {self._n} words")
        return len(set(zip(*(found[i:] for i in range(self._n)), strict=False))) / count
