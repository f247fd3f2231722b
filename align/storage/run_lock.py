"""One run at a time in a run directory.

Rank 0 holds `lock` exclusively; the other ranks share `lock.ranks`, so that a new run cannot begin while a rank of a
killed one still writes.  The kernel drops both with the process, so a dead owner needs no clean-up.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from align.errors import RunError
from align.storage.durable import disk_error

_ALIVE_GRACE_S = 0.2  # a rerun right after kill -9 may come before the kernel has cleaned up
_DYING_GRACE_S = 10.0  # a process that is being killed holds its lock until its memory is freed
_POLL_S = 0.01

_held: set[int] = set()  # descriptors with a lock on them


def _forget_in_child() -> None:
    """A forked child must not keep its parent's locks alive."""
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)


class RunLock:
    """A lock on a file, held until `release` or the end of the process."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self._handle = handle

    @classmethod
    def own(cls, directory: Path) -> RunLock:
        """Take the directory for this process, or say who has it."""
        lock = cls._take(directory / "lock", fcntl.LOCK_EX, directory)
        try:
            cls._take(directory / "lock.ranks", fcntl.LOCK_EX, directory, _DYING_GRACE_S).release()
        except RunError:
            lock.release()
            raise
        lock._sign()
        return lock

    @classmethod
    def join(cls, directory: Path) -> RunLock:
        """Say that this rank belongs to the owner; called while the owner holds the directory."""
        lock = cls._take(directory / "lock.ranks", fcntl.LOCK_SH, directory)
        lock._sign()
        return lock

    @classmethod
    def _take(cls, path: Path, mode: int, directory: Path, grace_s: float = _ALIVE_GRACE_S) -> RunLock:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise disk_error(path, error) from error
        began = time.monotonic()
        while True:
            try:
                fcntl.flock(handle, mode | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                owner = _read_owner(path)
                waited = time.monotonic() - began
                if waited > (_DYING_GRACE_S if _is_dying(owner) else grace_s):
                    os.close(handle)
                    raise RunError(_refusal(directory, owner)) from None
                time.sleep(_POLL_S)
            except OSError as error:
                os.close(handle)
                raise RunError(f"{path}: this file system cannot lock files ({error.strerror})") from error
        _held.add(handle)
        return cls(path, handle)

    def _sign(self) -> None:
        """Leave a note for whoever is refused."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        note = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}) + "\n"
        try:
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, note.encode(), 0)
        except OSError as error:
            self.release()
            raise disk_error(self.path, error, len(note)) from error

    def release(self) -> None:
        """Let go; harmless when it is done twice."""
        if self._handle in _held:
            _held.discard(self._handle)
            os.close(self._handle)


def _read_owner(path: Path) -> dict[str, object]:
    try:
        owner = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_dying(owner: dict[str, object]) -> bool:
    """Whether the owner is a process of this machine that has been killed but is not quite gone.

    A process that is being taken down has no memory left, so its command line reads as empty.
    """
    if owner.get("host") != socket.gethostname() or not Path("/proc/self").exists():
        return False
    try:
        return Path(f"/proc/{owner.get('pid')}/cmdline").read_bytes() == b""
    except OSError:
        return True


def _refusal(directory: Path, owner: dict[str, object]) -> str:
    who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}, since {owner.get('since', '?')}"
    return (
        f"run directory {directory} is in use by {who}. Wait for it or stop it; to start another run, "
        "change `name` or `output_dir` in the recipe."
    )
