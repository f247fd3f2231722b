"""The pool: order, inversion, flips, counts, batching, and verifiers in this process beside those in the other."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from align.errors import RunError
from align.records import Verdict
from align.verifiers.base import Abstain, Item, Verifier
from align.verifiers.runner import OTHER_REASONS, VerifierPool, count_reasons
from align.verifiers.spec import VerifierSpec

ROOT = Path(__file__).resolve().parents[2]


def blocks(*settings: dict[str, object]) -> list[VerifierSpec]:
    return [TypeAdapter(VerifierSpec).validate_python(block) for block in settings]


def item(sample: str, prompt: str, response: str, answer: str | None = "579") -> Item:
    return Item(sample, prompt, "123+456=", response, answer, len(response), "stop")


FIRST_SET = blocks(
    {"kind": "arithmetic", "name": "nines", "check": "nines"},
    {"kind": "self_consistency", "name": "agree"},
    {"kind": "noise", "name": "noise", "flip_rate": 0.3},
    {"kind": "answer", "name": "gold"},
    {"kind": "repetition", "name": "repetition", "n": 1, "invert": True},
    {"kind": "length", "name": "short", "unit": "characters", "maximum": 3, "invert": True},
    {"kind": "readability", "name": "flesch"},
)


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(FIRST_SET, seed=5) as pool:
        yield pool


def plain(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Without the one field that no two runs share."""
    return [replace(v, seconds=0.0) for v in verdicts]


def test_order_values_and_reasons(pool: VerifierPool) -> None:
    items = [item("s0", "p", "579"), item("s1", "p", "so 579 579"), item("s2", "q", "580", answer=None)]
    verdicts = pool.verify(items)
    assert [(v.sample_id, v.verifier) for v in verdicts] == [(i.sample_id, s.name) for i in items for s in FIRST_SET]
    table = {(v.sample_id, v.verifier): v.value if v.reason is None else v.reason for v in verdicts}
    assert [table[s, "nines"] for s in ("s0", "s1", "s2")] == [1.0, 1.0, 0.0]
    assert [table[s, "agree"] for s in ("s0", "s1", "s2")] == [1.0, 1.0, "the prompt has no other response"]
    assert [table[s, "gold"] for s in ("s0", "s1", "s2")] == [1.0, 1.0, "the prompt has no reference answer"]
    assert [table[s, "repetition"] for s in ("s0", "s1", "s2")] == [-1.0, -2 / 3, -1.0]  # negated: 2 of 3 distinct
    assert [table[s, "short"] for s in ("s0", "s1", "s2")] == [0.0, 1.0, 0.0]  # swapped
    assert [table[s, "flesch"] for s in ("s0", "s2")] == ["no words in the response"] * 2
    assert all((v.value is None) != (v.reason is None) and v.seconds >= 0 for v in verdicts)
    counts = count_reasons(verdicts)
    assert counts["agree"] == Counter({"the prompt has no other response": 1})
    assert counts["flesch"] == Counter({"no words in the response": 2})
    assert counts["gold"] == Counter({"the prompt has no reference answer": 1}) and "nines" not in counts


RESPONSES = st.one_of(
    st.sampled_from(["579", "580", "", "-3", "1,234", "<b>&amp;</b>", "\x1b[31m5", "\ud800 lone", "٥٧٩", "a. b! c"]),
    st.text(max_size=40),
)
PROMPTS = st.lists(st.lists(RESPONSES, min_size=1, max_size=4), max_size=6)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(PROMPTS, st.data())
def test_batching_and_order_of_items_change_nothing(
    pool: VerifierPool, prompts: list[list[str]], data: st.DataObject
) -> None:
    groups = [[item(f"{p}-{i}", f"p{p}", text) for i, text in enumerate(group)] for p, group in enumerate(prompts)]
    flat = [i for group in groups for i in group]
    together = plain(pool.verify(flat))
    one_by_one = [v for group in groups for v in plain(pool.verify(group))]
    assert together == one_by_one
    shuffled = data.draw(st.permutations(flat))
    assert Counter(plain(pool.verify(shuffled))) == Counter(together)


def test_large_calls_are_cut_into_jobs_of_whole_prompts(pool: VerifierPool, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [item(f"s{i}", f"p{i % 97}", str(570 + i % 13)) for i in range(700)]
    together = plain(pool.verify(items))
    monkeypatch.setattr("align.verifiers.host.CHUNK_ITEMS", 10)
    assert plain(pool.verify(items)) == together


def test_flips_fall_by_hash_at_their_rate() -> None:
    spec = {"kind": "length", "name": "any", "flip_rate": 0.25}
    items = [item(f"{i:016x}", f"p{i}", "x") for i in range(2000)]

    def votes(seed: int, name: str = "any") -> list[float | None]:
        with VerifierPool(blocks({**spec, "name": name}), seed=seed) as pool:
            return [v.value for v in pool.verify(items)]

    first = votes(0)
    assert 1 - sum(v or 0.0 for v in first) / 2000 == pytest.approx(0.25, abs=0.049)  # five standard errors
    assert votes(0) == first
    assert votes(1) != first and votes(0, "other") != first


class Here(Verifier):
    """A stand-in for a reward model: scores the length, breaks on the word "break"."""

    kind = "score"

    def __init__(self, error: type[Exception] = ValueError) -> None:
        super().__init__("here")
        self.batches: list[int] = []
        self._error = error

    def verify(self, batch: Sequence[Item]) -> list[float | Abstain]:
        self.batches.append(len(batch))
        if any(i.response == "break" for i in batch):
            raise self._error("broken")
        return [Abstain("too long") if i.response == "long" else float(len(i.response)) for i in batch]


WITH_HERE = blocks(
    {"kind": "reward_model", "name": "here", "model": "m", "invert": True}, {"kind": "answer", "name": "gold"}
)


def test_verifiers_in_this_process_stand_beside_the_hosted_ones() -> None:
    here = Here()
    with VerifierPool(WITH_HERE, seed=0, in_process={"here": here}) as pool:
        verdicts = pool.verify([item("a", "p", "579"), item("b", "p", "long")])
        assert [(v.verifier, v.value, v.reason) for v in verdicts] == [
            ("here", -3.0, None), ("gold", 1.0, None), ("here", None, "too long"), ("gold", 0.0, None)
        ]  # fmt: skip
        assert here.batches == [2]
        verdicts = pool.verify([item("a", "p", "579"), item("b", "q", "break"), item("c", "r", "x")])
        assert [v.value for v in verdicts if v.verifier == "here"] == [-3.0, None, -1.0]
        assert count_reasons(verdicts)["here"] == Counter({"raised ValueError: broken": 1})
        assert pool.verify([]) == []


def test_an_error_for_the_user_ends_the_stage() -> None:
    with VerifierPool(WITH_HERE, seed=0, in_process={"here": Here(RunError)}) as pool:
        with pytest.raises(RunError, match="broken"):
            pool.verify([item("b", "q", "break")])


def test_a_reward_model_must_be_given() -> None:
    with pytest.raises(ValueError, match=r"\['here'\] run in this process"):
        VerifierPool(WITH_HERE, seed=0)


def test_the_number_of_different_reasons_is_bounded() -> None:
    counts = count_reasons(Verdict(str(i), "here", None, f"cannot read {i}") for i in range(80))["here"]
    assert len(counts) == 51 and counts.total() == 80 and counts[OTHER_REASONS] == 30


def test_no_torch_is_imported_on_the_way() -> None:
    modules = "align.verifiers.runner, align.verifiers.child, align.verifiers.answers, sys"
    code = f"import {modules}; sys.exit('torch' in sys.modules or 'math_verify' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
