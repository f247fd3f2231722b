"""Named points in every durable write, at which a test can kill, stop or fail this process.

ALIGN_FAULT="<point>[:<nth>][@<rank>][=<action>]" acts the nth time (first is 1) that the process of that
rank reaches the point.  The action is `kill` (SIGKILL to itself, the default), `stop` (SIGSTOP: a hang), or the
name of an error number such as ENOSPC, which is raised as the operating system would.
ALIGN_FAULT_TRACE=<file> appends the name of each point reached; that is how the tests know them all.
Without these variables a point costs two dictionary look-ups.

Example: ALIGN_FAULT="store.shard.before_rename:2@1" kills rank 1 just before its second shard is renamed.
"""

from __future__ import annotations

import errno
import os
import re
import signal
from collections import Counter
from typing import NamedTuple

_PATTERN = re.compile(r"(?P<point>[a-z0-9_.]+)(:(?P<nth>\d+))?(@(?P<rank>\d+))?(=(?P<action>\w+))?")
_reached: Counter[str] = Counter()


class Fault(NamedTuple):
    """What to do where; see the module's text."""

    point: str
    nth: int
    rank: int | None
    action: str


def parse(text: str) -> Fault:
    """Read one ALIGN_FAULT value; a value that would never act is an error, not a silent no-op."""
    match = _PATTERN.fullmatch(text)
    action = (match and match["action"]) or "kill"
    if match is None or (action not in ("kill", "stop") and not hasattr(errno, action)):
        raise ValueError(f"ALIGN_FAULT={text!r} is not <point>[:<nth>][@<rank>][=kill|stop|<errno name>]")
    return Fault(match["point"], int(match["nth"] or 1), int(match["rank"]) if match["rank"] else None, action)


def reach(point: str) -> None:
    """Mark that this process is at `point`; acts only where ALIGN_FAULT names it."""
    trace = os.environ.get("ALIGN_FAULT_TRACE")
    if trace:
        with open(trace, "a", encoding="utf-8") as file:
            file.write(f"{point}\n")
    wanted = os.environ.get("ALIGN_FAULT")
    if not wanted:
        return
    fault = parse(wanted)
    _reached[point] += 1
    rank = int(os.environ.get("RANK", "0"))
    if point != fault.point or _reached[point] != fault.nth or fault.rank not in (None, rank):
        return
    if fault.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        number = getattr(errno, fault.action)
        raise OSError(number, os.strerror(number))
