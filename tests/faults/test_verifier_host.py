"""Verifiers that hang, crash, eat memory or lie: none with a reason for the guilty item, and nothing else changes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from align.errors import RunError
from align.verifiers import host as host_module
from align.verifiers.base import Item, Outcome
from align.verifiers.host import Host, Hosted
from align.verifiers.runner import VerifierPool
from align.verifiers.spec import VerifierSpec

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-P", str(Path(__file__).with_name("bad_verifiers.py")))
MEMORY_BYTES = 2**30


def item(index: int, response: str, prompt: str | None = None, answer: str | None = "1") -> Item:
    return Item(f"s{index}", prompt if prompt is not None else f"p{index}", "Once", response, answer, 1, "stop")


def hosted(kind: str, name: str | None = None, timeout_s: float = 0.6) -> Hosted:
    whole_prompts = kind in ("together", "short")
    return Hosted(name or kind, timeout_s, whole_prompts, {"kind": kind, "name": name or kind})


@pytest.fixture
def obedient() -> Iterator[Host]:
    host = Host([hosted("obedient")], COMMAND, MEMORY_BYTES)
    yield host
    host.close()


def run(host: Host, *responses: str) -> list[float | str | None]:
    (row,) = host.run([item(i, r) for i, r in enumerate(responses)])
    return [said(outcome) for outcome in row]


def said(outcome: Outcome) -> float | str | None:
    assert (outcome.value is None) != (outcome.reason is None)
    return outcome.value if outcome.reason is None else outcome.reason


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("hang", "timed out after 0.6 s"),
        ("exit", "stopped with exit status 3"),
        ("crash", "stopped with signal SIGSEGV"),
        ("hog", "raised MemoryError"),
        ("recurse", "raised RecursionError: maximum recursion depth exceeded"),
        ("raise", "raised ValueError: bad ?[31m value " + "x" * 164 + "…"),
        ("system exit", "raised SystemExit: 0"),
        ("run error", "raised RunError: not for a verifier to say"),
        ("abstain", "cannot say"),
        ("nan", "returned nan"),
        ("inf", "returned inf"),
        ("text", "returned str, not a number"),
        ("none", "returned NoneType, not a number"),
        ("oversleep", "timed out after 0.6 s"),
    ],
)
def test_the_guilty_item_gets_none_and_the_others_their_verdicts(obedient: Host, response: str, reason: str) -> None:
    verdicts = run(obedient, "a", "ab", response, "abc", "", response, "abcd")
    assert [v for i, v in enumerate(verdicts) if i not in (2, 5)] == [1.0, 2.0, 3.0, 0.0, 4.0]
    for verdict in (verdicts[2], verdicts[5]):
        assert isinstance(verdict, str) and verdict.startswith(reason) and len(verdict) <= 200


def test_what_is_fine_stays_fine(obedient: Host) -> None:
    """Printing harms nothing; slow but in time is in time; the process has neither torch nor tokens."""
    os.environ["HF_TOKEN"] = "hf_secret"
    try:
        verdicts = run(obedient, "print", "nap", "torch", "token", "true", "half")
    finally:
        del os.environ["HF_TOKEN"]
    assert verdicts == [0.5, 0.5, 0.0, 0.0, 1.0, 0.5]


def test_a_binary_verifier_must_say_0_or_1() -> None:
    host = Host([hosted("voter")], COMMAND)
    try:
        assert run(host, "half", "true", "a", "abc") == ["returned 0.5, not 0 or 1", 1.0, 1.0, "returned 3, not 0 or 1"]
    finally:
        host.close()


def test_a_whole_prompt_is_one_unit_with_the_time_of_its_responses() -> None:
    host = Host([hosted("together"), hosted("short")], COMMAND)
    try:
        responses = ["a", "ab", "nap", "nap", "nap", "nap", "a", "hang", "abc", "x"]
        prompts = ["p", "p", "q", "q", "q", "q", "r", "r", "t", "p"]
        items = [item(i, r, p) for i, (r, p) in enumerate(zip(responses, prompts, strict=True))]
        together, short = ([said(o) for o in row] for row in host.run(items))
        assert together == [1.0, 2.0, 0.5, 0.5, 0.5, 0.5, *["timed out after 1.2 s"] * 2, 3.0, 1.0]
        assert short[:2] == ["returned 2 verdicts for 3 responses"] * 2
        assert short[8] == "returned 0 verdicts for 1 responses"
    finally:
        host.close()


def test_results_that_were_not_yet_sent_are_not_lost(obedient: Host) -> None:
    """The child sends every 50 ms; it dies with results in hand, which are then worked out again."""
    responses = [str(i) for i in range(3000)]
    for at in (5, 6, 700, 2999):
        responses[at] = "exit"
    verdicts = run(obedient, *responses)
    expected = ["stopped with exit status 3" if r == "exit" else float(len(r)) for r in responses]
    assert verdicts == expected


def test_a_verifier_that_never_works_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "MOST_KILLS", 2)
    monkeypatch.setattr(host_module, "CHUNK_ITEMS", 4)
    host = Host([hosted("obedient"), hosted("obedient", "other")], COMMAND)
    try:
        first, other = host.run([item(i, "exit" if i < 6 else "fine") for i in range(12)])
        off = "switched off after it had to be stopped 3 times"
        assert [said(o) for o in first] == ["stopped with exit status 3"] * 3 + [off] * 9
        assert [said(o) for o in other][:4] == ["stopped with exit status 3"] * 3 + [off]
        # the next call gives it another chance
        assert [said(o) for o in host.run([item(0, "fine")])[0]] == [4.0]
    finally:
        host.close()


def test_a_child_killed_while_idle_is_replaced(obedient: Host) -> None:
    (pid,) = run(obedient, "pid")
    assert isinstance(pid, float)
    os.kill(int(pid), signal.SIGKILL)
    time.sleep(0.05)
    assert run(obedient, "ab") == [2.0]


def test_a_hang_costs_its_deadline_and_a_start(obedient: Host) -> None:
    run(obedient, "a")
    start = time.monotonic()
    run(obedient, *["abc"] * 500, "hang", *["abc"] * 500)
    assert 0.6 < time.monotonic() - start < 6.0


def test_closing_kills_the_child(obedient: Host) -> None:
    (pid,) = run(obedient, "pid")
    assert isinstance(pid, float)
    obedient.close()
    assert not _alive(int(pid))


def test_an_interrupted_call_leaves_a_host_that_works(obedient: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(host_module._Job, "take", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(obedient, "abc")
    assert run(obedient, "ab") == [2.0]


PARENT = """
import sys
from align.verifiers.base import Item
from align.verifiers.host import Host, Hosted
host = Host([Hosted("v", 60.0, False, {"kind": "obedient", "name": "v"})], sys.argv[1:])
item = lambda response: Item("s", "p", "Once", response, None, 1, "stop")
print(int(host.run([item("pid")])[0][0].value), flush=True)
host.run([item("hang")])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_the_child_dies_with_its_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, *COMMAND], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(0.2)  # it hangs in the verifier now, so it reads nothing
    assert _alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _alive(pid)


def test_a_process_that_cannot_start_says_why(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("import sys; sys.stderr.write('no such \\x1b[31mmodule'); sys.exit(7)")
    with pytest.raises(RunError, match=r"verifier process stopped with exit status 7: no such \?\[31mmodule"):
        Host([hosted("obedient")], (sys.executable, str(script))).run([item(0, "a")])
    with pytest.raises(RunError, match="could not be set up: .*nonsense"):
        Host([hosted("nonsense")], COMMAND).run([item(0, "a")])


def test_a_process_that_keeps_dying_between_verdicts_ends_the_stage(tmp_path: Path) -> None:
    script = tmp_path / "dying.py"
    script.write_text("import os; from align.verifiers.wire import encode; os.read(0, 9999)\n"
                      "os.write(1, encode({'ready': 1})); os.read(0, 9999); os._exit(5)")  # fmt: skip
    with pytest.raises(RunError, match="stopped with exit status 5 4 times between two verdicts"):
        Host([hosted("obedient")], (sys.executable, str(script))).run([item(0, "a")])


# ---- the real verifiers ------------------------------------------------------------------------------------


def pool(*blocks: dict[str, object]) -> VerifierPool:
    return VerifierPool([TypeAdapter(VerifierSpec).validate_python(block) for block in blocks], seed=0)


def test_a_pattern_that_backtracks_for_ever_times_out_by_itself() -> None:
    """The regular expression holds the interpreter, so nothing in the child could have stopped it."""
    evil = {"kind": "format", "name": "evil", "pattern": "(a+)+b", "timeout_s": 0.5}
    with pool(evil, {"kind": "length", "name": "length", "unit": "characters", "minimum": 5}) as verifiers:
        verdicts = verifiers.verify([item(0, "aab"), item(1, "a" * 40), item(2, "c")])
        assert [v.value if v.reason is None else v.reason for v in verdicts] == [
            1.0, 0.0, "timed out after 0.5 s", 1.0, 0.0, 0.0
        ]  # fmt: skip


def test_a_tower_of_powers_harms_neither_the_machine_nor_the_others() -> None:
    """math-verify would try to write 9^(9^(9^9)) out."""
    math = {"kind": "answer", "name": "math", "match": "math", "extract": "boxed", "timeout_s": 3.0}
    with pool(math) as verifiers:
        tower = r"\boxed{9^{9^{9^{9}}}}"
        verdicts = verifiers.verify([item(0, r"\boxed{1}"), item(1, tower), item(2, r"\boxed{2/2}"), item(3, tower)])
        assert [v.value for v in verdicts[::2]] == [1.0, 1.0]
        assert all(v.value != 1.0 for v in verdicts[1::2])


def test_huge_empty_and_hostile_responses() -> None:
    blocks = [
        {"kind": "answer", "name": "answer"},
        {"kind": "length", "name": "length", "unit": "characters", "minimum": 1},
        {"kind": "repetition", "name": "repetition"},
        {"kind": "readability", "name": "flesch"},
        {"kind": "self_consistency", "name": "agree"},
    ]
    huge = "ab " * 3_333_333 + "1"
    hostile = "\x1b]0;title\x07<script>alert(1)</script>\ud800\x00 1"
    for block in blocks:
        block["timeout_s"] = 60.0
    with pool(*blocks) as verifiers:
        verdicts = verifiers.verify([item(i, r, "p") for i, r in enumerate((huge, "", hostile))])
    table = {(v.sample_id, v.verifier): v.value if v.reason is None else v.reason for v in verdicts}
    assert [table[f"s{i}", "answer"] for i in range(3)] == [1.0, 0.0, 1.0]
    assert [table[f"s{i}", "length"] for i in range(3)] == [1.0, 0.0, 1.0]
    assert [table[f"s{i}", "agree"] for i in range(3)] == [0.5, 0.0, 0.5]
    assert table["s1", "repetition"] == "fewer than 4 words" and table["s1", "flesch"] == "no words in the response"
    assert table["s0", "repetition"] == pytest.approx(2 / 3_333_331)
    assert isinstance(table["s2", "flesch"], float)


def _alive(pid: int) -> bool:
    """Whether the process runs; a zombie that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
