"""metrics.jsonl: one line per step, appended by one write, cut back to the checkpoint that a run resumes from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from align.faults import reach
from align.storage.durable import disk_error, os_errors, sync_file, to_json, write_file


class Truncation(NamedTuple):
    """What `truncate` did, in lines."""

    kept: int
    dropped: int  # of steps that will be made again
    torn: int  # that a kill or a power loss left unreadable


class MetricsLog:
    """The metrics of a run.  Lines hold JSON objects with an integer "step"."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._clean = False  # whether the file is known to end with a whole line

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one line.  Where the last line was torn, it is ended first so that it spoils no other."""
        if type(row.get("step")) is not int:
            raise ValueError(f"a metrics line needs an integer `step`, not {row.get('step')!r}")
        line = to_json(row, indent=None)
        try:
            reach("store.metrics.before_open")
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
            try:
                if not self._clean and self._ends_torn():
                    line = b"\n" + line
                reach("store.metrics.before_write")
                if os.write(handle, line) != len(line):
                    self._clean = False
                    raise OSError(28, "No space left on device")
                self._clean = True
                reach("store.metrics.after_write")
            finally:
                os.close(handle)
        except OSError as error:
            raise disk_error(self._path, error, len(line)) from error

    def _ends_torn(self) -> bool:
        size = self._path.stat().st_size
        if size == 0:
            return False
        with self._path.open("rb") as file:
            file.seek(size - 1)
            return file.read(1) != b"\n"

    def truncate(self, after_step: int) -> Truncation:
        """Drop the lines of later steps and torn ones; the file is replaced as a whole."""
        lines = self._lines()
        rows = [_parse(line) for line in lines]
        kept = [line for line, row in zip(lines, rows, strict=True) if row is not None and row["step"] <= after_step]
        torn = rows.count(None)
        if len(kept) < len(lines):
            write_file(self._path, b"".join(line + b"\n" for line in kept), "store.metrics.truncate")
            self._clean = True
        return Truncation(len(kept), len(lines) - len(kept) - torn, torn)

    def read(self) -> list[dict[str, Any]]:
        """All whole lines."""
        return [row for row in map(_parse, self._lines()) if row is not None]

    def sync(self) -> None:
        """Make the lines durable; called with each checkpoint."""
        if self._path.exists():
            with os_errors(self._path):
                sync_file(self._path)

    def _lines(self) -> list[bytes]:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise disk_error(self._path, error) from error
        return [line for line in data.split(b"\n") if line]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None
