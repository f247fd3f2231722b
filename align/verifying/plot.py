"""The verifiers as a picture: accuracies with intervals, which errors go together, and whether P(good) is calibrated.

No script, no link, text as outlines, and the same report gives the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from align.curve import BLUE, GREY, INK, ORANGE, STYLE
from align.progress import clean
from align.storage.durable import write_file
from align.verifying.output import joined_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ROWS = 40
"""Verifiers shown; the rest are counted in the title."""
NAME_LENGTH = 28


def draw_verifiers(report: Mapping[str, Any], correlation: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Write the picture; `correlation` [M, M] is of true errors where the report has gold, else estimated."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = _figure(report, correlation, names)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, dpi=110)
    write_file(path, buffer.getvalue(), "verify.plot")


def _figure(report: Mapping[str, Any], correlation: np.ndarray, names: Sequence[str]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = min(len(names), MOST_ROWS)
    figure = Figure(figsize=(15.0, max(4.2, 1.6 + 0.24 * shown)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    title = f"{Path(report['input']['file']).name}: {report['input']['items']:,} items, method {report['method']}"
    figure.suptitle(_label(title, 90), x=0.01, ha="left", fontsize=12, fontweight="bold")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.25, 1.0, 0.9])
    _accuracies(left, joined_rows(report), bool(report["true"]))
    _heat_map(middle, correlation[:shown, :shown], names[:shown], "true" if report["true"] else "estimated")
    _reliability(right, report["true"])
    return figure


def _accuracies(axes: Axes, rows: Sequence[Mapping[str, Any]], measured: bool) -> None:
    """One line a verifier, in the order of the table: the estimate, and gold's figure under it."""
    more = f" (first {MOST_ROWS} of {len(rows)})" if len(rows) > MOST_ROWS else ""
    axes.set_title(f"Accuracy of each verifier{more}")
    rows = rows[:MOST_ROWS]
    at = np.arange(len(rows), dtype=float)
    series = [("estimated", "", BLUE, -0.12 if measured else 0.0)]
    series += [("on unseen gold", "true_", ORANGE, 0.18)] if measured else []
    for label, prefix, colour, offset in series:
        value, low, high = (_numbers(rows, prefix + key) for key in ("accuracy", "low", "high"))
        axes.hlines(at + offset, low, high, color=colour, alpha=0.45, linewidth=2)
        axes.plot(value, at + offset, "o", color=colour, markersize=4, label=label)
    axes.set_yticks(at, [_label(row["name"]) for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.axvline(0.5, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xlabel("share of items judged rightly, 95% intervals")
    axes.grid(axis="x", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    if measured:
        axes.legend(loc="best", frameon=False, fontsize=8)


def _numbers(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], dtype=float)


def _heat_map(axes: Axes, correlation: np.ndarray, names: Sequence[str], how: str) -> None:
    axes.set_title(f"Correlation of errors, {how}")
    shown = np.where(np.eye(len(names), dtype=bool), np.nan, correlation)
    image = axes.imshow(shown, vmin=-1.0, vmax=1.0, cmap="RdBu_r", interpolation="nearest")
    ticks = np.arange(len(names))
    labels = [_label(name, 16) for name in names]
    axes.set_xticks(ticks, labels, rotation=90, fontsize=6.5)
    axes.set_yticks(ticks, labels, fontsize=6.5)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.6)
    bar.ax.tick_params(labelsize=7)


def _reliability(axes: Axes, true: Mapping[str, Any] | None) -> None:
    axes.set_title("Is P(good) to be taken at its word?")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("P(good), mean of the bin")
    axes.set_ylabel("share good by unseen gold")
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
    if true is None or not true["calibration"]["bins"]:
        axes.text(0.5, 0.5, "no gold: not measured", ha="center", va="center", color=GREY)
        return
    bins = true["calibration"]["bins"]
    at, good = _numbers(bins, "p_good"), _numbers(bins, "good")
    axes.vlines(at, _numbers(bins, "low"), _numbers(bins, "high"), color=BLUE, alpha=0.45, linewidth=2)
    axes.plot(at, good, "-", color=BLUE, linewidth=1.2)
    axes.scatter(at, good, s=12 + 120 * _numbers(bins, "count") / sum(b["count"] for b in bins), color=BLUE)
    axes.text(0.02, 0.96, f"expected calibration error {true['calibration']['ece']:.3f}", color=INK, fontsize=8)


def _label(text: str, length: int = NAME_LENGTH) -> str:
    """A name on one line that cannot steer whatever shows the picture; characters without a glyph are shown as such."""
    safe = " ".join(clean(text).split())
    safe = "".join(c if c.isprintable() and ord(c) < 0x2E80 else "?" for c in safe)
    return safe if len(safe) <= length else f"{safe[: length - 1]}…"
