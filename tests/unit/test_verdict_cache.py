"""Verdicts remembered across calls, rounds and runs; several processes at the same time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from align.verifiers.base import Abstain, Item, Verifier
from align.verifiers.cache import FILE, VerdictCache, identity, item_key, remembers
from align.verifiers.runner import VerifierPool
from align.verifiers.spec import VerifierSpec

ROOT = Path(__file__).resolve().parents[2]


def block(**settings: object) -> VerifierSpec:
    return TypeAdapter(VerifierSpec).validate_python(settings)


HERE = block(kind="reward_model", name="here", model="m")


def item(sample: str, response: str, prompt: str = "p") -> Item:
    return Item(sample, prompt, f"{prompt}?", response, None, len(response), "stop")


class Scorer(Verifier):
    """Scores the length, and remembers what it was asked."""

    kind = "score"

    def __init__(self) -> None:
        super().__init__("here")
        self.asked: list[str] = []

    def verify(self, batch: Sequence[Item]) -> list[float | Abstain]:
        self.asked += [i.response for i in batch]
        return [Abstain("empty") if not i.response else float(len(i.response)) for i in batch]


def test_what_was_judged_before_is_not_asked_again(tmp_path: Path) -> None:
    first, scorer = [item("a", "xx"), item("b", "xx"), item("c", ""), item("d", "xxx", "q")], Scorer()
    with VerifierPool([HERE], 0, {"here": scorer}, VerdictCache(tmp_path)) as pool:
        verdicts = pool.verify(first, "run/0")
        assert [(v.value, v.reason) for v in verdicts] == [(2.0, None), (2.0, None), (None, "empty"), (3.0, None)]
        assert scorer.asked == ["xx", "", "xxx"]  # equal responses to one prompt are one question
        assert [v.seconds > 0 for v in verdicts] == [True, False, True, True]
        again = pool.verify([item("e", "xx"), item("f", ""), item("g", "xx", "q")], "run/1")
        assert [v.value for v in again] == [2.0, None, 2.0] and again[0].seconds == 0.0
        assert scorer.asked == ["xx", "", "xxx", "", "xx"]  # a silence is asked again, another prompt is another key
    other = Scorer()
    with VerifierPool([HERE], 0, {"here": other}, VerdictCache(tmp_path)) as pool:
        assert [v.value for v in pool.verify(first, "another run/0")] == [2.0, 2.0, None, 3.0]
        assert other.asked == [""]
        pool.verify(first)  # without a stage nothing is remembered or looked up
        assert other.asked == ["", "xx", "xx", "", "xxx"]


def test_a_stage_begun_again_asks_what_it_asked_the_first_time(tmp_path: Path) -> None:
    cache, keys = VerdictCache(tmp_path), [b"k" * 16]
    cache.put({keys[0]: 2.0}, "run/0")
    assert cache.get(keys, "run/0") == {} and cache.get(keys, "run/1") == {keys[0]: 2.0}
    cache.put({keys[0]: 1.0}, "run/0")  # another rank's last bits: the smaller, whoever came first
    cache.put({keys[0]: 3.0}, "run/0")
    cache.put({keys[0]: 0.0}, "run/1")  # a later stage changes nothing
    assert cache.get(keys, "run/2") == {keys[0]: 1.0}


def test_the_key_holds_all_that_a_verdict_depends_on(tmp_path: Path) -> None:
    words = tmp_path / "words"
    words.write_text("one\n")
    spec = block(kind="vocabulary", name="v", file=str(words))
    same = block(kind="vocabulary", name="w", file=str(words), invert=True, timeout_s=9.0, family="f", workers=2)
    assert identity(spec) == identity(same) != identity(spec, "bfloat16")
    before = identity(spec)
    words.write_text("two\n")
    assert identity(spec) != before
    base = replace(item("a", "xx"), answer="1", columns=(("tests", "t"),))
    key = item_key(before, base)
    assert item_key(before, replace(base, sample_id="z", prompt_id="z")) == key
    changes: list[dict[str, object]] = [
        {"prompt": "q"}, {"response": "\ud800"}, {"answer": None}, {"response_tokens": 9}, {"finish_reason": "length"},
        {"columns": ()}, {"prompt": "p?x", "response": "x"}, {"turns": (("user", "p?"),)},
    ]  # fmt: skip
    keys = {item_key(before, replace(base, **change)) for change in changes}  # type: ignore[arg-type]
    assert len(keys) == len(changes) and key not in keys


@pytest.mark.parametrize(
    ("spec", "kept"),
    [
        (block(kind="noise", name="n", workers=2), False),
        (block(kind="self_consistency", name="s", workers=2), False),
        (block(kind="arithmetic", name="a", check="nines"), False),  # asking is as quick
        (block(kind="format", name="f", pattern="x"), True),
        (block(kind="answer", name="m", match="math"), True),
        (HERE, True),
    ],
    ids=lambda x: x.kind if hasattr(x, "kind") else "",
)
def test_no_coin_and_no_look_at_other_responses_is_remembered(spec: VerifierSpec, kept: bool) -> None:
    assert remembers(spec) is kept


def test_a_damaged_file_is_begun_anew_and_told(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"not a database" * 100)
    told: list[str] = []
    cache = VerdictCache(tmp_path, tell=told.append)
    assert len(told) == 1 and "damaged" in told[0]
    cache.put({b"k" * 16: 1.0}, "a")
    assert cache.get([b"k" * 16], "b") == {b"k" * 16: 1.0}


def test_a_place_that_cannot_be_written_ends_its_use_and_is_told(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    told: list[str] = []
    cache = VerdictCache(tmp_path, tell=told.append)
    cache.put({b"k" * 16: 1.0}, "a")
    assert cache.get([b"k" * 16], "b") == {} and "not remembered" in told[0]


def test_what_was_put_is_there_after_kill_9(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from align.verifiers.cache import VerdictCache\n"
        "cache = VerdictCache(Path(sys.argv[1]))\n"
        "for n in range(10**9):\n"
        "    cache.put({f'{n}-{i}'.encode(): float(n) for i in range(50)}, 's'); print(n, flush=True)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    seen = [int(child.stdout.readline()) for _ in range(20)][-1]
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    told: list[str] = []
    cache = VerdictCache(tmp_path, tell=told.append)
    assert not told
    for n in range(seen + 1):
        assert len(cache.get([f"{n}-{i}".encode() for i in range(50)], "t")) == 50
    later = [len(cache.get([f"{n}-{i}".encode() for i in range(50)], "t")) for n in range(seen + 1, seen + 200)]
    assert set(later) <= {0, 50}  # whole or not at all


def test_a_slow_verifier_holds_nobody_up_and_deadlines_are_its_own() -> None:
    """Each of two patterns needs its whole deadline; side by side they take one (3 s), in turn they would take two."""
    evil = "(a+)+b"
    specs = [
        block(kind="format", name="slow", pattern=evil, timeout_s=3.0),
        block(kind="format", name="slow_too", pattern=evil, timeout_s=3.0),
        block(kind="length", name="length", unit="characters", minimum=5),
    ]
    with VerifierPool(specs, seed=0) as pool:
        pool.verify([item("w", "aab")])  # processes up
        start = time.monotonic()
        verdicts = pool.verify([item("a", "a" * 40), item("b", "aab", "q")])
        seconds = time.monotonic() - start
    table = {(v.sample_id, v.verifier): v.reason or v.value for v in verdicts}
    assert table["a", "slow"] == table["a", "slow_too"] == "timed out after 3 s"
    assert [table["b", n] for n in ("slow", "slow_too", "length")] == [1.0, 1.0, 0.0] and table["a", "length"] == 1.0
    assert seconds < 6.0


def test_workers_share_the_prompts_and_change_nothing() -> None:
    items = [item(f"{p}{i}", "x" * (p + i), f"p{p}") for p in range(7) for i in range(3)]
    spec = {"kind": "self_consistency", "name": "agree", "extract": "whole"}
    found = []
    for workers in (1, 3):
        with VerifierPool([block(**spec, workers=workers)], seed=0) as pool:
            found.append([(v.sample_id, v.value) for v in pool.verify(items)])
    assert found[0] == found[1] and {value for _, value in found[0]} == {0.0}
