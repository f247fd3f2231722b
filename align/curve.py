"""The learning curve of a run as a picture: what the verifiers believe, what gold says, and how far the policy moved.

The picture has no script and no link, and the same numbers give the same bytes.  Colours are from Okabe and Ito's
palette, which colour-blind readers can tell apart; lines are labelled where they end, not in a legend.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from align.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#8A8A8A", "#222222"
COLUMNS = 4
"""Small panels in a row."""


@dataclass(frozen=True)
class Series:
    """One metric over the rounds; `low` and `high` bound its interval.

    Example: Series("accuracy", rounds=(0, 1), value=(0.31, 0.52), low=(0.28, 0.49), high=(0.34, 0.55))
    """

    name: str
    rounds: tuple[int, ...]
    value: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def learning_curve(run_dir: Path, *, format: Literal["svg", "png"] = "svg") -> Path:
    """Draw `learning_curve.svg` (or .png) into the run directory and return its path.

    Raises InputError where the run has no evaluation yet.
    """
    series = read_series(run_dir)
    if not series:
        raise InputError(f"{run_dir}: no rounds/*/evaluation.json with a metric yet; run `align evaluate` first")
    import matplotlib

    path = run_dir / f"learning_curve.{format}"
    metadata = {"Date": None, "Creator": None} if format == "svg" else {"Software": None}
    unfinished = path.with_name(path.name + ".tmp")
    with matplotlib.rc_context(STYLE):
        draw(series, title=_title(run_dir)).savefig(unfinished, format=format, metadata=metadata, dpi=160)
    return unfinished.replace(path)


def read_series(run_dir: Path) -> dict[str, Series]:
    """Every metric of every evaluation, by name; a metric that one round lacks simply has no point there.

    P(good), the mean the ensemble gave to a round's training samples, comes from `p_good` in evaluation.json or
    ensemble.json, else from the scores themselves, without an interval where none is given.
    """
    points: dict[str, list[tuple[int, float, float, float]]] = {}
    for directory in sorted((run_dir / "rounds").glob("[0-9]*")):
        index = int(directory.name)
        metrics = dict(_read(directory / "evaluation.json"))
        if "p_good" not in metrics:
            metrics["p_good"] = _read(directory / "ensemble.json").get("p_good", _mean_p_good(directory))
        for name, estimate in metrics.items():
            point = _point(estimate)
            if point is not None:
                points.setdefault(name, []).append((index, *point))
    found = {}
    for name, rows in points.items():
        rounds, value, low, high = zip(*rows, strict=True)
        found[name] = Series(name, rounds, value, low, high)
    return found


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def _mean_p_good(directory: Path) -> float | None:
    """Mean P(good) of a round's scores; None before the round is scored."""
    files = sorted(directory.glob("scores-*.parquet"))
    if not files:
        return None
    import numpy
    from pyarrow import parquet

    values = [parquet.read_table(file, columns=["p_good"])["p_good"].to_numpy() for file in files]
    return float(numpy.concatenate(values).mean()) if any(len(v) for v in values) else None


def _point(estimate: Any) -> tuple[float, float, float] | None:
    """(value, low, high) of `{"value", "low", "high"}` or of a bare number; None of anything else or of NaN."""
    if isinstance(estimate, Mapping):
        value = estimate.get("value")
        low, high = estimate.get("low"), estimate.get("high")
    else:
        value, low, high = estimate, None, None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return None
    return float(value), float(value if low is None else low), float(value if high is None else high)


def _title(run_dir: Path) -> str:
    """The run's name, and what its summary says of it."""
    summary = _read(run_dir / "summary.json")
    name = str(summary.get("name", run_dir.name))
    total = summary.get("seconds", {}).get("total")
    return f"{name}: {total:.0f} s in all" if isinstance(total, int | float) else name


STYLE: dict[Any, Any] = {
    "svg.hashsalt": "align",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


def draw(series: Mapping[str, Series], *, title: str) -> Figure:
    """The figure: gold beside the proxy, then KL, then one small panel for each verifier and what is left."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    small = _small_panels(series)
    rows = -(-len(small) // COLUMNS)
    figure = Figure(figsize=(9.0, 3.4 + 1.6 * rows), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    parts = figure.subfigures(1 + bool(rows), 1, height_ratios=[3.0, 1.6 * rows] if rows else None, squeeze=False)[:, 0]
    lead, kl = parts[0].subplots(1, 2, width_ratios=[2.2, 1.0])
    _draw_lead(lead, _lead(series))
    _draw_small(kl, series.get("kl"), "KL to the reference", "nats per response", BLUE)
    if rows:
        panels = parts[1].subplots(rows, COLUMNS, squeeze=False).ravel()
        _draw_panels(panels, series, small)
    return figure


def _draw_panels(panels: Sequence[Axes], series: Mapping[str, Series], small: Sequence[str]) -> None:
    """One small panel a metric; verifiers share the scale 0 to 1 where all of them keep to it."""
    verifiers = [series[n] for n in small if n.startswith("verifier/")]
    shares = bool(verifiers) and all(0.0 <= v <= 1.0 for s in verifiers for v in (*s.low, *s.high))
    units = {"length": "tokens", "entropy": "nats per token"}
    for name, axes in zip(small, panels, strict=False):
        if name.startswith("verifier/"):
            _draw_small(axes, series[name], name.removeprefix("verifier/"), "mean verdict", ORANGE)
            if shares:
                axes.set_ylim(-0.02, 1.02)
        else:
            title = "mean P(good), training" if name == "p_good" else name
            _draw_small(axes, series[name], title, units.get(name, ""), GREEN)
    for axes in panels[len(small) :]:
        axes.set_axis_off()


def _small_panels(series: Mapping[str, Series]) -> list[str]:
    """What gets a small panel: all that the large ones leave, without pass@1 where it repeats the accuracy, and without
    coverage where nothing abstained."""
    large = {"kl", *(one.name for one, _, _ in _lead(series))}
    if "accuracy" in series and "pass@1" in series and series["accuracy"].value == series["pass@1"].value:
        large.add("pass@1")
    full = {n for n in series if "coverage" in n and min(series[n].value) == 1.0}  # every verdict was given
    return [name for name in _order(series) if name not in large | full]


def _order(series: Mapping[str, Series]) -> list[str]:
    """P(good) and pass@k first, then the other metrics by name, then the verifiers in the order of the evaluation."""
    verifiers = [n for n in series if n.startswith("verifier/")]
    rest = [n for n in series if not n.startswith("verifier/")]
    return sorted(rest, key=lambda n: (n != "p_good", not n.startswith("pass@"), n)) + verifiers


def _lead(series: Mapping[str, Series]) -> list[tuple[Series, str, str]]:
    """(series, label, colour) of the large panel.

    Accuracy on gold and the proxy share a scale: where they part, the policy exploits its verifiers.  A gold score has
    a scale of its own and stands alone; so does the first metric of a run without a gold verifier.
    """
    if "accuracy" in series:
        found = [(series["accuracy"], "accuracy on gold,\nheld-out prompts", BLUE)]
        if "p_good" in series:
            found.append((series["p_good"], "mean P(good),\ntraining samples", ORANGE))
        return found
    name = next((n for n in series if n.startswith("gold/")), None) or _order(series)[0]
    gold = name.startswith("gold/")
    return [(series[name], f"{name.removeprefix('gold/')}{' (gold)' if gold else ''},\nheld-out prompts", BLUE)]


def _draw_lead(axes: Axes, shown: Sequence[tuple[Series, str, str]]) -> None:
    """The large panel, its labels to the right of the last round."""
    titles = {"accuracy": "What is true", "p_good": "what the verifiers believe"}
    names = [titles[one.name] for one, _, _ in shown if one.name in titles]
    axes.set_title(", and ".join(names) or "By round")
    last = max(one.rounds[-1] for one, _, _ in shown)
    ends = _spread([one.value[-1] for one, _, _ in shown], shown)
    for (one, label, colour), y in zip(shown, ends, strict=True):
        _line(axes, one, colour, width=2.2)
        axes.annotate(
            f"{label}\n{one.value[-1]:.3f}",
            (last, y),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
            annotation_clip=False,
        )
    axes.set_xlabel("rounds of training")
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.03)
    _whole_rounds(axes)


def _spread(ends: Sequence[float], shown: Sequence[tuple[Series, str, str]]) -> list[float]:
    """Heights for the labels, moved apart where two lines end close together."""
    if len(ends) < 2:
        return list(ends)
    everything = [v for s, _, _ in shown for v in (*s.low, *s.high)]
    gap = 0.24 * ((max(everything) - min(everything)) or 1.0)
    first, second = ends
    missing = max(0.0, gap - abs(first - second)) / 2
    sign = 1.0 if first >= second else -1.0
    return [first + sign * missing, second - sign * missing]


def _draw_small(axes: Axes, one: Series | None, title: str, unit: str, colour: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=7.5)
    if one is None:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color=GREY)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    _line(axes, one, colour, width=1.6)
    axes.set_ylabel(unit, fontsize=7.5)
    axes.annotate(
        f"{one.value[-1]:.3g}",
        (one.rounds[-1], one.value[-1]),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=colour,
        fontweight="bold",
        annotation_clip=False,
    )
    axes.margins(x=0.08, y=0.15)
    _whole_rounds(axes)


def _line(axes: Axes, one: Series, colour: str, *, width: float) -> None:
    """The line with its points, and the interval as a band."""
    if any(low < high for low, high in zip(one.low, one.high, strict=True)):
        axes.fill_between(one.rounds, one.low, one.high, color=colour, alpha=0.16, linewidth=0)
    axes.plot(one.rounds, one.value, color=colour, linewidth=width, marker="o", markersize=2.2 * width, clip_on=False)


def _whole_rounds(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
