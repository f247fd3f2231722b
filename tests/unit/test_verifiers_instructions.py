"""Instruction checks: verdicts worked out by hand, hostile text, prompts without usable checks, IFEval's own data."""

from __future__ import annotations

import json
import time

import pytest
from pydantic import ValidationError

from align.verifiers.base import Abstain, Item
from align.verifiers.instruction_checks import CHECKS, check_fault, passes
from align.verifiers.instructions import Instructions, loose_forms
from align.verifiers.spec_checks import InstructionsSpec

LETTER = (
    "Dear Ann,\n\nI came. I saw! Did I win?\n\n***\n\n- bread\n* milk\n1. eggs\n\n**Bold** and *soft* [name] <<Trip>>"
)


@pytest.mark.parametrize(
    ("check", "text", "holds"),
    [
        ({"check": "words", "minimum": 3, "maximum": 3}, "one, two three", True),
        ({"check": "words", "maximum": 2}, "one two three", False),
        ({"check": "sentences", "minimum": 3, "maximum": 3}, "I came. I saw! Did I win?", True),
        ({"check": "paragraphs", "minimum": 4, "maximum": 4}, LETTER, True),  # the rule is none
        ({"check": "lines", "maximum": 2}, "a\n\nb\n", True),
        ({"check": "characters", "maximum": 3}, " abc ", True),
        ({"check": "bullets", "minimum": 2, "maximum": 2}, LETTER, True),  # **Bold** and 1. are none
        ({"check": "numbered", "minimum": 1, "maximum": 1}, LETTER, True),
        ({"check": "headings", "minimum": 2}, "# a\n## b\n#c", True),
        ({"check": "highlights", "minimum": 2, "maximum": 2}, LETTER, True),
        ({"check": "placeholders", "minimum": 1, "maximum": 1}, LETTER, True),
        ({"check": "title"}, LETTER, True),
        ({"check": "capital_words", "minimum": 2, "maximum": 2}, "The NASA and ESA, I say", True),
        ({"check": "keyword", "word": "cat", "minimum": 1, "maximum": 1}, "Cat, concatenate", True),
        ({"check": "letter", "letter": "a", "minimum": 3, "maximum": 3}, "A banan", True),
        ({"check": "includes", "words": ["red", "blue"]}, "Blue and RED.", True),
        ({"check": "includes", "words": ["red", "blue"]}, "Blue and reddish.", False),
        ({"check": "excludes", "words": ["red"]}, "reddish", True),
        ({"check": "excludes", "words": ["c++"]}, "I like C++.", False),  # no word character at its end
        ({"check": "begins_with", "text": "Dear"}, "\ndear Ann", True),
        ({"check": "ends_with", "text": "Yours."}, 'All well. yours."', True),
        ({"check": "paragraph_begins", "number": 2, "text": "I"}, LETTER, True),
        ({"check": "paragraph_begins", "number": 9, "text": "I"}, LETTER, False),
        ({"check": "uppercase"}, "ÄRGER 1", True),
        ({"check": "uppercase"}, "12", False),
        ({"check": "lowercase"}, "straße", True),
        ({"check": "lowercase"}, "Straße", False),
        ({"check": "json"}, '{"a": [1]}', True),
        ({"check": "json"}, '```json\n{"a": 1}\n```', True),
        ({"check": "json"}, 'Here: {"a": 1}', False),
        ({"check": "json"}, "3", False),
        ({"check": "json"}, '{"a": NaN}', False),
        ({"check": "quoted"}, '"said"', True),
        ({"check": "quoted"}, '"', False),
        ({"check": "no_commas"}, "one two", True),
        ({"check": "no_commas"}, "one\u060c two", False),
        ({"check": "two_answers"}, "a\n******\nb", True),
        ({"check": "two_answers"}, "a******a", False),
    ],
)
def test_by_hand(check: dict, text: str, holds: bool) -> None:
    assert check_fault(check) is None
    assert passes(check, text) is holds


def test_repeating_the_prompt_needs_the_prompt() -> None:
    assert passes({"check": "repeats_prompt"}, "Say hi. Hi!", "say hi.")
    assert not passes({"check": "repeats_prompt"}, "Hi!", "Say hi.")
    assert not passes({"check": "repeats_prompt"}, "Hi!", "")


def item(response: str, checks: object = None) -> Item:
    columns = () if checks is None else (("checks", checks if isinstance(checks, str) else json.dumps(checks)),)
    return Item("s", "p", "Say hi.", response, None, 1, "stop", columns)


def verifier(**settings: object) -> Instructions:
    return Instructions.from_spec(
        InstructionsSpec.model_validate({"kind": "instructions", "name": "rules", **settings})
    )


def test_all_checks_of_recipe_and_prompt_must_hold() -> None:
    rules = verifier(checks=[{"check": "no_commas"}], column="checks")
    assert rules.value(item("one two", [{"check": "words", "minimum": 2}])) == 1.0
    assert rules.value(item("one two", {"check": "words", "minimum": 3})) == 0.0
    assert rules.value(item("one, two", [{"check": "words", "minimum": 2}])) == 0.0


def test_the_prompt_to_repeat_is_what_was_asked_and_not_its_chat_template() -> None:
    asked = Item("s", "p", "<|user|>Say hi.<|end|>", "Say hi. Hi!", None, 1, "stop", turns=(("user", "Say hi."),))
    assert verifier(checks=[{"check": "repeats_prompt"}]).value(asked) == 1.0


def test_silence_follows_nothing() -> None:
    assert verifier(checks=[{"check": "no_commas"}]).value(item(" \n")) == 0.0


def test_loose_lets_an_introduction_pass() -> None:
    text = "Sure, here you are:\n*hi there*\nBye, now"
    strict, loose = (verifier(checks=[{"check": "no_commas"}], loose=on) for on in (False, True))
    assert (strict.value(item(text)), loose.value(item(text))) == (0.0, 1.0)
    assert "hi there" in loose_forms(text)


def test_prompts_without_usable_checks_abstain() -> None:
    rules = verifier(column="checks")
    for checks, reason in (
        (None, "no text in column checks"),
        ("{", "is not JSON"),
        ("[" * 50_000, "is not JSON"),
        ([], "has a check"),
        ([{"check": "rm"}], "there is no check 'rm'"),
        ([{"check": "words"}], "words needs minimum, maximum or both"),
        ([{"check": "words", "minimum": "3"}], "not of the right type"),
        ([{"check": "words", "minimum": True}], "not of the right type"),
        ([{"check": "words", "minimum": -1}], "below 0"),
        ([{"check": "includes", "words": []}], "a list of texts"),
        ([{"check": "keyword", "minimum": 1}], "needs word"),
        (["words"], "a check is an object"),
    ):
        with pytest.raises(Abstain, match=reason):
            rules.value(item("x", checks))


def test_a_recipe_with_a_wrong_check_is_refused() -> None:
    with pytest.raises(ValidationError, match="words has no setting 'least'; it has minimum, maximum"):
        verifier(checks=[{"check": "words", "least": 3}])
    with pytest.raises(ValidationError, match="give at least one"):
        verifier()


def test_hostile_text_takes_no_time() -> None:
    """Patterns that backtrack would hang here."""
    texts = ["*" * 200_000, "[" * 200_000, "<<" * 100_000, "\n \n" * 60_000, "- " * 100_000]
    texts += ["a" * 200_000, '"' * 200_000]
    started_s = time.monotonic()
    for text in texts:
        for name, check in CHECKS.items():
            settings = {"check": name, "minimum": 1, "number": 1, "letter": "a"}
            settings |= {"text": "a", "word": "a", "words": ["a"]}
            check.holds(text, settings, "Say hi.")
    assert time.monotonic() - started_s < 20.0
