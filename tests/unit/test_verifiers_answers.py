"""The final answer, agreement with the prompt's other responses, noise, and what a recipe may say of them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from align.verifiers import registry, spec
from align.verifiers.answers import Answer
from align.verifiers.base import Abstain, Item, clean, describe_error
from align.verifiers.consistency import SelfConsistency, plain
from align.verifiers.noise import Noise

GSM8K = Path(__file__).resolve().parents[3] / "shared/data/gsm8k/example_model_solutions_first660.jsonl.gz"


def item(response: str, answer: str | None = None, sample: str = "s", prompt: str = "p") -> Item:
    return Item(sample, prompt, "123+456=", response, answer, 3, "stop")


def answer(**settings: str) -> Answer:
    return Answer.from_spec(spec.AnswerSpec.model_validate({"kind": "answer", "name": "a", **settings}))


@pytest.mark.parametrize(
    ("response", "reference", "verdict"),
    [
        ("so 579", "579", 1.0),
        ("578", "579", 0.0),
        ("", "579", 0.0),  # no answer is a wrong answer
        ("I don't know", "579", 0.0),
        ("1,234", "1234", 1.0),
        ("1234", "1,234", 1.0),
        ("18", "16 - 3 = 13, no: 18 #### 18", 1.0),  # the reference may be a worked solution
        ("0579", "579", 0.0),  # equal as text
        ("579", " 579\n", 1.0),
    ],
)
def test_exact_last_number(response: str, reference: str, verdict: float) -> None:
    assert answer().value(item(response, reference)) == verdict


@pytest.mark.parametrize("reference", [None, "", "  "])
def test_without_reference_there_is_no_verdict(reference: str | None) -> None:
    with pytest.raises(Abstain, match="^the prompt has no reference answer$"):
        answer().value(item("579", reference))


def test_exact_by_other_ways() -> None:
    assert answer(extract="whole").value(item(" Paris ", "Paris")) == 1.0
    assert answer(extract="boxed").value(item(r"\boxed{\frac{1}{2}}", r"\frac{1}{2}")) == 1.0
    assert answer(extract="boxed").value(item(r"\boxed{0.5}", r"\boxed{\frac{1}{2}}")) == 0.0
    assert answer(extract="pattern", pattern=r"A: (\w+)").value(item("A: x A: yes", "yes")) == 1.0


@pytest.mark.parametrize(
    ("response", "reference", "verdict"),
    [
        (r"\boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"\boxed{1/2}", "0.5", 1.0),
        (r"\boxed{1+x}", "x+1", 1.0),
        (r"\boxed{x-1}", "x+1", 0.0),
        (r"\boxed{3\sqrt{2}}", r"\sqrt{18}", 1.0),
        (r"\boxed{\{2, 1\}}", r"\{1, 2\}", 1.0),
        (r"\boxed{(2, 1)}", "(1, 2)", 0.0),
        (r"\boxed{}", "1", 0.0),
        (r"\boxed{\frac{1}{", "1", 0.0),
        ("no box", "1", 0.0),
    ],
)
def test_mathematical_equality(response: str, reference: str, verdict: float) -> None:
    assert answer(match="math", extract="boxed").value(item(response, reference)) == verdict


def test_math_looks_through_a_whole_response_and_needs_a_readable_reference() -> None:
    assert answer(match="math", extract="whole").value(item(r"Thus it is $\frac{2}{4}$.", "1/2")) == 1.0
    assert answer(match="math").value(item("it is 579.0", "579")) == 1.0
    with pytest.raises(Abstain, match="cannot read the reference"):
        answer(match="math", extract="whole").value(item("5", "?!"))


@pytest.mark.skipif(not GSM8K.is_file(), reason="the public problems are not here")
@pytest.mark.parametrize("match", ["exact", "math"])
def test_agrees_with_the_published_grades_of_2640_real_solutions(match: str) -> None:
    verifier = answer(match=match)
    grades = []
    with gzip.open(GSM8K, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            for solved in (v for v in row.values() if isinstance(v, dict)):
                verdict = verifier.value(item(solved["solution"], row["ground_truth"]))
                grades.append((verdict == 1.0, solved["is_correct"]))
    assert len(grades) == 2640
    assert sum(ours == theirs for ours, theirs in grades) == 2640


def consistency(responses: Sequence[str], prompts: Sequence[str]) -> list[float | Abstain]:
    rows = [item(r, None, str(i), p) for i, (r, p) in enumerate(zip(responses, prompts, strict=True))]
    return SelfConsistency("c", "last_number").verify(rows)


def test_self_consistency_leaves_the_response_itself_out() -> None:
    assert consistency(["5", "so 5", "6", "none"], ["p"] * 4) == [1 / 3, 1 / 3, 0.0, 0.0]
    assert consistency(["none", "nil"], ["p"] * 2) == [0.0, 0.0]  # having no answer is no agreement
    assert consistency(["5", "7", "5", "7"], ["p", "q", "p", "q"]) == [1.0] * 4  # prompts may be interleaved


def test_self_consistency_merges_answers_that_are_the_same_number() -> None:
    assert consistency(["5", "5.0", "5.00", "6"], ["p"] * 4) == [2 / 3, 2 / 3, 2 / 3, 0.0]
    same = [("1,234.50", "1234.5"), ("-0.0", "0"), (".5", "0.50"), ("+7", "7"), ("\\frac{1}{2} x", "\\frac{1}{2}x")]
    assert all(plain(a) == plain(b) for a, b in same)
    apart = (
        ("1,2", "12"),
        ("-1", "1"),
        ("1.05", "1.5"),
        ("10", "1"),
        ("1/2", "0.5"),
        ("ab", "AB"),
        ("05", "5"),
        ("1e3", "1000"),
    )
    assert all(plain(a) != plain(b) for a, b in apart)
    assert plain(None) is None and plain(".") == "." and plain("9" * 5000) == "9" * 5000


def test_self_consistency_abstains_on_a_single_response() -> None:
    (verdict,) = consistency(["5"], ["p"])
    assert isinstance(verdict, Abstain) and str(verdict) == "the prompt has no other response"


@given(st.lists(st.sampled_from(["1", "2", "3", ""]), min_size=2, max_size=12), st.randoms())
def test_self_consistency_does_not_depend_on_order(responses: list[str], random: object) -> None:
    order = sorted(range(len(responses)), key=lambda _: random.random())  # type: ignore[attr-defined]
    straight = consistency(responses, ["p"] * len(responses))
    shuffled = consistency([responses[i] for i in order], ["p"] * len(responses))
    assert [straight[i] for i in order] == shuffled


def test_noise_has_its_rate_and_depends_on_sample_and_name_only() -> None:
    rows = [item("x", None, f"{i:016x}") for i in range(4000)]
    first, second = Noise("n", 0.3), Noise("m", 0.3)
    a, b = [first.value(i) for i in rows], [second.value(i) for i in rows]
    assert a == [first.value(i) for i in rows]
    # five standard errors of a share of 0.3 among 4000 are 0.036
    assert sum(a) / 4000 == pytest.approx(0.3, abs=0.036)
    assert sum(x * y for x, y in zip(a, b, strict=True)) / 4000 == pytest.approx(0.09, abs=0.023)  # independent
    assert {Noise("n", 0.0).value(i) for i in rows} == {0.0}
    assert {Noise("n", 1.0).value(i) for i in rows} == {1.0}


def test_reasons_are_one_printable_line() -> None:
    assert clean("a\n\tb\x1b[31m\u202e\ud800 <b>") == "a b?[31m?? <b>"
    assert len(clean("x" * 10_000)) == 200
    assert describe_error(ValueError("bad\nvalue")) == "raised ValueError: bad value"
    assert describe_error(MemoryError()) == "raised MemoryError"

    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert describe_error(Mute()) == "raised Mute"


def test_every_kind_of_the_schema_has_its_class() -> None:
    specs = get_args(get_args(spec.VerifierSpec)[0])
    kinds = {s.model_fields["kind"].annotation.__args__[0]: s for s in specs}
    assert set(kinds) == {*registry.KINDS, *registry.IN_PROCESS}
    for kind, verifier in registry.KINDS.items():
        assert verifier.kind == kinds[kind].output, kind


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"kind": "lexicon", "file": "x", "flip_rate": 0.1}, "flip_rate: turns yes and no round"),
        ({"kind": "self_consistency", "flip_rate": 0.1}, "flip_rate: turns yes and no round"),
        ({"kind": "answer", "extract": "pattern", "pattern": "a+"}, "pattern: has no group"),
        ({"kind": "answer", "extract": "pattern"}, "pattern: goes with"),
        ({"kind": "format", "pattern": "("}, "pattern: not a regular expression"),
        ({"kind": "format", "pattern": "a{99999999999}"}, "pattern: not a regular expression"),
        ({"kind": "noise", "timeout_s": 0}, "greater than 0"),
        ({"kind": "noise", "timeout_s": float("inf")}, "finite"),
        ({"kind": "length", "minimum": 3, "maximum": 2}, "maximum: is below"),
        ({"kind": "noise", "output": "score"}, "output"),
    ],
)
def test_settings_that_make_no_sense_are_refused(block: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(spec.VerifierSpec).validate_python({"name": "v", **block})
