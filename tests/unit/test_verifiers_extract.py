"""Which part of a response counts as its answer."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.verifiers.extract import extract_answer, last_boxed, last_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("579", "579"),
        ("", None),
        ("no digits, only words.", None),
        ("so $1,234.", "1234"),
        ("1,234.50 dollars", "1234.50"),
        ("12,345,678", "12345678"),
        ("1,2,3", "3"),  # a list, not thousands
        ("12,34", "34"),
        ("1,234,56", "56"),
        ("-3,4", "4"),
        ("-1,234", "-1234"),
        ("7 ate 9.", "9"),
        ("answer: -79", "-79"),
        ("= −79", "-79"),  # U+2212
        ("5-79", "79"),  # a difference, not a sign
        ("x-79", "79"),
        ("(5)-79", "79"),
        ("-.5", "-0.5"),
        ("+7", "7"),
        ("1/2", "2"),
        ("3.", "3"),
        ("٣٤", "34"),  # Arabic-Indic digits
        ("１２３", "123"),  # full-width digits
        ("x²", None),  # a superscript is no digit of a number
        ("3+8:1c1,2+5+1:8,1+4:5,=581", "581"),
        ("0012", "0012"),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == number


@given(st.integers(0, 10**12), st.text("abc ,.-", max_size=600), st.text("abc .", max_size=600))
def test_a_grouped_number_is_found_wherever_it_stands(value: int, before: str, after: str) -> None:
    assert last_number(f"{before} {value:,}{' ' + after if after else ''}") == str(value)


@given(st.text("0123456789,.-+ a", max_size=900))
def test_reading_from_the_end_changes_nothing(text: str) -> None:
    """A prefix of letters moves every cut of the search from the end, and may not move the answer."""
    assert last_number("b" * 300 + " " + text) == last_number(" " + text)


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"\boxed{5}", "5"),
        (r"\boxed{1} and \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\text{a}_{b_{c}}}", r"\text{a}_{b_{c}}"),
        (r"\boxed{1} then \boxed{2", "1"),  # the last one was cut off
        (r"\boxed {7}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{}", None),
        ("} \\boxed{4}", "4"),
        ("boxed{4}", None),
        ("", None),
    ],
)
def test_last_boxed(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed


def test_whole_and_pattern() -> None:
    assert extract_answer("  Paris \n", "whole") == "Paris"
    assert extract_answer(" \n", "whole") is None
    assert extract_answer("A: 1\nA: 2 ", "pattern", r"A: (\d+)") == "2"
    assert extract_answer("A: x", "pattern", r"A: (\d+)") is None
    assert extract_answer("A: x", "pattern", r"A: (\d+)?") is None
    with pytest.raises(ValueError, match="no way to extract"):
        extract_answer("5", "guess")


@pytest.mark.parametrize("unit", ["1,111", "\\boxed{", "a", "1", "{", "-", "1.", ","])
def test_time_is_linear(unit: str) -> None:
    """Two million characters: a quadratic search would take hours."""
    text = unit * (2_000_000 // len(unit))
    start = time.monotonic()
    last_number(text)
    last_boxed(text)
    assert time.monotonic() - start < 20
