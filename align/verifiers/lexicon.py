"""Verifiers that look words up: sentiment by a list of valences, and the share of real words."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Self

from align.verifiers.base import Abstain, Item, PerItem
from align.verifiers.spec import LexiconSpec, VocabularySpec
from align.verifiers.text import words
from align.verifiers.wordlists import read_valences, read_vocabulary


class Lexicon(PerItem):
    """Mean valence per word: the sum of the list's values over the response's words, divided by all its words.

    Words that are not on the list count 0; negation and emphasis are not looked at.
    """

    kind = "score"

    def __init__(self, name: str, valences: Mapping[str, float]) -> None:
        super().__init__(name)
        self._valences = valences

    @classmethod
    def from_spec(cls, spec: LexiconSpec) -> Self:
        if spec.negative_file is None:
            return cls(spec.name, read_valences(spec.file).values)
        valences = dict.fromkeys(read_valences(spec.file).values, 1.0)
        for word in read_valences(spec.negative_file).values:
            valences[word] = valences.get(word, 0.0) - 1.0  # a word on both lists says nothing
        return cls(spec.name, valences)

    def value(self, item: Item) -> float:
        """In the list's own unit; abstains on a response without words."""
        found = _words_of(item)
        return sum(self._valences.get(word, 0.0) for word in found) / len(found)


class Vocabulary(PerItem):
    """Share of words that stand in the dictionary, in [0, 1]; "dog's" is known where "dog" is."""

    kind = "score"

    def __init__(self, name: str, known: Set[str]) -> None:
        super().__init__(name)
        self._known = known

    @classmethod
    def from_spec(cls, spec: VocabularySpec) -> Self:
        return cls(spec.name, read_vocabulary(spec.file).words)

    def value(self, item: Item) -> float:
        """Abstains on a response without words."""
        found = _words_of(item)
        known = sum(word in self._known or word.removesuffix("'s") in self._known for word in found)
        return known / len(found)


def _words_of(item: Item) -> tuple[str, ...]:
    found = words(item.response)
    if not found:
        raise Abstain("no words in the response")
    return found
