"""What a pairwise judge is asked, what is kept of its word, and what is told of it: by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from align import comparing
from align.errors import InputError
from align.records import Comparison
from align.verifiers.base import Abstain, Item
from align.verifiers.judge import PairwiseJudge
from tests.unit.test_policy_gradient import sample

ROUND = [sample("a", 0), sample("a", 1), sample("a", 2, temperature=0.0), sample("b", 0), sample("b", 1)]


def item(name: str) -> Item:
    return Item(name, name[0], "1+1=", name, None, 1, "stop")


def asked(*pairs: tuple[str, str]) -> list[tuple[Item, Item]]:
    return [(item(first), item(second)) for first, second in pairs]


class Fragile(PairwiseJudge):
    """Breaks where a prompt is b, and counts how often it was called."""

    def __init__(self, error: Exception) -> None:
        self.error, self.calls = error, 0

    def strengths(self, pairs: Sequence[tuple[Item, Item]]) -> list[float | Abstain]:
        self.calls += 1
        if any(first.prompt_id == "b" for first, _ in pairs):
            raise self.error
        return [0.5] * len(pairs)


def test_every_two_responses_of_a_prompt_in_both_orders_and_the_greedy_one_is_no_rival() -> None:
    assert comparing.questions("pairwise_grpo", ROUND) == [("a0", "a1"), ("a1", "a0"), ("b0", "b1"), ("b1", "b0")]


def test_each_response_against_the_greedy_one_in_both_orders() -> None:
    found = comparing.questions("pairwise_ppo", ROUND)
    assert found == [("a0", "a2"), ("a2", "a0"), ("a1", "a2"), ("a2", "a1")]  # b has no greedy response


def test_an_error_costs_the_answers_of_its_prompt_and_no_others() -> None:
    pairs = asked(("a0", "a1"), ("a1", "a0"), ("b0", "b1"), ("b1", "b0"))
    judge = Fragile(RuntimeError("out of memory"))
    *good, first, second = comparing.answers(judge, pairs)
    assert good == [0.5, 0.5] and judge.calls == 3
    assert str(first) == str(second) == "raised RuntimeError: out of memory"
    with pytest.raises(InputError):
        comparing.answers(Fragile(InputError("endpoint: refused")), pairs)


def test_what_is_no_number_is_none_with_the_reason_and_the_wrong_end_is_turned() -> None:
    said: list[Any] = [0.25, Abstain("busy\n"), math.nan]
    rows = comparing.comparisons("referee", asked(("a0", "a1"), ("a1", "a0"), ("a0", "a2")), said, -1.0)
    assert rows == [
        Comparison("a", "a0", "a1", "referee", -0.25, None),
        Comparison("a", "a1", "a0", "referee", None, "busy"),
        Comparison("a", "a0", "a2", "referee", None, "returned nan"),
    ]


def test_the_report_counts_what_was_not_read_and_the_liking_for_the_first_place() -> None:
    """.7 and -.3 are .2 too much for whoever is first; the pair read in one order says nothing of that."""
    rows = [
        Comparison("a", "a0", "a1", "referee", 0.7, None),
        Comparison("a", "a1", "a0", "referee", -0.3, None),
        Comparison("a", "a0", "a2", "referee", 1.0, None),
        Comparison("a", "a2", "a0", "referee", None, "busy"),
    ]
    told = comparing.report("referee", rows, 1.0)
    assert told.pop("first_place") == pytest.approx(0.2)
    assert told == {"judge": "referee", "questions": 4, "unread": 1, "pairs_both_ways": 1, "reasons": {"busy": 1}}
    line = comparing.explain({**told, "first_place": 0.2})
    assert line == (
        "referee answered 3 of 4 questions about two responses; liking for the first place +0.200, 1 x busy"
    )
    assert comparing.report("referee", [], 1.0)["first_place"] is None
    assert comparing.report("referee", rows, -1.0)["first_place"] == pytest.approx(-0.2)
