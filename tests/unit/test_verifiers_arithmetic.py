"""The arithmetic checks: hand-worked cases, and properties that hold for every problem."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.verifiers.arithmetic import CHECKS, Arithmetic
from align.verifiers.base import Abstain, Item


def check(name: str, prompt: str, response: str) -> float:
    return Arithmetic(name, name).value(Item("s", "p", prompt, response, None, 3, "stop"))


@pytest.mark.parametrize(
    ("name", "prompt", "response", "passes"),
    [
        ("nines", "123+456=", "579", 1),  # 6+15 = 21 = 3, 5+7+9 = 21 = 3
        ("nines", "123+456=", "597", 1),  # swapped neighbours slip through
        ("nines", "123+456=", "578", 0),
        ("nines", "123-456=", "-333", 1),  # 6-15 = -9 = 0, -(9) = 0
        ("nines", "23*45=", "1035", 1),  # 5*9 = 45 = 0, 1+0+3+5 = 9 = 0
        ("nines", "23*45=", "1034", 0),
        ("nines", "100-300=", "-200", 1),  # 1-3 = -2
        ("nines", "100-300=", "200", 0),
        ("last_digit", "128+456=", "584", 1),
        ("last_digit", "128+456=", "994", 1),
        ("last_digit", "128+456=", "583", 0),
        ("last_digit", "131-128=", "3", 1),
        ("last_digit", "128-131=", "-3", 1),
        ("last_digit", "128-131=", "3", 0),
        ("last_digit", "27*18=", "486", 1),
        ("parity", "123+456=", "579", 1),
        ("parity", "123+456=", "1", 1),
        ("parity", "123+456=", "580", 0),
        ("parity", "3*5=", "15", 1),
        ("parity", "128-131=", "-3", 1),
        ("magnitude", "123+456=", "500", 1),  # 100+400 .. 199+499
        ("magnitude", "123+456=", "698", 1),
        ("magnitude", "123+456=", "499", 0),
        ("magnitude", "123+456=", "699", 0),
        ("magnitude", "123-456=", "-201", 1),  # 100-499 .. 199-400
        ("magnitude", "123-456=", "-200", 0),
        ("magnitude", "7*8=", "56", 1),  # single digits are known exactly
        ("magnitude", "7*8=", "57", 0),
        ("first_digit", "123+456=", "579", 0),  # about 100+500 = 600
        ("first_digit", "123+456=", "612", 1),
        ("first_digit", "123+456=", "6120", 0),
        ("first_digit", "912+356=", "1268", 1),  # about 900+400 = 1300
        ("first_digit", "123-456=", "-433", 1),  # about 100-500 = -400
        ("first_digit", "123-456=", "433", 0),
        ("no_carry", "123+456=", "579", 1),
        ("no_carry", "128+456=", "574", 1),
        ("no_carry", "128+456=", "584", 0),  # the right answer
        ("no_carry", "95+5=", "90", 1),
        ("no_carry", "52-38=", "24", 1),  # 2-8 = 4, 5-3 = 2
        ("no_carry", "38-52=", "-24", 1),
        ("no_carry", "23*4=", "82", 1),  # 3*4 = 2, 2*4 = 8
        ("no_carry", "5-5=", "0", 1),
    ],
)
def test_by_hand(name: str, prompt: str, response: str, passes: int) -> None:
    assert check(name, prompt, response) == passes


@given(st.integers(0, 10**9), st.sampled_from("+-*"), st.integers(0, 10**9))
def test_right_answers_pass_the_sound_checks(a: int, op: str, b: int) -> None:
    right = {"+": a + b, "-": a - b, "*": a * b}[op]
    for name in ("nines", "last_digit", "parity", "magnitude"):
        assert check(name, f"{a}{op}{b}=", f"so it is {right:,}.") == 1.0, name


@given(st.integers(100, 999), st.integers(100, 999), st.integers(1, 8), st.integers(0, 2))
def test_nines_finds_every_wrong_digit(a: int, b: int, off: int, place: int) -> None:
    assert check("nines", f"{a}+{b}=", str(a + b + off * 10**place)) == 0.0


@given(st.integers(0, 4), st.integers(0, 4))
def test_without_carries_no_carry_is_right(a: int, b: int) -> None:
    assert check("no_carry", f"{a}{b}+{b}{a}=", str(int(f"{a}{b}") + int(f"{b}{a}"))) == 1.0


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_responses_that_are_no_whole_number_fail(name: str) -> None:
    for response in ("", "I don't know", "5.79e2.5", "579.5"):
        assert check(name, "123+456=", response) == 0.0


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_other_prompts_are_not_judged(name: str) -> None:
    with pytest.raises(Abstain, match=r"not a\+b="):
        check(name, "What is the capital of France?", "579")


def test_a_whole_number_may_have_a_point() -> None:
    assert check("nines", "123+456=", "579.0") == 1.0
    assert check("nines", "123+456=", "00579") == 1.0


def test_absurdly_long_numbers_are_judged_too() -> None:
    """Longer than Python turns into an int by default."""
    ones = "1" * 5000  # odd, digit sum 5000 = 5 modulo 9, and 123+456 is 3
    assert {name: check(name, "123+456=", ones) for name in CHECKS} == dict.fromkeys(CHECKS, 0.0) | {"parity": 1.0}
