"""The built-in task: problems, and solutions that are right or deliberately wrong."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.errors import InputError
from align.recipe import Arithmetic, Scratch
from align.tasks.arithmetic import Problem, parse_problem, problems, solution

DIGITS = {1: (1, 9), 2: (10, 99), 3: (100, 999)}


@pytest.mark.parametrize("operation", ["+", "-", "*"])
@pytest.mark.parametrize("digits", [1, 2, 3])
def test_problems_differ_have_their_digits_and_right_answers(operation: str, digits: int) -> None:
    drawn = problems(Arithmetic(digits=digits, operation=operation, count=45), seed=3)
    assert len(set(drawn)) == 45
    low, high = DIGITS[digits]
    for question, answer in drawn:
        assert str(eval(question.rstrip("="), {"__builtins__": {}})) == answer and int(answer) >= 0  # noqa: S307
        a, _, b = parse_problem(question)  # type: ignore[misc]
        assert low <= b <= high and low <= a <= high


def test_every_problem_can_be_drawn_and_no_more() -> None:
    """81 sums of two one-digit numbers; 45 differences, because the larger operand comes first."""
    sums = {p.question for p in problems(Arithmetic(digits=1, count=81), seed=0)}
    assert sums == {f"{a}+{b}=" for a in range(1, 10) for b in range(1, 10)}
    differences = {p.question for p in problems(Arithmetic(digits=1, operation="-", count=45), seed=0)}
    assert differences == {f"{a}-{b}=" for a in range(1, 10) for b in range(1, a + 1)}
    with pytest.raises(InputError, match=r"prompts.arithmetic.count: 46 .* only 45"):
        problems(Arithmetic(digits=1, operation="-", count=46), seed=0)


def test_problems_depend_on_the_seed_only() -> None:
    settings = Arithmetic(count=50)
    assert problems(settings, 1) == problems(settings, 1) != problems(settings, 2)


@pytest.mark.parametrize(
    ("question", "work"),
    [
        ("123+458=", "3+8:1c1,2+5+1:8,1+4:5,=581"),
        ("999+1=", "9+1:0c1,9+1:0c1,9+1:0c1,1:1,=1000"),
        ("423-158=", "3-8:5c1,2-5-1:6c1,4-1-1:2,=265"),
        ("423-401=", "3-1:2,2-0:2,4-4:0,=22"),
        ("12*34=", "2*4:8,2*3+1*4:0c1,1*3+1:4,=408"),
        ("99*99=", "9*9:1c8,9*9+9*9+8:0c17,9*9+17:8c9,9:9,=9801"),
    ],
)
def test_columns_are_worked_from_the_right(question: str, work: str) -> None:
    assert solution(question, "columns", False, random.Random(0)) == work
    assert solution(question, "answer", False, random.Random(0)) == work.split("=")[1]


operands = st.integers(1, 999)


@settings(deadline=None)
@given(operands, operands, st.sampled_from("+-*"), st.booleans(), st.sampled_from(["answer", "columns"]), st.integers())
def test_a_solution_is_right_or_wrong_as_asked(a: int, b: int, op: str, wrong: bool, style: str, seed: int) -> None:
    a, b = max(a, b), min(a, b)
    text = solution(f"{a}{op}{b}=", style, wrong, random.Random(seed))
    found = text.split("=")[-1]
    right = {"+": a + b, "-": a - b, "*": a * b}[op]
    assert (int(found) == right) is not wrong
    assert found == str(int(found)), "a number is written without leading zeros"
    assert set(text) <= set(Scratch().characters)


def test_wrong_answers_are_slips_of_every_kind() -> None:
    """For 199+205=404: an off-by-one digit, a dropped carry (394 or 304), swapped neighbours (440), a wild digit."""
    rng = random.Random(0)
    seen = {solution("199+205=", "answer", True, rng) for _ in range(400)}
    assert {"394", "304", "440", "405", "403", "414", "409"} <= seen
    assert "404" not in seen


def test_a_slip_in_the_work_reaches_the_answer() -> None:
    """What the columns say and what the answer says agree, unless the answer was copied with two digits swapped."""
    rng = random.Random(1)
    for _ in range(200):
        steps, answer = solution("268+157=", "columns", True, rng).split(",=")
        spelled = "".join(step.split(":")[1][0] for step in reversed(steps.split(","))).lstrip("0")
        assert spelled == answer or sorted(spelled) == sorted(answer)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("12+34=", (12, "+", 34)),
        ("<|user|>What is 12 * 34 =<|assistant|>", (12, "*", 34)),
        ("1+2=3, and 45-6=", (45, "-", 6)),
        ("1+2+3=", None),
        ("-5+3=", None),
        ("1.5+3=", None),
        ("1,500+3=", None),
        ("12+34", None),
        ("٣+٤=", None),
        ("9" * 5000 + "+1=", None),
    ],
)
def test_parse_problem(text: str, problem: tuple[int, str, int] | None) -> None:
    assert parse_problem(text) == problem


def test_a_solution_needs_a_problem_of_the_task() -> None:
    with pytest.raises(ValueError, match="not an arithmetic problem"):
        solution("hello", "answer", False, random.Random(0))
    with pytest.raises(ValueError, match="larger operand comes first"):
        solution("1-2=", "answer", False, random.Random(0))
    assert problems(Arithmetic(count=1), 0)[0] == Problem(*problems(Arithmetic(count=1), 0)[0])
