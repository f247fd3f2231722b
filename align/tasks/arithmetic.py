"""The built-in task: integer problems such as `123+458=`, drawn without repetition, and worked solutions to them.

Solutions come right or deliberately wrong; wrong ones hold the slips that people and small models make, so that
a model trained on them errs in ways that weak checks (casting out nines, the last digit, …) partly catch.
Only the standard library is used here, because verifiers read problems with `parse_problem`.
"""

from __future__ import annotations

import math
import random
import re
from typing import NamedTuple

from align.errors import InputError
from align.recipe import Arithmetic

_PROBLEM = re.compile(r"(?<![0-9+\-*/])(?<![0-9][.,])([0-9]{1,18})\s*([+\-*])\s*([0-9]{1,18})\s*=")


class Problem(NamedTuple):
    """A question and its right answer.  Example: Problem("123+458=", "581")"""

    question: str
    answer: str


def problems(settings: Arithmetic, seed: int) -> list[Problem]:
    """`settings.count` different problems, the same ones for the same settings and seed.

    Operands have exactly `settings.digits` digits with a first digit above zero; a difference is never negative,
    because the larger operand comes first.
    """
    low = 10 ** (settings.digits - 1)
    span = 9 * low
    possible = span * (span + 1) // 2 if settings.operation == "-" else span * span
    if settings.count > possible:
        raise InputError(
            f"prompts.arithmetic.count: {settings.count} problems wanted, but only {possible} different ones have "
            f"{settings.digits} digits; lower count or raise prompts.arithmetic.digits"
        )
    chosen = random.Random(f"arithmetic:{seed}").sample(range(possible), settings.count)
    result = []
    for index in chosen:
        a, b = _ordered_pair(index) if settings.operation == "-" else divmod(index, span)
        question = f"{low + a}{settings.operation}{low + b}="
        result.append(Problem(question, str(calculate(low + a, settings.operation, low + b))))
    return result


def parse_problem(text: str) -> tuple[int, str, int] | None:
    """The last `a+b=`, `a-b=` or `a*b=` in the text, or None; a chat template may stand around it.

    Sums of three terms and signed operands are None: they are not problems of this task.
    """
    found = _PROBLEM.findall(text)
    if not found:
        return None
    a, operation, b = found[-1]
    return int(a), operation, int(b)


def calculate(a: int, operation: str, b: int) -> int:
    """The right answer."""
    if operation == "+":
        return a + b
    return a - b if operation == "-" else a * b


def solution(question: str, style: str, wrong: bool, rng: random.Random) -> str:
    """A solution in the style "answer" (bare) or "columns" (worked from the right, then the answer).

    Example: solution("123+458=", "columns", False, rng) == "3+8:1c1,2+5+1:8,1+4:5,=581".  In each column stand the
    digits, after `:` the digit written down, and after `c` what is carried (for `-`, borrowed).
    With `wrong` the final answer differs from the right one, always.
    """
    parsed = parse_problem(question)
    if parsed is None:
        raise ValueError(f"not an arithmetic problem: {question!r}")
    a, operation, b = parsed
    if operation == "-" and a < b:
        raise ValueError(f"the larger operand comes first in a difference: {question!r}")
    steps, answer = _wrong_work(a, operation, b, rng) if wrong else _work(a, operation, b, _Slip())
    assert (int(answer) != calculate(a, operation, b)) == wrong, f"{question}{answer}, wrong={wrong}"
    return f"{','.join(steps)},={answer}" if style == "columns" else answer


class _Slip(NamedTuple):
    """One error: in `column` (0 is the last digit) the digit or the carry goes wrong, or the digit in `column` and the
    one to its left change places in the finished answer."""

    kind: str = "none"  # "none", "digit", "carry" or "swap"
    column: int = 0
    shift: int = 0  # added to the digit, modulo 10


def _wrong_work(a: int, operation: str, b: int, rng: random.Random) -> tuple[list[str], str]:
    """Work with one slip that really changes the answer: equally often a digit off by one, a dropped carry, swapped
    neighbours, or any wrong digit.

    A slip that changes nothing here (no carry to drop, equal neighbours) is drawn again; off by one always does.
    """
    right = calculate(a, operation, b)
    while True:
        kind = rng.choice(("near", "carry", "swap", "digit"))
        column = rng.randrange(len(str(right)))
        if kind == "near":
            slip = _Slip("digit", column, rng.choice((1, 9)))
        elif kind == "digit":
            slip = _Slip("digit", column, rng.randrange(1, 10))
        else:
            slip = _Slip(kind, column)
        steps, answer = _work(a, operation, b, slip)
        if int(answer) != right and str(int(answer)) == answer:
            return steps, answer


def _work(a: int, operation: str, b: int, slip: _Slip) -> tuple[list[str], str]:
    """The worked columns, last digit first, and the answer that they spell, with the slip made on the way."""
    top, bottom = [int(d) for d in reversed(str(a))], [int(d) for d in reversed(str(b))]
    width = max(len(top), len(bottom), len(str(calculate(a, operation, b))))
    sign = "-" if operation == "-" else "+"
    steps, digits, carry = [], [], 0
    for column in range(width):
        terms, total = _column_terms(top, operation, bottom, column)
        if carry:
            terms.append(str(carry))
            total += -carry if operation == "-" else carry
        digit, carry = total % 10, abs(total // 10)
        if slip.column == column:
            digit = (digit + slip.shift) % 10
            carry = 0 if slip.kind == "carry" else carry
        digits.append(str(digit))
        steps.append(f"{sign.join(terms) or '0'}:{digit}" + (f"c{carry}" if carry else ""))
    answer = "".join(reversed(digits)).lstrip("0") or "0"
    return steps, _swapped(answer, slip.column) if slip.kind == "swap" else answer


def _column_terms(top: list[int], operation: str, bottom: list[int], column: int) -> tuple[list[str], int]:
    """What is added up (or subtracted) in one column, before the carry, and its value."""
    if operation == "*":
        pairs = [(i, column - i) for i in range(len(top)) if 0 <= column - i < len(bottom)]
        return [f"{top[i]}*{bottom[j]}" for i, j in pairs], sum(top[i] * bottom[j] for i, j in pairs)
    here = [number[column] for number in (top, bottom) if column < len(number)]
    value = here[0] - sum(here[1:]) if operation == "-" and here else sum(here)
    return [str(d) for d in here], value


def _swapped(digits: str, column: int) -> str:
    """The digits with those in `column` and the one to its left exchanged; column 0 is the last digit."""
    left = len(digits) - 2 - column
    if left < 0:
        return digits
    return digits[:left] + digits[left + 1] + digits[left] + digits[left + 2 :]


def _ordered_pair(index: int) -> tuple[int, int]:
    """The index-th pair (a, b) with a >= b >= 0: (0,0), (1,0), (1,1), (2,0), …"""
    a = (math.isqrt(8 * index + 1) - 1) // 2
    return a, index - a * (a + 1) // 2
