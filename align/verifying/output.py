"""What `align verify` leaves: its files, each whole or not there, and the lines that a person reads."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from align.errors import InputError
from align.storage.durable import TEMPORARY, make_directory, to_json, write_file

SCORES, REPORT, TABLE, PLOT = "scores.parquet", "report.json", "verifiers.parquet", "verifiers.svg"
OURS = (SCORES, REPORT, TABLE, PLOT)
SHOWN_VERIFIERS = 40
LINE_WIDTH = 116
_TABLE_COLUMNS = (
    "accuracy", "low", "high", "tpr", "tnr", "coverage", "positive_rate", "seconds_per_1000", "true_accuracy",
    "true_low", "true_high", "true_tpr", "true_tnr", "judged",
)  # fmt: skip


def check_output(directory: Path) -> None:
    """Refuse a directory that holds anything but an earlier result: nothing of the user's is written over."""
    if directory.is_symlink() and not directory.exists():
        raise InputError(f"--out {directory}: is a link to nothing; name another directory")
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--out {directory}: is a file; name a directory")
    if not directory.exists():
        return
    try:
        found = sorted(path.name for path in directory.iterdir())
    except OSError as error:
        raise InputError(f"--out {directory}: cannot be read: {error.strerror or error}") from None
    foreign = [name for name in found if name not in OURS and not name.startswith(TEMPORARY)]
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise InputError(
            f"--out {directory}: holds {', '.join(map(repr, foreign[:3]))}{more}; name a new directory, or one that "
            "holds nothing but an earlier result"
        )


def write_result(
    directory: Path, items: pa.ChunkedArray, p_good: np.ndarray, report: Mapping[str, Any], table: pa.Table | None
) -> None:
    """Scores first and the report last, with the scores' hash in it: a report never speaks of other scores."""
    make_directory(directory)
    scores = pa.table({"item": items.cast(pa.string()), "p_good": pa.array(p_good, type=pa.float64())})
    record = write_file(directory / SCORES, parquet_bytes(scores), "verify.scores")
    if table is not None:
        write_file(directory / TABLE, parquet_bytes(table), "verify.table")
    files = {SCORES: {"bytes": record.bytes, "sha256": record.sha256}}
    write_file(directory / REPORT, to_json({**report, "files": files}), "verify.report")


def parquet_bytes(table: pa.Table) -> bytes:
    """The table as one Parquet file; the same table gives the same bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", version="2.6")
    return sink.getvalue().to_pybytes()


def verifier_table(report: Mapping[str, Any]) -> pa.Table:
    """One row a verifier: estimates, cost, and what gold says, empty where it says nothing."""
    rows = joined_rows(report)
    text = {name: pa.array([row[name] for row in rows], type=pa.string()) for name in ("name", "kind", "family")}
    numbers = {name: pa.array([_number(row.get(name)) for row in rows], type=pa.float64()) for name in _TABLE_COLUMNS}
    return pa.table({**text, **numbers})


def joined_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The estimated rows, with the true figures of each under `true_…` and `judged`."""
    true = report["true"] or {"verifiers": [{} for _ in report["verifiers"]]}
    rows = []
    for one, measured in zip(report["verifiers"], true["verifiers"], strict=True):
        known = {f"true_{key}": measured.get(key) for key in ("accuracy", "low", "high", "tpr", "tnr")}
        rows.append({**one, **known, "judged": measured.get("judged")})
    return rows


def _number(value: Any) -> float | None:
    return None if value is None or value != value else float(value)


def render(report: Mapping[str, Any]) -> list[str]:
    """The report as lines: what went in, the method and why, warnings, the verifiers, and what gold says."""
    facts, labels = report["input"], report["labels"]
    told = f"{facts['items']:,} items in {facts['groups']:,} groups, {facts['verifiers']} verifiers"
    gold = f"gold on {facts['gold']:,}, shown to the ensemble: {labels['seen']:,}" if facts["gold"] else "no gold"
    lines = [f"{facts['file']}: {told}; {gold}", f"method: {report['method']}", *_folded(f"  {report['why']}")]
    for text in report["warnings"]:
        lines += _folded(f"warning: {text}")
    lines += ["", *_verifier_lines(report), ""]
    if report["correlated"]:
        pairs = ", ".join(
            f"{' and '.join(one['verifiers'])} {one['correlation']:.2f}" for one in report["correlated"][:3]
        )
        lines.append(f"errors most alike, estimated: {pairs}")
    return lines + _true_lines(report["true"])


def _folded(text: str) -> list[str]:
    """A sentence on lines of a terminal's width; a name is never broken."""
    return textwrap.wrap(text, LINE_WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _verifier_lines(report: Mapping[str, Any]) -> list[str]:
    rows = joined_rows(report)
    costs = any(row.get("seconds_per_1000") is not None for row in rows)
    width = min(40, max(8, *(len(row["name"]) for row in rows[:SHOWN_VERIFIERS])))
    head = f"{'verifier':<{width}}  {'accuracy, estimated':>22}{'yes|good':>10}{'no|bad':>8}{'coverage':>10}{'yes':>7}"
    lines = [head + (f"{'s/1000':>9}" if costs else "") + (f"{'true, unseen gold':>22}" if report["true"] else "")]
    for row in rows[:SHOWN_VERIFIERS]:
        name = row["name"] if len(row["name"]) <= width else row["name"][: width - 1] + "…"
        line = f"{name:<{width}}  {_interval(row['accuracy'], row['low'], row['high']):>22}{_share(row['tpr']):>10}"
        line += f"{_share(row['tnr']):>8}{_share(row['coverage']):>10}{_share(row['positive_rate']):>7}"
        if costs:
            line += f"{row['seconds_per_1000']:>9.3g}" if row["seconds_per_1000"] is not None else f"{'-':>9}"
        if report["true"]:
            line += f"{_interval(row['true_accuracy'], row['true_low'], row['true_high']):>22}"
        lines.append(line)
    if len(rows) > SHOWN_VERIFIERS:
        lines.append(f"… and {len(rows) - SHOWN_VERIFIERS} more in {REPORT}")
    for row in rows[:SHOWN_VERIFIERS]:
        if row.get("counted"):
            told = ", ".join(f"{count:,g} {name.replace('_', ' ')}" for name, count in sorted(row["counted"].items()))
            lines += _folded(f"{row['name']} counted {told}")
    return lines


def _true_lines(true: Mapping[str, Any] | None) -> list[str]:
    """What gold says of P(good) and its rivals, on the items whose gold was not shown."""
    if true is None:
        return []
    right, curve, picked = true["accuracy"], true["calibration"], true["selection"]
    said = ", ".join(f"{name} {_share(right[name])}" for name in ("p_good", "mean", "majority"))
    lines = [
        f"on the {true['items']:,} items with gold that the ensemble did not see, of which {true['good']:.1%} good:",
        f"  accuracy: {said}, best single verifier ({true['best_single']}) {_share(right['best_single'])}",
        f"  P(good): AUC {_share(true['auc']['p_good'])}, ECE {_share(curve['ece'])}, Brier {_share(curve['brier'])}",
    ]
    if true["pairs"] is not None:
        win, tie = (_share(true["pairs"][name]["ece"]) for name in ("win", "tie"))
        lines.append(f"  {true['pairs']['pairs']:,} pairs within a group: ECE of P(win) {win}, of P(tie) {tie}")
    if picked is not None:
        rest = ", ".join(f"{name} {picked[name]:.3f}" for name in ("p_good", "majority", "random", "oracle"))
        lines.append(f"  best of each of {picked['groups']:,.0f} groups is good: {rest}")
    return lines


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    if _number(value) is None:
        return "-"
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _share(value: Sequence[Any] | float | None) -> str:
    number = _number(value)
    return "-" if number is None else f"{number:.3f}"
