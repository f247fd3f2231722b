"""The ensemble against its verifiers, on gold.  For reporting only: nothing here reaches training.

Legend: N samples, M verifiers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from align.ensemble.combine import Combined
from align.ensemble.normalise import binarise, midranks, normalise, row_mean
from align.ensemble.table import VerdictTable
from align.evaluation.pair_calibration import pair_calibration


def ensemble_report(
    table: VerdictTable, combined: Combined, gold: Sequence[float | None] | np.ndarray
) -> dict[str, Any] | None:
    """How well each opinion agrees with gold [N] (none or NaN: not judged); None where gold judged nothing.

    The opinions are `p_good`, the plain `mean` of the verdicts, the `majority` vote and `verifier/<name>`.  For each:

    `accuracy`             cut at one half, a score verifier at its class-balance quantile; no opinion is half right
    `accuracy_at_balance`  cut so that the share of yes is the ensemble's class balance: for an opinion without a cut
    `auc`                  chance that a right response stands above a wrong one
    `rank_correlation`     Spearman's with gold
    `coverage`             share of the judged responses that it had an opinion on

    Beside them `best_single` (the verifier with the best accuracy, known only thanks to gold), `gold_rate` (the
    accuracy of always saying yes), `class_balance` (the ensemble's estimate of it), `pairs` (what came of P(win) and
    P(tie), pair_calibration.py), `judged`, `method`, and `explain`.
    Gold that gives scores has neither accuracy nor AUC: those are empty, and the best single is by rank correlation.
    """
    known = np.array(gold, dtype=float)  # None becomes NaN
    judged = ~np.isnan(known)
    if not judged.any():
        return None
    truth = known[judged]
    balance = combined.class_balance
    opinions, cuts = _opinions(table, combined, judged)
    binary = bool(np.isin(truth, (0.0, 1.0)).all())
    graded = opinions if binary else {}
    report: dict[str, Any] = {
        "accuracy": {n: accuracy(x, truth) for n, x in cuts.items()} if binary else {},
        "accuracy_at_balance": {n: accuracy_at_balance(x, truth, balance) for n, x in graded.items()},
        "auc": {n: auc(x, truth) for n, x in graded.items()},
        "rank_correlation": {n: rank_correlation(x, truth) for n, x in opinions.items()},
        "coverage": {n: float((~np.isnan(x)).mean()) for n, x in opinions.items()},
    }
    measure = report["accuracy"] if binary else report["rank_correlation"]
    best = max((f"verifier/{name}" for name in table.names), key=lambda n: -9.0 if measure[n] is None else measure[n])
    report |= {
        "best_single": best,
        "gold_rate": float(truth.mean()),
        "class_balance": balance,
        "pairs": pair_calibration(combined.p_good, combined.pairs, known, table.prompts) if binary else None,
        "judged": len(truth),
        "method": combined.method,
        "explain": _explain("accuracy on gold" if binary else "rank correlation with gold", measure, best, len(truth)),
    }
    return report


def _opinions(
    table: VerdictTable, combined: Combined, judged: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Each opinion on the judged responses, and the same as it is cut at one half."""
    values, votes = normalise(table)[judged], binarise(table, combined.class_balance)[judged]
    shared = {"p_good": combined.p_good[judged], "mean": row_mean(values), "majority": row_mean(votes)}
    columns = {f"verifier/{name}": j for j, name in enumerate(table.names)}
    opinions = shared | {name: values[:, j] for name, j in columns.items()}
    return opinions, shared | {name: votes[:, j] for name, j in columns.items()}


def _explain(what: str, measure: dict[str, float | None], best: str, judged: int) -> str:
    said = [
        f"{name} {value:.3f}"
        for name, value in ((n, measure[n]) for n in ("p_good", best, "mean", "majority"))
        if value is not None
    ]
    return f"{what} ({judged} responses): {', '.join(said)}"


def accuracy(opinion: np.ndarray, truth: np.ndarray) -> float:
    """Share of [N] where opinion > 1/2 agrees with truth; one half, or no opinion, is half right."""
    decided = np.where(opinion > 0.5, 1.0, np.where(opinion < 0.5, 0.0, 0.5))
    return float(1.0 - np.abs(decided - truth).mean())


def accuracy_at_balance(opinion: np.ndarray, truth: np.ndarray, balance: float) -> float:
    """Accuracy of saying yes to the top `balance` share of [N]; a tie that straddles the cut is drawn by lot.

    Needs no label but the class balance, so it is what an opinion without a natural cut could have had.
    """
    known = ~np.isnan(opinion)
    _, inverse, counts = np.unique(opinion[known], return_inverse=True, return_counts=True)
    top = np.cumsum(counts) / max(known.sum(), 1)  # share at or below each value
    share = counts / max(known.sum(), 1)
    yes = np.full(len(opinion), 0.5)
    yes[known] = np.clip((top - (1.0 - balance)) / share, 0.0, 1.0)[inverse]
    return float(1.0 - np.abs(yes - truth).mean())


def auc(opinion: np.ndarray, truth: np.ndarray) -> float | None:
    """Chance that a right response's opinion is above a wrong one's, ties half, among those with an opinion.

    None where only right or only wrong ones are left.
    """
    known = ~np.isnan(opinion)
    ranks, truth = midranks(opinion[known]) * known.sum() + 0.5, truth[known]
    right, wrong = truth.sum(), (1.0 - truth).sum()
    if right == 0 or wrong == 0:
        return None
    return float((ranks @ truth - right * (right + 1) / 2) / (right * wrong))


def rank_correlation(opinion: np.ndarray, truth: np.ndarray) -> float | None:
    """Spearman's correlation among those with an opinion; None where either side is constant."""
    known = ~np.isnan(opinion)
    a, b = midranks(opinion[known]), midranks(truth[known])
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])
