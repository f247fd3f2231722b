"""The sandbox, attacked: each wall by a program that runs against it, and what happens where a wall cannot be made."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align.errors import InputError
from align.verifiers import sandbox
from align.verifiers.base import Abstain, Item
from align.verifiers.code_tests import CodeTests, code_of, io_cases
from align.verifiers.sandbox import Limits, SandboxError, run_python
from align.verifiers.spec_checks import CodeTestsSpec


def unavailable() -> str | None:
    try:
        sandbox.check_available("here")
    except InputError as error:
        return str(error)
    return None


REASON = unavailable()
needs_sandbox = pytest.mark.skipif(REASON is not None, reason=str(REASON))
SMALL = Limits(wall_s=20.0, cpu_s=2, memory_bytes=2**28, processes=4, disk_bytes=2**20, output_bytes=4096)


def said(program: str, limits: Limits = SMALL, given: bytes = b"") -> str:
    """What the program printed; it must have ended well."""
    outcome = run_python({"main.py": program}, "main.py", given, limits)
    assert (outcome.status, outcome.ended) == (0, "exited"), outcome
    return outcome.output.decode().strip()


@needs_sandbox
def test_a_program_reads_its_input_and_prints() -> None:
    assert said("print(int(input()) * 7)", given=b"6\n") == "42"
    assert said("import json, math, re, collections, itertools; print(math.comb(5, 2))") == "10"


@needs_sandbox
def test_it_sees_no_network_no_files_and_no_other_process() -> None:
    program = """
import os, socket
def attempt(action):
    try:
        return f"done: {action()!r}"
    except OSError as error:
        return type(error).__name__
print(attempt(lambda: socket.socket()))
print(attempt(lambda: socket.socket(socket.AF_UNIX)))
print(sorted(set(os.listdir("/")) & {"proc", "sys", "home", "tmp", "var", "run", "boot", "srv"}))
print(os.path.exists("/etc/passwd"), os.listdir("."), os.getpid() < 5)
print(attempt(lambda: open("/usr/written", "w")))
print(attempt(lambda: open("/written", "w")))
print(attempt(lambda: open("main.py", "w")))
print(attempt(lambda: os.kill(1, 9)))
print("SECRET" in os.environ, sorted(os.environ) == ["HOME", "LANG", "PATH", "PYTHONHASHSEED", "TMPDIR"])
open("mine", "w").write("x")
"""
    os.environ["SECRET"] = "never seen"
    try:
        lines = said(program).splitlines()
    finally:
        del os.environ["SECRET"]
    assert lines[0] == lines[1] == "PermissionError"
    assert lines[2] == "[]"
    assert lines[3] == "False ['main.py'] True"
    assert all(line in ("OSError", "PermissionError") for line in lines[4:7])
    assert lines[7] in ("PermissionError", "done: None")  # process 1 cannot be killed from inside
    assert lines[8].startswith("False")


@needs_sandbox
def test_its_input_lies_on_the_machine_and_cannot_be_written() -> None:
    program = "import os\nprint(input())\ntry: os.write(0, b'x'); print('wrote')\nexcept OSError: print('no')"
    outcome = run_python({"main.py": program}, "main.py", b"given", Limits())
    assert outcome.output == b"given\nno\n"


@needs_sandbox
def test_no_way_back_to_privileges() -> None:
    program = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def errno_of(result):
    return ctypes.get_errno() if result else "allowed"
print(errno_of(libc.unshare(0x10000000)), errno_of(libc.mount(b"none", b"/scratch", b"tmpfs", 0, None)))
print(errno_of(libc.setuid(0)), errno_of(libc.ptrace(0, 0, 0, 0)), errno_of(libc.chroot(b"/scratch")))
print(errno_of(libc.syscall(435, 0, 0)))  # clone3
print(libc.prctl(39, 0, 0, 0, 0))  # no new privileges
"""
    lines = said(program).splitlines()
    assert lines == ["1 1", "1 1 1", "38", "1"] or lines == ["1 1", "22 1 1", "38", "1"]


@needs_sandbox
def test_memory_disk_and_files_are_bounded() -> None:
    assert run_python({"m.py": "bytearray(2**29)"}, "m.py", b"", SMALL).status == 1  # MemoryError
    full = "try:\n    open('a', 'wb').write(bytes(2**21))\nexcept OSError as e:\n    print('full')"
    # The size limit of a file sends SIGXFSZ, which Python ignores, and the write fails.
    assert said(full) == "full"
    many = "n = 0\ntry:\n    while True: open(f'f{n}', 'w').close(); n += 1\nexcept OSError: print(n < 5000)"
    assert said(many) == "True"


@needs_sandbox
def test_a_fork_bomb_stays_small_and_is_gone_afterwards() -> None:
    bomb = "import os\nn = 0\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    outcome = run_python({"main.py": bomb}, "main.py", b"", Limits(wall_s=0.7, processes=4))
    assert outcome.ended == "timed out" and outcome.status is None
    counted = """
import os, time
n = 0
try:
    while n < 100:
        if os.fork() == 0:
            time.sleep(60)
        n += 1
except OSError:
    pass
os.write(1, str(n).encode())
os._exit(0)
"""
    assert int(said(counted)) == 3  # with itself four
    time.sleep(0.1)
    assert not left_behind()


def test_every_sandbox_has_a_user_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len({sandbox._user() for _ in range(50)}) == 50
    monkeypatch.setattr(os, "getpid", lambda: 4_194_303)  # the largest that Linux gives
    assert all(10**9 <= sandbox._user() < 2**32 - 2 for _ in range(1000))


def left_behind() -> list[str]:
    """Command lines of processes that run a program of the sandbox."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if b"/scratch/" in line:
                found.append(line.decode(errors="replace"))
    return found


@needs_sandbox
def test_endless_programs_are_stopped() -> None:
    limits = Limits(wall_s=0.3, cpu_s=60, output_bytes=1000)
    assert run_python({"m.py": "while True: pass"}, "m.py", b"", limits).ended == "timed out"
    assert (
        run_python({"m.py": "import time, os; os.close(1); time.sleep(60)"}, "m.py", b"", limits).ended == "timed out"
    )
    flood = run_python({"m.py": "while True: print('x' * 100)"}, "m.py", b"", Limits(output_bytes=1000))
    assert flood.ended == "wrote too much" and len(flood.output) == 1000
    killed = run_python({"m.py": "while True: pass"}, "m.py", b"", Limits(wall_s=20.0, cpu_s=1))
    assert killed.ended == "exited" and killed.status in (137, 152)  # SIGKILL or SIGXCPU at the limit


@needs_sandbox
def test_what_dies_with_its_starter() -> None:
    """A killed verifier process takes the sandbox with it."""
    code = (
        "from align.verifiers.sandbox import *; print('up', flush=True); "
        "run_python({'m.py': 'while True: pass'}, 'm.py', b'', Limits(wall_s=60, cpu_s=60))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    deadline = time.monotonic() + 10
    while not left_behind() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left_behind()
    os.killpg(process.pid, 9)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 5
    while left_behind() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left_behind()


def test_nothing_runs_where_a_wall_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A first process that cannot make its walls says so; the recipe is refused and a verdict is none."""
    broken = tmp_path / "init.py"
    broken.write_text("import os, sys; os.write(int(sys.argv[2]), b'unshare: not permitted'); os._exit(125)")
    monkeypatch.setattr(sandbox, "_INIT", broken)
    with pytest.raises(SandboxError, match="unshare: not permitted"):
        run_python({"m.py": "print(1)"}, "m.py", b"", SMALL)
    with pytest.raises(InputError, match=r"verifiers\.unit: .*never run without it: unshare: not permitted"):
        sandbox.check_available("verifiers.unit")
    with pytest.raises(Abstain, match="could not be set up: unshare: not permitted"):
        verifier().value(item("f = 1", "assert f"))


def test_an_unknown_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="it needs Linux, and this is darwin"):
        run_python({"m.py": ""}, "m.py", b"", SMALL)


# ---- the verifier ---------------------------------------------------------------------------------------------------


def verifier(**settings: object) -> CodeTests:
    block = {"kind": "code_tests", "name": "unit", "wall_s": 5.0, "processes": 4, **settings}
    return CodeTests.from_spec(CodeTestsSpec.model_validate(block))


def item(response: str, tests: str) -> Item:
    return Item("s", "p", "Write it.", response, None, 1, "stop", (("tests", tests),))


ADDS = "Here you are:\n```python\ndef add(a, b):\n    return a + b\n```\nIt adds."
TESTS = "assert add(2, 3) == 5\nassert add(-1, 1) == 0"


@needs_sandbox
@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        (ADDS, 1.0),
        (ADDS.replace("+", "-"), 0.0),
        ("def add(a, b):\n    return a + b", 1.0),  # no fence: all of it
        ("```\ndef add(a, b): return 0\n```\nBetter:\n" + ADDS, 1.0),  # the last block counts
        ("I cannot do that.", 0.0),
        ("", 0.0),
        ("import sys; sys.exit(0)", 0.0),
        ("import os; os._exit(0)", 0.0),
        ("raise SystemExit", 0.0),
        ('x = """', 0.0),
        ("print('all tests passed')\n" + ADDS.replace("+", "-"), 0.0),
        ("while True: pass", 0.0),
        ("def add(a, b):\n    return a + b\nprint('noise' * 10**6)", 1.0),
        ("def add(a, b):\n    return a + b\n# \ud800", 0.0),  # half a surrogate pair is no Python
        ("(" * 5000, 0.0),
    ],
)
def test_assertions(response: str, verdict: float) -> None:
    assert verifier(wall_s=1.0 if "while" in response else 5.0).value(item(response, TESTS)) == verdict


@needs_sandbox
def test_programs_that_read_and_print() -> None:
    cases = '[{"input": "2 3\\n", "output": "5"}, {"input": "4 4\\n", "output": "8\\n"}]'
    assert verifier().value(item("a, b = map(int, input().split())\nprint(a + b)", cases)) == 1.0
    assert verifier().value(item("print(5)", cases)) == 0.0
    assert verifier().value(item("a, b = map(int, input().split())\nprint(a + b)\nraise SystemExit(1)", cases)) == 0.0


def test_prompts_without_usable_tests_abstain() -> None:
    with pytest.raises(Abstain, match="no text in column tests"):
        verifier().value(Item("s", "p", "", "x", None, 1, "stop"))
    with pytest.raises(Abstain, match="no list of 1 to 100 cases"):
        verifier().value(item("x", "[]"))
    with pytest.raises(Abstain, match="is not an object with the texts"):
        verifier().value(item("x", '[{"input": 3, "output": "3"}]'))
    assert io_cases("assert f(1) == 2") is None
    assert code_of("a\n```py\nb\n```\n```\nc\n```", "fenced") == "c\n"
    assert code_of("a\n```py\nb\n```", "whole") == "a\n```py\nb\n```"
