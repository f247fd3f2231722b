"""Runs a Python program that nobody trusts: no network, no files but its own, bounded in every direction.

Linux only, by namespaces, resource limits and a filter of system calls (`align.verifiers.sandbox_init` makes them).
Where a part of it cannot be set up nothing is run: `SandboxError` says what is missing.  What it does not bound is the
memory of all processes together beyond `processes * memory`, and what a program may learn of the machine's processor.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from align.errors import InputError

_INIT = Path(__file__).with_name("sandbox_init.py")
_SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/scratch",
    "TMPDIR": "/scratch",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
}
_FIRST_USER = 1_000_000_000  # far above any user of a machine
_USERS = 700  # that one process gives its sandboxes, one after the other; for all of them there is room below 2^32
_LARGEST_PID = 4_194_304
_started = itertools.count()
SETUP_S = 30.0  # longest time until the program runs


class SandboxError(Exception):
    """The sandbox could not be set up, so nothing was run; the message is the reason."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Example: Limits(wall_s=10.0, cpu_s=10, memory_bytes=2**29, processes=8, disk_bytes=2**26, output_bytes=2**20)
    """

    wall_s: float = 10.0
    cpu_s: int = 10  # of each process
    memory_bytes: int = 2**29  # address space of each process
    processes: int = 8  # and threads, together
    disk_bytes: int = 2**26  # of the scratch folder
    output_bytes: int = 2**20


class Outcome(NamedTuple):
    """How a program ended.

    Example: Outcome(status=0, output=b"42", ended="exited", seconds=0.06)
    """

    status: int | None  # exit status, 128 + n after signal n; None where it was stopped
    output: bytes  # standard output, at most `output_bytes`
    ended: str  # "exited", "timed out" or "wrote too much"
    seconds: float


def run_python(files: Mapping[str, str], entry: str, given: bytes, limits: Limits) -> Outcome:
    """Run `files[entry]` in the scratch folder by this interpreter without site packages; `given` is its input."""
    started_s = time.monotonic()
    if sys.platform != "linux":
        raise SandboxError(f"it needs Linux, and this is {sys.platform}")
    interpreter = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    try:
        settings = {
            "folders": _folders(),
            "files": dict(files),
            "command": [interpreter, "-I", "-S", "-B", f"/scratch/{entry}"],
            "environment": _ENVIRONMENT,
            "uid": _user(),
            "memory_bytes": limits.memory_bytes,
            "cpu_s": limits.cpu_s,
            "processes": limits.processes,
            "disk_bytes": limits.disk_bytes,
        }
        return _run(interpreter, settings, given, limits, started_s)
    except OSError as error:
        raise SandboxError(f"{interpreter} could not be started: {error.strerror or error}") from None


def _user() -> int:
    """A user for one sandbox.  Processes are counted by user, and those of the sandbox before may still be dying."""
    return _FIRST_USER + os.getpid() % _LARGEST_PID * _USERS + next(_started) % _USERS


def _folders() -> list[str]:
    """What the interpreter needs of the file system: the system's libraries and its own prefix."""
    found = [path for path in _SYSTEM if os.path.exists(path)]
    for prefix in {os.path.realpath(sys.base_prefix), os.path.realpath(sys.base_exec_prefix)}:
        if not any(prefix == path or prefix.startswith(path + "/") for path in found):
            found.append(prefix)
    return found


def _run(interpreter: str, settings: dict[str, Any], given: bytes, limits: Limits, started_s: float) -> Outcome:
    status_from, status_to = os.pipe()
    with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as input_file:
        told.write(json.dumps(settings).encode())
        told.seek(0)
        input_file.write(given)
        input_file.flush()
        with (
            open(f"/proc/self/fd/{input_file.fileno()}", "rb") as to_read,  # opened anew: it may not be written inside
            subprocess.Popen(
                [interpreter, "-I", "-S", str(_INIT), str(told.fileno()), str(status_to)],
                stdin=to_read,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=[told.fileno(), status_to],
                env=_ENVIRONMENT,
                bufsize=0,
            ) as process,
        ):
            os.close(status_to)
            try:
                _wait_for_walls(status_from)
                output, ended = _read(process, limits, time.monotonic() + limits.wall_s)
                status = process.wait(timeout=SETUP_S) if ended == "exited" else None
            finally:
                process.kill()  # process 1 inside dies with it, and everything inside with that
                os.close(status_from)
    return Outcome(status, output, ended, time.monotonic() - started_s)


def _wait_for_walls(status_from: int) -> None:
    """Return when the program has been started; raise where a wall could not be made."""
    if not select.select([status_from], [], [], SETUP_S)[0]:
        raise SandboxError(f"it was not ready after {SETUP_S:g} s")
    complaint = os.read(status_from, 4096)
    if complaint:
        raise SandboxError(complaint.decode(errors="replace"))


def _read(process: subprocess.Popen[bytes], limits: Limits, deadline_s: float) -> tuple[bytes, str]:
    """Standard output until it ends, the time is over, or it is too much."""
    assert process.stdout is not None
    watched = select.poll()
    watched.register(process.stdout.fileno(), select.POLLIN)
    output = bytearray()
    while (left_s := deadline_s - time.monotonic()) > 0:
        if not watched.poll(left_s * 1000):
            continue
        data = os.read(process.stdout.fileno(), 65536)
        if not data:
            return _wait(process, bytes(output), deadline_s)
        output += data
        if len(output) > limits.output_bytes:
            return bytes(output[: limits.output_bytes]), "wrote too much"
    return bytes(output), "timed out"


def _wait(process: subprocess.Popen[bytes], output: bytes, deadline_s: float) -> tuple[bytes, str]:
    """A program may close its output and go on."""
    try:
        process.wait(timeout=max(0.0, deadline_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        return output, "timed out"
    return output, "exited"


def check_available(where: str) -> None:
    """Refuse the recipe key `where` on a machine that cannot make the sandbox."""
    try:
        outcome = run_python({"main.py": "print(6 * 7)"}, "main.py", b"", Limits())
    except SandboxError as error:
        raise InputError(
            f"{where}: this machine cannot make the sandbox in which code is tested, and code is never run without "
            f"it: {error}. It needs Linux 5.14 or newer with user namespaces, or root with CAP_SYS_ADMIN"
        ) from None
    if outcome.output != b"42\n":
        raise InputError(
            f"{where}: the interpreter does not run inside the sandbox (exit status {outcome.status}, "
            f"{outcome.ended}): {sys.base_prefix} must be readable by every user"
        )
