"""Responses cut into steps: borders on tokens, texts that the rule cannot cut, and what a part of a response is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.builders.steps import cut, first_step, part, prefix_id, step_ends, token_pieces
from align.recipe_steps import Steps
from tests.unit.chain_task import make_sample

SEMICOLON = Steps(separator=";")
WORDS = ["", "a", "b;", ";", ";c", " d", "e;f", "é"]  # 0 is a special token


def decode(ids: list[int]) -> str:
    return "".join(WORDS[i] for i in ids)


@pytest.mark.parametrize(
    ("pieces", "rule", "ends"),
    [
        ("a ; b ;".split() + [""], SEMICOLON, (2, 5)),  # the end of sequence belongs to the step that it follows
        (["a;b", "c;", "d"], SEMICOLON, (1, 2, 3)),  # a token that goes on behind the separator is not divided
        (["a;b;c", "d"], SEMICOLON, (1, 2)),  # two separators in one token are one border
        (["x", "=", "=", "y"], Steps(separator="=="), (3, 4)),  # the token that completes the separator
        ([";", "a"], SEMICOLON, (1, 2)),
        (["no", "border", ""], SEMICOLON, (3,)),
        (["only", ";", ""], SEMICOLON, (3,)),  # nothing behind the separator: one step
        (list("abcdefg"), Steps(rule="tokens", tokens_per_step=3), (3, 6, 7)),
        ([*"abc", ""], Steps(rule="tokens", tokens_per_step=3), (4,)),
        (list("So. Now 3.5. End"), Steps(rule="pattern", pattern=r"\.(?=\s)"), (3, 12, 16)),
        (list("abcd"), Steps(rule="pattern", pattern="^"), (4,)),  # a border before the first token is none
        (list("a;b;c;d;e"), Steps(separator=";", max_steps=3), (2, 4, 9)),  # the rest is joined to the last
    ],
)
def test_borders_by_hand(pieces: list[str], rule: Steps, ends: tuple[int, ...]) -> None:
    assert step_ends(pieces, rule) == ends


@given(st.lists(st.sampled_from(["a", ";", "b;", "", "c;d", "\n"]), min_size=1, max_size=20), st.integers(2, 5))
def test_steps_put_together_are_the_response(pieces: list[str], most: int) -> None:
    ends = step_ends(pieces, Steps(separator=";", max_steps=most))
    assert ends[-1] == len(pieces) and list(ends) == sorted(set(ends)) and len(ends) <= most
    for begin, end in zip((0, *ends), ends, strict=False):
        assert len(ends) == 1 or "".join(pieces[begin:end]), "no step is without text"


def test_a_character_of_several_tokens_belongs_to_its_last_one() -> None:
    parts = {1: b"a", 2: "é".encode()[:1], 3: "é".encode()[1:], 4: b";"}

    def bytewise(ids: list[int]) -> str:
        return b"".join(parts[i] for i in ids).decode(errors="replace")

    assert token_pieces((), (1, 2, 3, 4), bytewise) == ("a", "", "é", ";")
    assert token_pieces((1, 4), (4, 2, 3), bytewise) == (";", "", "é")


def test_a_first_blank_is_kept_because_the_prompt_stands_before_it() -> None:
    def stripping(ids: list[int]) -> str:
        return decode(ids).lstrip()

    assert token_pieces((1,), (5, 3), stripping) == (" d", ";")


def test_the_cut_of_a_response_and_its_prefixes() -> None:
    stepped = cut(make_sample("s", "p", (1, 3, 5, 2, 1, 0)), SEMICOLON, decode_with_prompt)
    assert stepped.pieces == ("a;", " db;", "a") and stepped.ends == (2, 4, 6)
    start, first = stepped.prefix(0), stepped.prefix(1)
    assert (start.id, start.ids, start.text) == ("p", (), "")
    assert (first.id, first.ids, first.text) == (prefix_id("p", (1, 3)), (1, 3), "a;")
    assert first.id != prefix_id("q", (1, 3)) and first.id != prefix_id("p", (13,))


def decode_with_prompt(ids: list[int]) -> str:
    return decode([i for i in ids if i < len(WORDS)])  # the prompt's token 9 is no word


def test_a_part_has_its_tokens_and_no_end_of_sequence() -> None:
    sample = make_sample("s", "p", (1, 3, 5, 0))
    middle, rest = part(sample, 2, 3, " d"), part(sample, 2, 4, " d")
    assert middle.prompt_ids == (9, 1, 3) and middle.response_ids == (5,) and middle.logprobs == (-1.0,)
    assert middle.prompt_id == prefix_id("p", (1, 3)) and middle.finish_reason == "length"
    assert rest.response_ids == (5, 0) and rest.finish_reason == "stop"
    assert part(sample, 0, 2, "a;").prompt_id == "p"
    assert len({middle.id, rest.id, sample.id}) == 3


def test_the_first_step_of_a_continuation_may_be_all_of_it() -> None:
    def begin(ids: tuple[int, ...]) -> tuple[int, ...]:
        return first_step(make_sample("s", "p", ids), SEMICOLON, decode_with_prompt).response_ids

    assert begin((1, 3, 5, 0)) == (1, 3) and begin((1, 0)) == (1, 0)
