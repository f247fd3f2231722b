"""`align verify`: P(good) of what lies in a file, by votes that are there or by a recipe's verifiers.

Gold has two doors.  The labels that were asked for go to the ensemble; all other gold goes to the part of the report
called `true`, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from align import resampling
from align.ensemble.combine import Combined, combine
from align.ensemble.normalise import binarise
from align.ensemble.table import VerdictTable
from align.errors import InputError
from align.recipe import Ensemble
from align.verifying.labels import RULE, check_count, choose_labels
from align.verifying.output import PLOT, check_output, render, verifier_table, write_result
from align.verifying.report import error_correlation, true_report, verifier_rows, worst_pairs
from align.verifying.votes import read_votes

SHOWN_PAIRS = 20


@dataclass(frozen=True)
class Cost:
    """What a verifier cost here.

    Example: Cost(seconds=3.2, counted={"requests": 40.0, "tokens_read": 9120.0})
    """

    seconds: float
    counted: Mapping[str, float]  # by the verifier itself: requests, tokens, retries; empty where it counts nothing


@dataclass(frozen=True)
class Subject:
    """What is to be verified, wherever it came from.

    Example: Subject({"file": "v.csv"}, items, group_names, gold=np.array([1.0, nan]), table=table,
    allowed=np.array([True, False]))
    """

    facts: dict[str, Any]  # about the file, for the report
    items: pa.ChunkedArray  # [N] names
    group_names: pa.ChunkedArray  # [N]
    gold: np.ndarray  # [N] 1, 0 or NaN
    table: VerdictTable
    allowed: np.ndarray  # [N] gold that may be shown to the ensemble
    costs: Sequence[Cost] = ()  # [M]; empty where no verifier was asked here
    notes: tuple[str, ...] = ()


def verify_votes(path: Path, labels: int | None, out: Path, *, plot: bool = False) -> list[str]:
    """Score the items of a CSV of votes into `out`; returns the report as lines."""
    faultless = all_faults(
        lambda: check_output(out), lambda: check_count(labels, None, str(path)), lambda: read_votes(path)
    )
    votes = faultless[2]
    subject = Subject(
        facts={"file": votes.source, "sha256": votes.sha256},
        items=votes.items,
        group_names=votes.group_names,
        gold=votes.gold,
        table=votes.table(),
        allowed=~np.isnan(votes.gold),
    )
    return finish(subject, Ensemble(), labels, out, plot=plot)


def all_faults(*checks: Callable[[], Any]) -> list[Any]:
    """What each check returns; where some refuse, all their words in one InputError."""
    found, faults = [], []
    for check in checks:
        try:
            found.append(check())
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("\n".join(faults))
    return found


def finish(subject: Subject, settings: Ensemble, labels: int | None, out: Path, *, plot: bool) -> list[str]:
    """Combine, write every file, and return the report as lines."""
    seen = choose_labels(subject.items, subject.group_names, subject.allowed, labels, subject.facts["file"])
    shown = {subject.items[int(row)].as_py(): bool(subject.gold[row]) for row in seen}
    table = subject.table
    if shown:
        ids = [""] * len(table.values)
        for row, name in zip(seen, shown, strict=True):
            ids[row] = name
        table = replace(table, ids=tuple(ids))
    combined = combine(table, settings, shown or None)
    p_good, unjudged = filled(combined)
    report, correlation = _report(subject, combined, seen, shown)
    if unjudged:
        report["warnings"].append(
            f"no verifier said anything of {unjudged:,} items: their P(good) is the class balance, "
            f"{combined.class_balance:.3f}"
        )
    report["unjudged"] = unjudged
    write_result(out, subject.items, p_good, report, verifier_table(report) if plot else None)
    lines = render(report)
    if report["resampling"] is not None and report["input"]["groups"] < report["input"]["items"]:
        lines += ["", *resampling.render(report["resampling"], "rates estimated from this file")]
    if plot:
        from align.verifying.plot import draw_verifiers

        draw_verifiers(report, correlation, table.names, out / PLOT)
    return [*lines, "", f"written to {out}"]


def filled(combined: Combined) -> tuple[np.ndarray, int]:
    """P(good), the class balance where nobody said anything: the posterior of an item with no evidence is the prior."""
    silent = np.isnan(combined.p_good)
    return np.where(silent, combined.class_balance, combined.p_good), int(silent.sum())


def _report(
    subject: Subject, combined: Combined, seen: np.ndarray, shown: dict[str, bool]
) -> tuple[dict[str, Any], np.ndarray]:
    """The report, and the correlation matrix for the plot: of true errors where gold is, else estimated."""
    table, gold = subject.table, subject.gold
    correlation = error_correlation(binarise(table, combined.class_balance), combined.p_good)
    true = true_report(table, combined, gold, seen)
    rows = verifier_rows(table, combined)
    for row, cost in zip(rows, subject.costs, strict=False):
        asked = len(table.values) - cost.counted.get("remembered", 0.0)
        row["seconds_per_1000"] = 1000.0 * cost.seconds / asked if asked else None
        row["counted"] = dict(cost.counted)
    report = {
        "input": {
            **subject.facts,
            "items": len(table.values),
            "groups": len(np.unique(table.prompts)),
            "verifiers": len(table.names),
            "gold": int((~np.isnan(gold)).sum()),
        },
        "labels": {
            "seen": len(seen),
            "good": sum(shown.values()),
            "rule": RULE if len(seen) else "none was asked for",
            "items": list(shown),
        },
        "method": combined.method,
        "why": combined.why,
        "warnings": [*subject.notes, *combined.warnings],
        "class_balance": combined.class_balance,
        "diagnostics": dict(combined.diagnostics),
        "verifiers": rows,
        "correlated": worst_pairs(correlation, table.names, SHOWN_PAIRS),
        "resampling": resampling.plan_resampling(combined.p_good, table.prompts),
        "true": None,
    }
    if true is not None:
        correlation = true.pop("correlation")
        report["true"] = {**true, "correlated": worst_pairs(correlation, table.names, SHOWN_PAIRS)}
    return report, correlation
