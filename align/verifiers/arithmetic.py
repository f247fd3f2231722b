"""Checks on `a+b=`, `a-b=` and `a*b=` that find many slips without working the problem out.

Each looks at a shadow of the numbers (digits modulo 9, the last digit, the leading digit); none computes the answer
and compares.  All are weak on purpose: right answers always pass `nines`, `last_digit`, `parity` and `magnitude`, and
so do some wrong ones.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple, Self

from align.tasks.arithmetic import parse_problem
from align.verifiers.base import Abstain, Item, PerItem
from align.verifiers.extract import last_number
from align.verifiers.spec import ArithmeticSpec

_OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}


class Claim(NamedTuple):
    """`a op b = c` as decimal digits without leading zeros.  Example: Claim("123", "-", "456", True, "333")"""

    a: str
    op: str
    b: str
    negative: bool  # sign of the claimed answer
    c: str


class Arithmetic(PerItem):
    """1 where the last number of the response passes the check, 0 where it does not or there is no whole number.

    A response without a number fails, as it would in anybody's eyes: were it let off, only the other verifiers'
    noise would judge it, and a policy could learn to say nothing.
    """

    kind = "binary"

    def __init__(self, name: str, check: str) -> None:
        super().__init__(name)
        self._check = CHECKS[check]

    @classmethod
    def from_spec(cls, spec: ArithmeticSpec) -> Self:
        return cls(spec.name, spec.check)

    def value(self, item: Item) -> float:
        """0.0 or 1.0; abstains where the prompt is no such problem."""
        problem = parse_problem(item.question)
        if problem is None:
            raise Abstain("the prompt is not a+b=, a-b= or a*b=")
        number = last_number(item.response)
        if number is None:
            return 0.0
        digits, _, fraction = number.removeprefix("-").partition(".")
        if fraction.strip("0"):
            return 0.0
        a, op, b = problem
        return float(self._check(Claim(str(a), op, str(b), number.startswith("-"), digits.lstrip("0") or "0")))


def nines(claim: Claim) -> bool:
    """Casting out nines: a number equals its digit sum modulo 9, so the digit sums must obey the operation too."""
    c = _digit_sum(claim.c) * (-1 if claim.negative else 1)
    return (_OPERATIONS[claim.op](_digit_sum(claim.a), _digit_sum(claim.b)) - c) % 9 == 0


def last_digit(claim: Claim) -> bool:
    """The last digits obey the operation modulo 10."""
    c = int(claim.c[-1]) * (-1 if claim.negative else 1)
    return (_OPERATIONS[claim.op](int(claim.a[-1]), int(claim.b[-1])) - c) % 10 == 0


def parity(claim: Claim) -> bool:
    """Odd and even obey the operation."""
    return (_OPERATIONS[claim.op](int(claim.a[-1]), int(claim.b[-1])) - int(claim.c[-1])) % 2 == 0


def magnitude(claim: Claim) -> bool:
    """The answer lies between the bounds that the operands' first digits and lengths allow.

    Example: 123+456 lies in [100+400, 199+499] = [500, 698].
    """
    if len(claim.c) > len(claim.a) + len(claim.b):
        return False
    (low_a, high_a), (low_b, high_b) = _bounds(claim.a), _bounds(claim.b)
    if claim.op == "+":
        low, high = low_a + low_b, high_a + high_b
    elif claim.op == "-":
        low, high = low_a - high_b, high_a - low_b
    else:
        low, high = low_a * low_b, high_a * high_b
    return low <= int(claim.c) * (-1 if claim.negative else 1) <= high


def first_digit(claim: Claim) -> bool:
    """The first digit and the length of the answer when each operand is rounded to its own first digit.

    Example: 123+456 is about 100+500, so the answer should start with 6 and have three digits; 579 fails.  Of the
    right answers to three-digit problems it passes 80% of the sums, 67% of the products and 40% of the differences.
    """
    estimate = _OPERATIONS[claim.op](_rounded(claim.a), _rounded(claim.b))
    text = str(abs(estimate))
    return (claim.negative, claim.c[0], len(claim.c)) == (estimate < 0, text[0], len(text))


def no_carry(claim: Claim) -> bool:
    """The answer of somebody who forgets every carry (borrow): wrong more often than right.

    Each column is worked by itself modulo 10.  Example: 128+456 "is" 574.
    """
    a, b = [int(d) for d in reversed(claim.a)], [int(d) for d in reversed(claim.b)]
    swapped = claim.op == "-" and (len(claim.a), claim.a) < (len(claim.b), claim.b)
    if swapped:
        a, b = b, a
    columns = [0] * (len(a) + len(b))
    if claim.op == "*":
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                columns[i + j] += x * y
    else:
        for i in range(max(len(a), len(b))):
            columns[i] = _OPERATIONS[claim.op](a[i] if i < len(a) else 0, b[i] if i < len(b) else 0)
    digits = "".join(str(c % 10) for c in reversed(columns)).lstrip("0") or "0"
    return claim.c == digits and claim.negative == (swapped and digits != "0")


CHECKS: dict[str, Callable[[Claim], bool]] = {
    "nines": nines,
    "last_digit": last_digit,
    "parity": parity,
    "magnitude": magnitude,
    "first_digit": first_digit,
    "no_carry": no_carry,
}


def _digit_sum(digits: str) -> int:
    return sum(map(int, digits))


def _bounds(digits: str) -> tuple[int, int]:
    """The least and the greatest number with this first digit and length; a single digit is known exactly."""
    scale = 10 ** (len(digits) - 1)
    low = int(digits[0]) * scale
    return low, low + scale - 1


def _rounded(digits: str) -> int:
    """Rounded half up to the first digit: "456" -> 500."""
    scale = 10 ** (len(digits) - 1)
    up = len(digits) > 1 and digits[1] >= "5"
    return (int(digits[0]) + up) * scale
