"""How many of the prompt's other responses agree."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Self

from align.verifiers.base import Abstain, Item, Verifier
from align.verifiers.extract import extract_answer
from align.verifiers.spec import SelfConsistencySpec

_NUMBER = re.compile(r"(?P<sign>[-+]?)(?P<whole>\d{1,3}(?:,\d{3})+|\d*)(?:\.(?P<share>\d+))?(?<=\d)", re.ASCII)


class SelfConsistency(Verifier):
    """Share of the prompt's other responses with the same extracted answer, in [0, 1].

    For response i of G: (number of j != i with the same answer) / (G - 1).  5 and 5.0, 1,234 and 1234 are the same
    answer, and so are others that differ by white space only.  A response without an answer agrees with nobody and gets
    0, and counts among the others.
    """

    kind = "score"
    whole_prompts = True

    def __init__(self, name: str, how: str) -> None:
        super().__init__(name)
        self._how = how

    @classmethod
    def from_spec(cls, spec: SelfConsistencySpec) -> Self:
        return cls(spec.name, spec.extract)

    def verify(self, batch: Sequence[Item]) -> list[float | Abstain]:
        """Abstains on a prompt's only response."""
        answers = [plain(extract_answer(item.response, self._how)) for item in batch]
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        sizes = Counter(item.prompt_id for item in batch)
        for item, answer in zip(batch, answers, strict=True):
            if answer is not None:
                counts[item.prompt_id][answer] += 1
        verdicts: list[float | Abstain] = []
        for item, answer in zip(batch, answers, strict=True):
            others = sizes[item.prompt_id] - 1
            if others == 0:
                verdicts.append(Abstain("the prompt has no other response"))
            else:
                same = counts[item.prompt_id][answer] - 1 if answer is not None else 0
                verdicts.append(same / others)
        return verdicts


def plain(answer: str | None) -> str | None:
    r"""One way of writing for all that are the same answer.

    Example: plain("5.0") == plain("5") == "5"; plain(r"\frac{1}{2} \pi") == r"\frac{1}{2}\pi"
    """
    if answer is None:
        return None
    text = "".join(answer.split())
    number = _NUMBER.fullmatch(text)
    if number is None:
        return text
    whole, share = number["whole"].replace(",", "") or "0", (number["share"] or "").rstrip("0")
    size = f"{whole}.{share}" if share else whole
    return f"-{size}" if number["sign"] == "-" and size != "0" else size
