"""How easy an English text reads, larger is easier."""

from __future__ import annotations

from collections.abc import Set
from functools import lru_cache, partial
from typing import Self

from align.verifiers.base import Abstain, Item, PerItem
from align.verifiers.spec import ReadabilitySpec
from align.verifiers.text import count_sentences, count_syllables, words
from align.verifiers.wordlists import read_vocabulary

_ENDINGS = ("'s", "s", "es", "ed", "er", "est", "ing")
_Y_ENDINGS = ("ies", "ied", "ier", "iest")


class Readability(PerItem):
    """One of three measures of the response; W words, S sentences.

    flesch           206.835 - 1.015 W/S - 84.6 syllables/W (Flesch 1948); a syllable as in `count_syllables`
    dale_chall       -(0.1579 H + 0.0496 W/S, and 3.6365 more where H > 5), H the percentage of words that are not easy
                     (Dale and Chall 1948)
    sentence_length  -W/S
    """

    kind = "score"

    def __init__(self, name: str, formula: str, easy: Set[str] = frozenset()) -> None:
        super().__init__(name)
        self._formula = formula
        self._is_easy = lru_cache(maxsize=65536)(partial(is_easy, easy=easy))

    @classmethod
    def from_spec(cls, spec: ReadabilitySpec) -> Self:
        easy = read_vocabulary(spec.file).words if spec.file is not None else frozenset()
        return cls(spec.name, spec.formula, easy)

    def value(self, item: Item) -> float:
        """Abstains on a response without words."""
        found = words(item.response)
        if not found:
            raise Abstain("no words in the response")
        per_sentence = len(found) / max(count_sentences(item.response), 1)
        if self._formula == "sentence_length":
            return -per_sentence
        if self._formula == "flesch":
            syllables = sum(map(count_syllables, found))
            return 206.835 - 1.015 * per_sentence - 84.6 * syllables / len(found)
        hard = 100.0 * sum(not self._is_easy(word) for word in found) / len(found)
        return -(0.1579 * hard + 0.0496 * per_sentence + (3.6365 if hard > 5.0 else 0.0))


def is_easy(word: str, easy: Set[str]) -> bool:
    """On the list, or a regular form of a word that is: dogs, cries, cried, hoped, running, bigger, nicest.

    Dale and Chall count regular inflections as easy, and names too; a name cannot be told here and counts as hard.
    """
    if word in easy:
        return True
    if any(word.removesuffix(ending) + "y" in easy for ending in _Y_ENDINGS if word.endswith(ending)):
        return True
    for ending in _ENDINGS:
        stem = word.removesuffix(ending)
        undoubled = stem[:-1] if stem[-1:] == stem[-2:-1] else stem
        if stem != word and (stem in easy or stem + "e" in easy or undoubled in easy):
            return True
    return False
