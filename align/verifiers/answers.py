"""The final answer against the prompt's reference answer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Self

from align.verifiers.base import Abstain, Item, PerItem
from align.verifiers.extract import extract_answer
from align.verifiers.spec import AnswerSpec


class Answer(PerItem):
    """1 where the response's answer equals the reference, 0 where it differs or there is none.

    A response without an answer is wrong, not unjudged: it may not leave the average.  The reference is read the same
    way as the response, so a reference that is a whole worked solution will do; where nothing is found in it that way
    (a bare `1/2` under `extract: boxed`), all of it is the answer.
    """

    kind = "binary"

    def __init__(self, name: str, equal: Callable[[str, str], bool], how: str, pattern: str | None = None) -> None:
        super().__init__(name)
        self._equal, self._how, self._pattern = equal, how, pattern

    @classmethod
    def from_spec(cls, spec: AnswerSpec) -> Self:
        equal = _equal_text if spec.match == "exact" else math_equality(whole=spec.extract == "whole")
        return cls(spec.name, equal, spec.extract, spec.pattern)

    def value(self, item: Item) -> float:
        """0.0 or 1.0; abstains without a reference answer."""
        if item.answer is None or not item.answer.strip():
            raise Abstain("the prompt has no reference answer")
        reference = extract_answer(item.answer, self._how, self._pattern) or item.answer.strip()
        answer = extract_answer(item.response, self._how, self._pattern)
        return float(answer is not None and self._equal(reference, answer))


def _equal_text(reference: str, answer: str) -> bool:
    return reference == answer


def math_equality(whole: bool) -> Callable[[str, str], bool]:
    """Equality by math-verify, for a process that can be killed.

    math-verify stops itself with SIGALRM, which fails off the main thread and cannot interrupt one long operation on
    big integers; its time limits are off here and the verifier process' deadline stands instead.
    `whole`: the texts may hold more than the expression, and math-verify looks for it in them.
    """
    for library in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # it warns that its time limits are off
    import math_verify

    def parse(text: str) -> list[Any]:
        found: list[Any] = [] if whole else math_verify.parse(f"${text}$", parsing_timeout=None)
        return found or math_verify.parse(text, parsing_timeout=None)

    @lru_cache(maxsize=4096)
    def parse_reference(text: str) -> tuple[Any, ...]:
        return tuple(parse(text))

    def equal(reference: str, answer: str) -> bool:
        gold = parse_reference(reference)
        if not gold:
            raise Abstain("math-verify cannot read the reference answer")
        target = parse(answer)
        return bool(math_verify.verify(list(gold), target, timeout_seconds=None, raise_on_error=True))

    return equal
