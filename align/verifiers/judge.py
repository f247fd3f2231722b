"""A language model as a judge: P(yes), a mark from 1 to 5, or which of two responses is better, asked in both orders.

A judge's answer is data.  Probabilities are taken of words that we name; a written mark is parsed strictly, and an
answer that is not one (instructions, an essay, two marks) is none with the reason.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from align.verifiers.answering import Answerer, shares, start
from align.verifiers.base import Abstain, Item, ModelVerifier
from align.verifiers.fence import Question
from align.verifiers.spec_models import JudgeSpec

ROLE = "You are a careful judge of texts that were written in answer to a prompt."
WORTH = "a correct and helpful answer to the prompt"
LONGEST_WRITTEN = 100_000  # characters of a judge's answer that are looked at


class LanguageJudge(ModelVerifier):
    """One response at a time: P(Yes), or the written mark."""

    kind = "score"

    def __init__(self, spec: JudgeSpec, answerer: Answerer) -> None:
        super().__init__(spec.name)
        self._spec, self._answerer = spec, answerer

    @staticmethod
    def start(spec: JudgeSpec, dtype: str) -> LanguageJudge:
        """The judge of the spec's mode, with what answers for it."""
        return (PairwiseJudge if spec.mode == "pairwise" else LanguageJudge)(spec, start(spec, dtype))

    def verify(self, batch: Sequence[Item]) -> list[float | Abstain]:
        """P(Yes) in [0, 1], or the mark in 1 to 5."""
        asked, refused = self._questions([[item] for item in batch])
        if self._spec.mode == "rubric":
            marks = [parse_mark(text) for text in self._answerer.write(asked, self._spec.answer_tokens)]
            return _put_back(marks, refused)
        words = ("Yes", "No")
        found = [shares(c, self._spec.least_mass, words) for c in self._answerer.choose(asked, words)]
        return _put_back([each if isinstance(each, Abstain) else each[0] for each in found], refused)

    def account(self) -> dict[str, float]:
        """Requests, tries, tokens, and answers that could not be read."""
        return dict(self._answerer.account)

    def close(self) -> None:
        """Free the engine."""
        self._answerer.close()

    def _questions(self, rows: Sequence[Sequence[Item]]) -> tuple[list[Question], list[Abstain | None]]:
        """A question for each row of responses to one prompt, and where a row has none, why."""
        asked: list[Question] = []
        refused: list[Abstain | None] = []
        for row in rows:
            try:
                asked.append(Question(ROLE, self._texts(row), self._ask()))
                refused.append(None)
            except Abstain as abstain:
                refused.append(abstain)
        return asked, refused

    def _texts(self, row: Sequence[Item]) -> tuple[tuple[str, str], ...]:
        spec, item = self._spec, row[0]
        texts = [("PROMPT", item.question)]
        if spec.context_column is not None:
            texts.append(("CONTEXT", item.column(spec.context_column)))
        if spec.show_answer:
            if item.answer is None:
                raise Abstain("the prompt has no reference answer")
            texts.append(("REFERENCE", item.answer))
        names = ("RESPONSE",) if len(row) == 1 else ("RESPONSE A", "RESPONSE B")
        return (*texts, *((name, each.response) for name, each in zip(names, row, strict=True)))

    def _ask(self) -> str:
        question = self._spec.question
        if self._spec.mode == "yes_no":
            return f"{question or f'Is the response {WORTH}?'} Answer with one word, Yes or No."
        if self._spec.mode == "pairwise":
            return f"{question or f'Which response is {WORTH}, or comes nearer to it?'} Answer with one letter, A or B."
        return (
            f"{question or f'How far is the response {WORTH}?'} You may reason first. The last line of your answer "
            'must be {"score": N} and nothing else, with N from 1 (worst) to 5 (best).'
        )


class PairwiseJudge(LanguageJudge):
    """How much better a response is than the prompt's others: the mean half difference of both orders, -1 to 1.

    D_ij = 2 P(A | i first, j second) - 1;  value_i = mean over j of (D_ij - D_ji) / 2, in which a liking for the first
    place cancels.  That liking, the mean of (D_ij + D_ji) / 2, is `first_place_excess / compared` of the account.
    """

    whole_prompts = True

    def __init__(self, spec: JudgeSpec, answerer: Answerer) -> None:
        super().__init__(spec, answerer)
        self._compared: Counter[str] = Counter()
        self._excess = 0.0
        self._known: dict[tuple[str, str], float | Abstain] = {}

    def verify(self, batch: Sequence[Item]) -> list[float | Abstain]:
        """Each response against the next `opponents` of its prompt, in a ring by id, or against all."""
        pairs = self._pairs(batch)
        strengths = self.strengths([(batch[i], batch[j]) for i, j in pairs] + [(batch[j], batch[i]) for i, j in pairs])
        gains: list[list[float]] = [[] for _ in batch]
        reasons: list[Abstain | None] = [None] * len(batch)
        for (i, j), one, other in zip(pairs, strengths[: len(pairs)], strengths[len(pairs) :], strict=True):
            if isinstance(one, Abstain) or isinstance(other, Abstain):
                reasons[i] = reasons[j] = one if isinstance(one, Abstain) else other  # type: ignore[assignment]
                self._compared["unanswered"] += 1
                continue
            gains[i].append((one - other) / 2)
            gains[j].append((other - one) / 2)
            self._compared["compared"] += 1
            self._excess += (one + other) / 2
        alone = Abstain("the prompt has no other response to compare it with")
        return [sum(g) / len(g) if g else (reason or alone) for g, reason in zip(gains, reasons, strict=True)]

    def remember(self, answers: Mapping[tuple[str, str], float | Abstain]) -> None:
        """Take these answers of an earlier asking, by the sample ids in the order shown, in place of all before."""
        self._known = dict(answers)

    def strengths(self, pairs: Sequence[tuple[Item, Item]]) -> list[float | Abstain]:
        """How much better the first of each two is than the second, -1 to 1, in this order only.

        What is remembered is not asked again.
        """
        names = [(first.sample_id, second.sample_id) for first, second in pairs]
        asked, refused = self._questions(
            [pair for pair, name in zip(pairs, names, strict=True) if name not in self._known]
        )
        words = ("A", "B")
        found = [shares(c, self._spec.least_mass, words) for c in self._answerer.choose(asked, words)]
        new = iter(_put_back([each if isinstance(each, Abstain) else 2 * each[0] - 1 for each in found], refused))
        return [self._known[name] if name in self._known else next(new) for name in names]

    def account(self) -> dict[str, float]:
        """As any judge's, and how many were compared both ways, and the liking for the first place in sum."""
        more = {"first_place_excess": self._excess} if self._compared else {}
        return {**super().account(), **self._compared, **more}

    def _pairs(self, batch: Sequence[Item]) -> list[tuple[int, int]]:
        """Indices (i, j) of those to compare, each two once."""
        groups: dict[str, list[int]] = {}
        for index in sorted(range(len(batch)), key=lambda i: batch[i].sample_id):
            groups.setdefault(batch[index].prompt_id, []).append(index)
        found: dict[tuple[int, int], None] = {}
        for group in groups.values():
            reach = min(self._spec.opponents or len(group), len(group) - 1)
            for place, i in enumerate(group):
                for step in range(1, reach + 1):
                    j = group[(place + step) % len(group)]
                    found[min(i, j), max(i, j)] = None
        return list(found)


def parse_mark(text: str | Abstain) -> float | Abstain:
    """The mark of an answer whose last line is {"score": N}, N from 1 to 5, if it names no other mark before.

    Example: parse_mark('It is fine.\\n{"score": 4}') == 4.0
    """
    if isinstance(text, Abstain):
        return text
    if len(text) > LONGEST_WRITTEN:
        return Abstain(f"the judge wrote {len(text)} characters")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("```")]
    marks = [_mark(line) for line in lines]
    if not marks or marks[-1] is None:
        return Abstain("the judge's last line is not a mark from 1 to 5")
    if len({mark for mark in marks if mark is not None}) > 1:
        return Abstain("the judge names two different marks")
    return float(marks[-1])


def _mark(line: str) -> int | None:
    if not line.startswith("{") or len(line) > 100:
        return None
    try:
        found = json.loads(line, object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError):
        return None
    mark = found.get("score") if isinstance(found, dict) and len(found) == 1 else None
    return mark if isinstance(mark, int) and not isinstance(mark, bool) and 1 <= mark <= 5 else None


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _put_back(found: Sequence[float | Abstain], refused: Sequence[Abstain | None]) -> list[float | Abstain]:
    """The answers in the order of the items, with those that were not asked about in their places."""
    answers = iter(found)
    return [next(answers) if reason is None else reason for reason in refused]
