"""Meta Ranking (2402.12146): a response against responses to other prompts that are known to be right or wrong.

A weak model that cannot say whether an answer is right may still say which of two answers is more reliable.  For each
reference i with s_i = 1 (right) or 0 (wrong), b_i and w_i are the probabilities that the response is better or worse,
averaged over both orders of asking, and

    value = mean_i [ b_i (S if s_i else W) - w_i (W if s_i else S) ],    S = `strong`, W = `weak`.

The paper's four cases are those of b, w in {0, 1}; its own aggregation is not published, the weights here are ours.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from align.errors import InputError
from align.records import content_id
from align.verifiers.answering import Answerer, shares, start
from align.verifiers.base import Abstain, Item, ModelVerifier
from align.verifiers.fence import Question
from align.verifiers.spec_models import MetaRankingSpec

LARGEST_FILE = 64 * 2**20  # bytes
ROLE = "You are a careful judge of how reliable answers are."
ASK = (
    "Is the answer in pair A better, the same, or worse than the answer in pair B, each to its own prompt, in being "
    "right? Answer with one word: Better, Same or Worse."
)
WORDS = ("Better", "Same", "Worse")


class Reference(NamedTuple):
    """A response of which it is known whether it is right.  Example: Reference("1+2=", "3", True)"""

    prompt: str
    response: str
    good: bool


class MetaRanking(ModelVerifier):
    """The weighted comparisons with the references."""

    kind = "score"

    def __init__(self, spec: MetaRankingSpec, answerer: Answerer, references: Sequence[Reference]) -> None:
        super().__init__(spec.name)
        self._spec, self._answerer = spec, answerer
        self._references = choose_references(references, spec.references)

    @staticmethod
    def start(spec: MetaRankingSpec, dtype: str) -> MetaRanking:
        """With the file read and what answers started."""
        references = read_references(spec.file, f"verifiers.{spec.name}")
        return MetaRanking(spec, start(spec, dtype), references)

    def verify(self, batch: Sequence[Item]) -> list[float | Abstain]:
        """One value a response; references to its own prompt are left out."""
        rows = [
            (i, reference)
            for i, item in enumerate(batch)
            for reference in self._references
            if reference.prompt not in (item.prompt, item.question)
        ]
        asked = [_question(batch[i], reference, ahead) for ahead in (True, False) for i, reference in rows]
        found = [shares(c, self._spec.least_mass, WORDS) for c in self._answerer.choose(asked, WORDS)]
        parts: list[list[float]] = [[] for _ in batch]
        reasons: list[Abstain] = [Abstain("every reference is to the response's own prompt")] * len(batch)
        for (i, reference), one, other in zip(rows, found[: len(rows)], found[len(rows) :], strict=True):
            if isinstance(one, Abstain):
                reasons[i] = one
            elif isinstance(other, Abstain):
                reasons[i] = other
            else:
                better, worse = (one[0] + other[2]) / 2, (one[2] + other[0]) / 2
                strong, weak = self._spec.strong, self._spec.weak
                parts[i].append(
                    better * (strong if reference.good else weak) - worse * (weak if reference.good else strong)
                )
        return [sum(p) / len(p) if p else reason for p, reason in zip(parts, reasons, strict=True)]

    def account(self) -> dict[str, float]:
        """Requests, tries and tokens."""
        return dict(self._answerer.account)

    def close(self) -> None:
        """Free the engine."""
        self._answerer.close()


def _question(item: Item, reference: Reference, ahead: bool) -> Question:
    """The response as pair A where it is `ahead`, else as pair B."""
    mine, theirs = (item.question, item.response), (reference.prompt, reference.response)
    first, second = (mine, theirs) if ahead else (theirs, mine)
    texts = (("PROMPT A", first[0]), ("ANSWER A", first[1]), ("PROMPT B", second[0]), ("ANSWER B", second[1]))
    return Question(ROLE, texts, ASK)


def choose_references(references: Sequence[Reference], count: int) -> list[Reference]:
    """`count` of them by hash, right and wrong ones in turn as far as there are both: the same in every process."""
    ordered = sorted(references, key=lambda r: content_id("reference", *r))
    good, bad = [r for r in ordered if r.good], [r for r in ordered if not r.good]
    turns = [r for two in zip(good, bad, strict=False) for r in two]
    return [*turns, *good[len(bad) :], *bad[len(good) :]][:count]


def read_references(path: str, where: str) -> list[Reference]:
    """The references of a JSONL file; refuses it with the line where one is wrong."""
    key = f"{where}.file"
    try:
        with open(Path(path).expanduser(), "rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise InputError(f"{key}: {path}: cannot be read: {error.strerror or error}") from None
    if len(data) > LARGEST_FILE:
        raise InputError(f"{key}: {path}: more than {LARGEST_FILE // 2**20} MiB; a few references are enough")
    found = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            found.append(_reference(line, f"{key}: {path}:{number}"))
    if not found:
        raise InputError(f"{key}: {path}: holds no reference")
    return found


def _is_text(row: Any, name: str) -> bool:
    return isinstance(row, dict) and isinstance(row.get(name), str) and bool(row[name].strip())


def _reference(line: bytes, where: str) -> Reference:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {str(error)[:80]}") from None
    texts = [str(row[name]) for name in ("prompt", "response") if _is_text(row, name)]
    if len(texts) != 2:
        raise InputError(f"{where}: wants the texts `prompt` and `response`")
    if row.get("good") not in (True, False, 0, 1):
        raise InputError(f"{where}: wants `good`: true or false")
    return Reference(texts[0], texts[1], bool(row["good"]))
