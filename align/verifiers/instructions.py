"""Instructions of the prompt that a program can check, as in IFEval (2311.07911)."""

from __future__ import annotations

import json
from typing import Any, Self

from align.verifiers.base import Abstain, Item, PerItem
from align.verifiers.instruction_checks import check_fault, passes
from align.verifiers.spec_checks import InstructionsSpec

LARGEST_COLUMN = 100_000  # characters


class Instructions(PerItem):
    """1 where the response follows every check of the recipe and of its prompt, 0 where it breaks one.

    An empty response follows none: "no commas" would otherwise be won by silence.
    """

    kind = "binary"

    def __init__(self, name: str, checks: tuple[dict[str, Any], ...], column: str | None, loose: bool) -> None:
        super().__init__(name)
        self._checks, self._column, self._loose = checks, column, loose

    @classmethod
    def from_spec(cls, spec: InstructionsSpec) -> Self:
        return cls(spec.name, spec.checks, spec.column, spec.loose)

    def value(self, item: Item) -> float:
        """0.0 or 1.0; abstains where the prompt's column holds no checks that are known."""
        checks = [*self._checks, *self._of_prompt(item)]
        if not checks:
            raise Abstain("neither the recipe nor the prompt has a check")
        texts = loose_forms(item.response) if self._loose else [item.response]
        texts = [text for text in texts if text.strip()]
        return float(all(any(passes(check, text, item.question) for text in texts) for check in checks))

    def _of_prompt(self, item: Item) -> list[dict[str, Any]]:
        if self._column is None:
            return []
        text = item.column(self._column)
        if len(text) > LARGEST_COLUMN:
            raise Abstain(f"column {self._column} has {len(text)} characters")
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            raise Abstain(f"column {self._column} is not JSON") from None
        checks = found if isinstance(found, list) else [found]
        for check in checks:
            fault = check_fault(check)
            if fault is not None:
                raise Abstain(f"column {self._column}: {fault}")
        return checks


def loose_forms(text: str) -> list[str]:
    """The response, and without its first line, its last, both, each also without asterisks: IFEval's eight."""
    lines = text.split("\n")
    cut = [text, "\n".join(lines[1:]).strip(), "\n".join(lines[:-1]).strip(), "\n".join(lines[1:-1]).strip()]
    return list(dict.fromkeys([*cut, *(form.replace("*", "") for form in cut)]))
