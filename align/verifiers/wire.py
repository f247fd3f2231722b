"""What the verifier process and its parent agree on: framed JSON, the order of work, and a board in shared memory.

JSON and never pickle: what comes back from a process that handles a model's output is data.
"""

from __future__ import annotations

import json
import mmap
import struct
import time
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any, NamedTuple

from align.verifiers.base import Item

HEADER = struct.Struct(">I")  # length of the JSON that follows, in bytes
LARGEST_FRAME = 2**31  # bytes
BOARD_BYTES = 16
IDLE = 2**64 - 1


def encode(message: Any) -> bytes:
    """One frame.  Non-ASCII is escaped, so that lone surrogates pass too; NaN and infinity are refused."""
    body = json.dumps(message, separators=(",", ":"), allow_nan=False).encode()
    if len(body) > LARGEST_FRAME:
        raise ValueError(f"a message of {len(body)} bytes is above the limit of {LARGEST_FRAME}")
    return HEADER.pack(len(body)) + body


class Frames:
    """Takes bytes as they come and gives whole messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The messages that are complete now."""
        self._buffer += data
        messages, at = [], 0
        while len(self._buffer) - at >= HEADER.size:
            (length,) = HEADER.unpack_from(self._buffer, at)
            if length > LARGEST_FRAME:
                raise ValueError(f"a frame of {length} bytes is above the limit of {LARGEST_FRAME}")
            end = at + HEADER.size + length
            if len(self._buffer) < end:
                break
            messages.append(json.loads(self._buffer[at + HEADER.size : end]))
            at = end
        del self._buffer[:at]
        return messages


def pack_item(item: Item) -> tuple[Any, ...]:
    """The fields in order; `Item(*row)` is the way back."""
    return astuple(item)


class Unit(NamedTuple):
    """The smallest piece of work that can fail by itself: one verifier on items start … stop-1 of a job."""

    verifier: int
    start: int
    stop: int


def plan_units(group_sizes: Sequence[int], whole_prompts: Sequence[bool]) -> list[Unit]:
    """The order of work on a job, which both sides derive from the same two lists.

    group_sizes: items per prompt, in order.  whole_prompts: per verifier, whether it sees whole prompts only.
    """
    count = sum(group_sizes)
    units = []
    for verifier, whole in enumerate(whole_prompts):
        start = 0
        for size in group_sizes if whole else [1] * count:
            units.append(Unit(verifier, start, start + size))
            start += size
    return units


class Board:
    """Which unit is in progress and since when, in 16 bytes of memory that parent and child share.

    A message could not say it: a verifier that hangs inside one regular expression holds the interpreter, and then
    nothing in the child can speak.  The clock is CLOCK_MONOTONIC, which all processes of a machine read alike.
    """

    def __init__(self, fileno: int) -> None:
        self._map = mmap.mmap(fileno, BOARD_BYTES)
        self._cells = memoryview(self._map).cast("Q")

    def start(self, position: int) -> int:
        """The child begins unit `position`; returns the time in nanoseconds."""
        now = time.monotonic_ns()
        self._cells[1] = now  # before the position: a reader that sees the new position never sees the old time
        self._cells[0] = position
        return now

    def idle(self) -> None:
        """The child works on no unit."""
        self._cells[0] = IDLE

    def read(self) -> tuple[int, int]:
        """(position or IDLE, nanoseconds of its start)."""
        position = self._cells[0]
        return position, self._cells[1]

    def close(self) -> None:
        """Unmap."""
        self._cells.release()
        self._map.close()
