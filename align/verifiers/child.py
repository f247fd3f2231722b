"""The verifier process: reads jobs from standard input, writes results to standard output, dies with its parent.

Started by `align.verifiers.host` as `python -m align.verifiers.child <board fd> <parent pid> <memory bytes>`.  It never
imports torch, so it starts in a fraction of a second and can be killed at any moment without losing anything.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from align.verifiers.base import Item, Verifier, clean, judge
from align.verifiers.wire import Board, Frames, encode, plan_units

FLUSH_UNITS = 512
FLUSH_NS = 50_000_000
_PR_SET_PDEATHSIG = 1


class _Results:
    """Collects outcomes of consecutive units and sends them every 50 ms or 512 units."""

    def __init__(self, out: int, board: Board) -> None:
        self._out, self._board = out, board
        self._start, self._sent_ns = 0, time.monotonic_ns()
        self._verdicts: list[float | str] = []
        self._nanoseconds: list[int] = []

    def add(self, position: int, verdicts: list[float | str], started_ns: int) -> None:
        now = time.monotonic_ns()
        if not self._nanoseconds:
            self._start = position
        self._verdicts += verdicts
        self._nanoseconds.append(now - started_ns)
        if len(self._nanoseconds) >= FLUSH_UNITS or now - self._sent_ns > FLUSH_NS:
            self.flush()

    def flush(self) -> None:
        self._board.idle()  # a slow reader is not the verifier's fault
        if self._nanoseconds:
            message = {"from": self._start, "verdicts": self._verdicts, "nanoseconds": self._nanoseconds}
            _write(self._out, encode(message))
            self._verdicts, self._nanoseconds = [], []
        self._sent_ns = time.monotonic_ns()


def serve(build: Callable[[dict[str, Any]], Verifier]) -> None:
    """Work until standard input ends.  `build` makes a verifier from what the parent sends."""
    board_fd, parent, memory_bytes = (int(argument) for argument in sys.argv[1:4])
    _restrict(parent, memory_bytes)
    board = Board(board_fd)
    board.idle()
    out = os.dup(1)
    messages = _messages()
    settings = next(messages)
    try:
        verifiers = [build(block) for block in settings["verifiers"]]
    except Exception as error:
        _write(out, encode({"failed": clean(str(error)) or type(error).__name__}))
        return
    devnull = os.open(os.devnull, os.O_RDWR)
    os.dup2(devnull, 1)  # what a verifier prints is nobody's; results go through `out`
    os.dup2(devnull, 2)
    _write(out, encode({"ready": os.getpid()}))
    for job in messages:
        _work(job, verifiers, out, board)
        _write(out, encode({"end": True}))


def _work(job: dict[str, Any], verifiers: list[Verifier], out: int, board: Board) -> None:
    """One job: every unit from job["from"] on, except those in job["skip"]."""
    items = [Item(*row) for row in job["items"]]
    skip = set(job["skip"])
    units = plan_units(job["groups"], [v.whole_prompts for v in verifiers])
    results = _Results(out, board)
    for position in range(job["from"], len(units)):
        if position in skip:
            results.flush()  # a message holds consecutive units only
            continue
        verifier, start, stop = units[position]
        started_ns = board.start(position)
        results.add(position, judge(verifiers[verifier], items[start:stop]), started_ns)
    results.flush()


def _messages() -> Any:
    frames = Frames()
    while data := os.read(0, 2**20):
        yield from frames.feed(data)


def _write(out: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(out, view) :]


def _restrict(parent: int, memory_bytes: int) -> None:
    """Die with the parent; leave no core files; let a verifier that eats memory fail instead of the machine."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.getppid() != parent:  # it died before prctl was in force
        os._exit(1)


def _build(block: dict[str, Any]) -> Verifier:
    from pydantic import TypeAdapter

    from align.verifiers.registry import build
    from align.verifiers.spec import VerifierSpec

    return build(TypeAdapter(VerifierSpec).validate_python(block))


if __name__ == "__main__":
    serve(_build)
