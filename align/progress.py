"""How far a long stage is: a bar on a terminal, a line every few seconds elsewhere, from rank 0 only.

Text that a model or a user wrote reaches the screen only through `clean`: without it a response could move the
cursor, rename the window or hide what it says.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

LINE_INTERVAL_S = 5.0

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 but \t and \n, DEL, C1
_INVISIBLE = re.compile("[\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")  # bidi controls and zero widths


def clean(text: str) -> str:
    """Text that is safe on a terminal: control characters but newline and tab go, bidi controls and zero-width
    characters are shown.  Example: clean("\\x1b[2Jab\\u202ec") == "[2Jab<U+202E>c".
    """
    text = _CONTROLS.sub("", text)
    text = _INVISIBLE.sub(lambda match: f"<U+{ord(match[0]):04X}>", text)
    return text.encode("utf-8", "backslashreplace").decode()  # half of a surrogate pair cannot be printed


def is_speaker() -> bool:
    """Whether this process is rank 0, which alone prints."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Prints one message from rank 0, cleaned; above the bar where one is shown."""
    if is_speaker():
        print(clean(text), flush=True)


@dataclass
class Bar:
    """How much of a stage is done.  Use through `track`."""

    label: str
    total: int
    unit: str
    show: Callable[[Bar], None] | None = None
    done: int = 0
    began: float = field(default_factory=lambda: time.monotonic())

    def advance(self, count: int = 1) -> None:
        """`count` more units are done."""
        self.done += count
        if self.show is not None:
            self.show(self)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def rate(self) -> float:
        """Units per second so far."""
        return self.done / self.seconds if self.seconds > 0 else 0.0

    def line(self) -> str:
        """Example: `sampling: 128/512 prompts (25%), 41.6 prompts/s, 9 s left`."""
        share = f" ({100 * self.done // self.total}%)" if self.total else ""
        going = self.done < self.total and self.rate > 0
        left = f", {duration((self.total - self.done) / self.rate)} left" if going else ""
        return f"{self.label}: {self.done}/{self.total} {self.unit}{share}, {self.rate:.3g} {self.unit}/s{left}"


def duration(seconds: float) -> str:
    """Example: duration(75) == "1 min 15 s", duration(7300) == "2 h 1 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextmanager
def track(label: str, total: int, unit: str) -> Iterator[Bar]:
    """Shows progress while the body runs; the body calls `bar.advance(count)`.

    Example: with track("sampling", total=512, unit="prompts") as bar: bar.advance(64)
    """
    if not is_speaker():
        yield Bar(label, total, unit)
    elif sys.stdout.isatty():
        with _terminal_bar(label, total, unit) as bar:
            yield bar
    else:
        yield from _plain_lines(label, total, unit)


def _plain_lines(label: str, total: int, unit: str) -> Iterator[Bar]:
    last = time.monotonic()

    def show(bar: Bar) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LINE_INTERVAL_S and bar.done < bar.total:
            last = now
            say(bar.line())

    bar = Bar(label, total, unit, show)
    try:
        yield bar
    finally:
        say(_closing(bar))


def _closing(bar: Bar) -> str:
    stopped = "stopped at " if bar.done < bar.total else ""
    amount = f"{bar.done}/{bar.total}" if stopped else str(bar.done)
    return f"{bar.label}: {stopped}{amount} {bar.unit} in {bar.seconds:.1f} s, {bar.rate:.3g} {bar.unit}/s"


@contextmanager
def _terminal_bar(label: str, total: int, unit: str) -> Iterator[Bar]:
    """The rich bar; it gives way to the closing line, so that a finished stage leaves one line behind."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]}", markup=False)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), rate)
    with Progress(*columns, TimeRemainingColumn(), transient=True, refresh_per_second=4) as display:
        task = display.add_task(clean(label), total=total, rate="")

        def show(bar: Bar) -> None:
            amount = f"{bar.done}/{bar.total} {unit}, {bar.rate:.3g} {unit}/s"
            display.update(task, completed=bar.done, rate=amount)

        bar = Bar(label, total, unit, show)
        try:
            yield bar
        finally:
            display.stop()
            say(_closing(bar))
