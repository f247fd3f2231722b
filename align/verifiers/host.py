"""Runs verifiers in a process that can be killed, so that no verifier can stop, crash or starve a run.

The child works through a job one unit at a time and streams results; a board in shared memory says which unit is in
progress and since when.  A unit that outlives its deadline, or takes the process down with it, gets none with the
reason; the process group is killed, started afresh, and goes on behind the guilty unit.  Every other unit gets the
same result as if the guilty one had not been there.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from align.errors import RunError
from align.verifiers.base import Item, Outcome, clean
from align.verifiers.wire import BOARD_BYTES, IDLE, Board, Frames, encode, pack_item, plan_units

MEMORY_BYTES = 4 * 2**30  # address space of the process
START_S = 120.0  # to start and read the word lists; also the longest silence between two units
POLL_S = 0.02
MOST_KILLS = 50  # per verifier and call; after that it is switched off for the rest of the call
MOST_IDLE_DEATHS = 3  # in a row, without any verifier to blame
CHUNK_ITEMS = 1024
CHUNK_CHARACTERS = 8 * 2**20
COMMAND = (sys.executable, "-P", "-m", "align.verifiers.child")
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "PYTHONPATH")


class Hosted(NamedTuple):
    """A verifier as the host knows it: `block` is what the child builds it from."""

    name: str
    timeout_s: float
    whole_prompts: bool
    block: dict[str, Any]


class Host:
    """The verifiers of one run in one child process, started at the first call."""

    def __init__(
        self, verifiers: Sequence[Hosted], command: Sequence[str] = COMMAND, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        self._verifiers, self._command, self._memory_bytes = tuple(verifiers), tuple(command), memory_bytes
        self._process: _Process | None = None

    def run(self, items: Sequence[Item]) -> list[list[Outcome]]:
        """Outcomes [verifier][item], in the order of `items`; items of one prompt need not stand together."""
        outcomes: list[list[Outcome]] = [[] for _ in self._verifiers]
        if not self._verifiers:
            return outcomes
        order: list[int] = []
        kills: Counter[int] = Counter()
        try:
            for chunk in _chunks(items):
                job = _Job(self._verifiers, [[items[i] for i in group] for group in chunk])
                self._finish(job, kills)
                for verifier, row in enumerate(job.outcomes):
                    outcomes[verifier] += row
                order += [i for group in chunk for i in group]
        except BaseException:
            self.close()  # the stream of messages is cut somewhere in the middle
            raise
        where = {index: at for at, index in enumerate(order)}
        return [[row[where[i]] for i in range(len(items))] for row in outcomes]

    def close(self) -> None:
        """End the process; the next call starts another."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    def _finish(self, job: _Job, kills: Counter[int]) -> None:
        """Work on the job until every unit has its outcomes."""
        idle_deaths = 0
        for verifier, count in kills.items():
            if count > MOST_KILLS:
                job.switch_off(verifier)
        while job.pending():
            fault = self._attempt(job)
            if fault is None:
                continue
            self.close()
            if fault.position is None:
                idle_deaths += 1
                if idle_deaths > MOST_IDLE_DEATHS:
                    raise RunError(f"the verifier process {fault.reason} {idle_deaths} times between two verdicts")
                continue
            idle_deaths = 0
            verifier = job.units[fault.position].verifier
            job.fail(fault.position, fault.reason, fault.seconds)
            kills[verifier] += 1
            if kills[verifier] > MOST_KILLS:
                job.switch_off(verifier)

    def _attempt(self, job: _Job) -> _Fault | None:
        """Send what is left of the job and take results until the child says it is through, or something is wrong."""
        if self._process is None:
            blocks = [v.block for v in self._verifiers]
            self._process = _Process(self._command, self._memory_bytes, {"verifiers": blocks})
        process = self._process
        if not process.send(job.message()):
            return _Fault(None, process.describe_end(), 0.0)
        heard_s = time.monotonic()
        suspect: tuple[int, int] | None = None
        while True:
            messages = process.receive(POLL_S)
            if messages is None:
                reason = process.describe_end()
                position, _ = process.board.read()
                return _Fault(None if position == IDLE else position, reason, 0.0)
            for message in messages:
                if "end" in message:
                    return None
                job.take(message)
            position, started_ns = process.board.read()
            late_s = _late_s(job, position, started_ns, time.monotonic() - heard_s)
            if messages or late_s is None:
                suspect = None
                heard_s = time.monotonic() if messages or position != IDLE else heard_s
            elif suspect != (position, started_ns):
                suspect = position, started_ns  # look twice: the child may be just between two units
            elif position == IDLE:
                return _Fault(None, f"said nothing for {START_S:g} s", late_s)
            else:
                return _Fault(position, job.timed_out(position), late_s)


def _late_s(job: _Job, position: int, started_ns: int, silent_s: float) -> float | None:
    """Seconds that the unit in progress (or the silence between units) has taken, where that is too long."""
    if position == IDLE:
        return silent_s if silent_s > START_S else None
    seconds = (time.monotonic_ns() - started_ns) / 1e9
    return seconds if seconds > job.limit_s(position) else None


class _Fault(NamedTuple):
    position: int | None  # the guilty unit; None where the process died between units
    reason: str
    seconds: float


class _Job:
    """A chunk of whole prompts, its units of work and their outcomes so far."""

    def __init__(self, verifiers: Sequence[Hosted], groups: Sequence[Sequence[Item]]) -> None:
        self._verifiers, self._items = verifiers, [item for group in groups for item in group]
        self._sizes = [len(group) for group in groups]
        self.units = plan_units(self._sizes, [v.whole_prompts for v in verifiers])
        self._done = bytearray(len(self.units))
        missing = Outcome(None, "not judged")
        self.outcomes: list[list[Outcome]] = [[missing] * len(self._items) for _ in verifiers]

    def pending(self) -> bool:
        return 0 in self._done

    def message(self) -> bytes:
        """What the child has to do, from the first unit without an outcome."""
        first = self._done.index(0)
        skip = [p for p in range(first, len(self.units)) if self._done[p]]
        rows = [pack_item(item) for item in self._items]
        return encode({"items": rows, "groups": self._sizes, "from": first, "skip": skip})

    def take(self, message: dict[str, Any]) -> None:
        """Store outcomes of consecutive units; one that came, but too late, is none like one that never came."""
        cursor = 0
        for position, nanoseconds in enumerate(message["nanoseconds"], start=message["from"]):
            unit = self.units[position]
            size = unit.stop - unit.start
            verdicts = message["verdicts"][cursor : cursor + size]
            cursor += size
            if nanoseconds / 1e9 > self.limit_s(position):
                self.fail(position, self.timed_out(position), nanoseconds / 1e9)
                continue
            seconds = nanoseconds / 1e9 / size
            row = self.outcomes[unit.verifier]
            for index, verdict in enumerate(verdicts, start=unit.start):
                reason = verdict if isinstance(verdict, str) else None
                row[index] = Outcome(None if reason is not None else verdict, reason, seconds)
            self._done[position] = 1

    def fail(self, position: int, reason: str, seconds: float) -> None:
        unit = self.units[position]
        size = unit.stop - unit.start
        self.outcomes[unit.verifier][unit.start : unit.stop] = [Outcome(None, reason, seconds / size)] * size
        self._done[position] = 1

    def switch_off(self, verifier: int) -> None:
        """Judge nothing more by this verifier."""
        reason = f"switched off after it had to be stopped {MOST_KILLS + 1} times"
        for position, unit in enumerate(self.units):
            if unit.verifier == verifier and not self._done[position]:
                self.fail(position, reason, 0.0)

    def limit_s(self, position: int) -> float:
        """A unit of several responses has their time together."""
        unit = self.units[position]
        return self._verifiers[unit.verifier].timeout_s * (unit.stop - unit.start)

    def timed_out(self, position: int) -> str:
        return f"timed out after {self.limit_s(position):g} s"


def _chunks(items: Sequence[Item]) -> Iterator[list[list[int]]]:
    """Indices of the items by prompt, in chunks of whole prompts that make messages of sensible size."""
    groups: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(item.prompt_id, []).append(index)
    chunk: list[list[int]] = []
    count = characters = 0
    for group in groups.values():
        size = sum(len(items[i].response) + len(items[i].prompt) for i in group)
        if chunk and (count + len(group) > CHUNK_ITEMS or characters + size > CHUNK_CHARACTERS):
            yield chunk
            chunk, count, characters = [], 0, 0
        chunk.append(group)
        count, characters = count + len(group), characters + size
    if chunk:
        yield chunk


class _Process:
    """One child with its pipes and board."""

    def __init__(self, command: Sequence[str], memory_bytes: int, settings: dict[str, Any]) -> None:
        self._frames, self._complaints = Frames(), tempfile.TemporaryFile()
        with tempfile.TemporaryFile() as shared:
            shared.truncate(BOARD_BYTES)
            self.board = Board(shared.fileno())
            self.board.idle()
            self._popen = subprocess.Popen(
                [*command, str(shared.fileno()), str(os.getpid()), str(memory_bytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                bufsize=0,
                pass_fds=[shared.fileno()],
                start_new_session=True,
                env=_environment(),
            )
        assert self._popen.stdin is not None and self._popen.stdout is not None
        self._to, self._from = self._popen.stdin.fileno(), self._popen.stdout.fileno()
        os.set_blocking(self._to, False)
        self._readable = select.poll()  # not select(): a training process has more than 1,024 open files
        self._readable.register(self._from, select.POLLIN)
        self._writable = select.poll()
        self._writable.register(self._to, select.POLLOUT)
        try:
            self._wait_until_ready(settings)
        except BaseException:
            self.stop()
            raise

    def _wait_until_ready(self, settings: dict[str, Any]) -> None:
        deadline_s = time.monotonic() + START_S
        messages: list[Any] | None = [] if self.send(encode(settings)) else None
        while messages == [] and time.monotonic() < deadline_s:
            messages = self.receive(0.2)
        if messages and "ready" in messages[0]:
            return
        if messages:
            raise RunError(f"the verifiers could not be set up: {messages[0]['failed']}")
        end = self.describe_end() if messages is None else f"was not ready after {START_S:g} s"
        self._complaints.seek(0)
        tail = clean(self._complaints.read()[-600:].decode(errors="replace"))
        raise RunError(f"the verifier process {end}{': ' if tail else ''}{tail}")

    def send(self, data: bytes) -> bool:
        """Whether all of it went out; not, where the child is gone or has not read for `START_S`."""
        view = memoryview(data)
        while view:
            try:
                if not self._writable.poll(START_S * 1000):
                    return False
                view = view[os.write(self._to, view) :]
            except BrokenPipeError:
                return False
        return True

    def receive(self, wait_s: float) -> list[Any] | None:
        """Messages that came within `wait_s`, perhaps none; None where the child has closed its end."""
        if not self._readable.poll(wait_s * 1000):
            return []
        data = os.read(self._from, 2**20)
        return self._frames.feed(data) if data else None

    def describe_end(self) -> str:
        """How the process ended, killing it where it has not.  Example: "stopped with exit status 3"."""
        try:
            code = self._popen.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            return "closed its output"
        return f"stopped with signal {signal.Signals(-code).name}" if code < 0 else f"stopped with exit status {code}"

    def stop(self) -> None:
        """Kill the whole process group and let go of everything."""
        try:
            os.killpg(self._popen.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # already gone
        self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout, self._complaints):
            if pipe is not None:
                pipe.close()
        self.board.close()


def _environment() -> dict[str, str]:
    """What the child needs and no more: no tokens, one thread, the same hash order in every run."""
    kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, kept["PYTHONPATH"]] if kept.get("PYTHONPATH") else [root])
    return kept | {"PYTHONPATH": path, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
