"""What is known of the verifiers and of P(good): estimates from the votes, and beside them the truth where gold is.

The two never mix.  An estimate sees the votes and the labels that were asked for; the truth is measured on gold that
the ensemble did not see, and nothing is decided by it.

Legend: N items, M verifiers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from align.ensemble.base import weighted_votes
from align.ensemble.combine import Combined
from align.ensemble.normalise import binarise, blocks, normalise, row_mean
from align.ensemble.table import VerdictTable
from align.evaluation.calibration import brier, expected_calibration_error, reliability
from align.evaluation.pair_calibration import pair_calibration
from align.evaluation.report import accuracy, auc

TWO_SIDED = 1.96  # standard errors of a 95% interval
MIN_SPREAD = 1e-9


def verifier_rows(table: VerdictTable, combined: Combined) -> list[dict[str, Any]]:
    """One row a verifier, all from the votes and from labels that were shown.

    `low` and `high` bound the accuracy by the number of votes alone; they do not say whether the model is right.
    """
    good = float(np.nansum(combined.p_good))
    bad = float((~np.isnan(combined.p_good)).sum()) - good
    rows = []
    for j, one in enumerate(combined.estimates):
        share = combined.class_balance
        variance = share**2 * _variance(one.tpr, good * one.coverage)
        variance += (1 - share) ** 2 * _variance(one.tnr, bad * one.coverage)
        reach = TWO_SIDED * variance**0.5
        rows.append(
            {
                "name": one.name,
                "kind": table.kinds[j],
                "family": table.families[j],
                "accuracy": one.accuracy,
                "low": max(0.0, one.accuracy - reach),
                "high": min(1.0, one.accuracy + reach),
                "tpr": one.tpr,
                "tnr": one.tnr,
                "coverage": one.coverage,
                "positive_rate": one.positive_rate,
                "failures": dict(one.failures),
            }
        )
    return rows


def _variance(share: float, count: float) -> float:
    """Of a share of `count` votes, with one vote more for and one against: never 0 because all agreed."""
    softened = (share * count + 1.0) / (count + 2.0)
    return softened * (1.0 - softened) / (count + 2.0)


def true_report(table: VerdictTable, combined: Combined, gold: np.ndarray, seen: np.ndarray) -> dict[str, Any] | None:
    """Everything that gold says, measured on the items whose gold was not shown; None where there is none.

    `items`, `good`  how many items, and the share of them that gold calls good
    `accuracy`       of P(good), the mean verdict, the majority and the best single verifier, each cut at one half; no
                     opinion is half right.  Which verifier is best is known only thanks to gold
    `auc`            chance that a good item stands above a bad one, by P(good) and by the mean
    `verifiers`      per verifier: votes that gold judges, accuracy with its 95% interval, tpr, tnr
    `calibration`    expected calibration error and Brier score of P(good), and its reliability curve
    `pairs`          the same of P(win) and P(tie) of two items of a group (pair_calibration.py)
    `selection`      gold of the item picked in each group, by P(good), by majority, at random, by an oracle
    `correlation`    [M, M] of the verifiers' errors, given gold
    """
    known = ~np.isnan(gold)
    known[seen] = False
    if not known.any():
        return None
    truth = np.where(known, gold, np.nan).astype(float)
    votes = binarise(table, combined.class_balance)
    majority, verifiers = row_mean(votes), _true_rows(table, votes, truth)
    return {
        "items": int(known.sum()),
        "good": float(truth[known].mean()),
        **_opinions(table, combined, majority, truth, verifiers),
        "verifiers": verifiers,
        "calibration": calibration(combined.p_good[known], truth[known]),
        "pairs": pair_calibration(combined.p_good, combined.pairs, truth, table.prompts),
        "selection": selection(combined.p_good, majority, truth, table.prompts),
        "correlation": error_correlation(votes, truth),
    }


def _opinions(
    table: VerdictTable, combined: Combined, majority: np.ndarray, truth: np.ndarray, verifiers: list[dict[str, Any]]
) -> dict[str, Any]:
    """Accuracy and AUC of the ensemble's opinions, and the best single verifier; a silent one is half right."""
    known = ~np.isnan(truth)
    gold, mean = truth[known], row_mean(normalise(table))[known]
    single = [_with_silence(row["accuracy"], row["judged"] / len(gold)) for row in verifiers]
    best = int(np.argmax(single))
    return {
        "accuracy": {
            "p_good": accuracy(_half(combined.p_good[known]), gold),
            "mean": accuracy(_half(mean), gold),
            "majority": accuracy(_half(majority[known]), gold),
            "best_single": single[best],
        },
        "best_single": table.names[best],
        "auc": {"p_good": auc(combined.p_good[known], gold), "mean": auc(mean, gold)},
    }


def _with_silence(accuracy: float, spoken: float) -> float:
    """Accuracy over all items of a verifier that spoke on this share of them."""
    return 0.5 + (accuracy - 0.5) * spoken if spoken else 0.5


def _half(opinion: np.ndarray) -> np.ndarray:
    """[N] with one half in place of no opinion."""
    return np.where(np.isnan(opinion), 0.5, opinion)


def _true_rows(table: VerdictTable, votes: np.ndarray, truth: np.ndarray) -> list[dict[str, Any]]:
    rows = []
    heard, yes = weighted_votes(votes, np.nan_to_num(np.vstack([truth, 1.0 - truth])))  # [2, M] on good items, on bad
    for j, name in enumerate(table.names):
        (good, bad), caught, spared = heard[:, j].tolist(), float(yes[0, j]), float(heard[1, j] - yes[1, j])
        count = round(good + bad)
        right = (caught + spared) / count if count else float("nan")
        low, high = wilson(right, count)
        rows.append(
            {
                "name": name,
                "judged": count,
                "accuracy": right,
                "low": low,
                "high": high,
                "tpr": caught / good if good else float("nan"),
                "tnr": spared / bad if bad else float("nan"),
            }
        )
    return rows


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share of `count` (Wilson, 1927): never outside 0 to 1, and sensible at 0 and 1.

    Example: wilson(1.0, 4) is about (0.51, 1.0)
    """
    if not count:
        return float("nan"), float("nan")
    z2 = TWO_SIDED**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    reach = TWO_SIDED * (share * (1 - share) / count + z2 / (4 * count**2)) ** 0.5 / (1 + z2 / count)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def calibration(p_good: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Expected calibration error and Brier score of P(good), and the reliability curve with intervals.

    Items without a P(good) are left out.
    """
    curve = reliability(p_good, truth)
    bins = []
    for stated, observed, count in zip(curve.stated, curve.observed, curve.count, strict=True):
        low, high = wilson(float(observed), int(count))
        bins.append({"count": int(count), "p_good": float(stated), "good": float(observed), "low": low, "high": high})
    return {"ece": expected_calibration_error(p_good, truth), "brier": brier(p_good, truth), "bins": bins}


def selection(
    p_good: np.ndarray, majority: np.ndarray, truth: np.ndarray, groups: np.ndarray
) -> dict[str, float] | None:
    """Mean gold of the item picked in each group of two or more judged items; ties share.  None without such groups."""
    judged = np.flatnonzero(~np.isnan(truth))
    rows = judged[np.argsort(groups[judged], kind="stable")]
    if not len(rows):
        return None
    starts = np.flatnonzero(np.r_[True, np.diff(groups[rows]) != 0])
    sizes = np.diff(np.r_[starts, len(rows)])
    large = sizes > 1
    if not large.any():
        return None
    gold = truth[rows]

    def picked(opinion: np.ndarray) -> float:
        score = np.nan_to_num(opinion[rows], nan=-1.0)
        top = (score == np.repeat(np.maximum.reduceat(score, starts), sizes)).astype(float)
        return float((np.add.reduceat(gold * top, starts) / np.add.reduceat(top, starts))[large].mean())

    return {
        "groups": float(large.sum()),
        "p_good": picked(p_good),
        "majority": picked(majority),
        "random": picked(np.zeros(len(truth))),
        "oracle": picked(truth),
    }


def error_correlation(votes: np.ndarray, p_good: np.ndarray) -> np.ndarray:
    """[M, M]: correlation of two verifiers' votes among good items and among bad ones, put together.

    Each item counts as good with P(good); with gold in its place this is the correlation of their errors.  NaN where
    one of them never varies, or they never judged the same item.
    """
    count = votes.shape[1]
    roots = np.sqrt(np.nan_to_num(np.vstack([p_good, 1.0 - p_good])))  # of the weights: X' w X is then one product A' A
    total = np.zeros((2, 2 * count, 2 * count))  # by class; heard or yes of i with heard or yes of j
    for rows in blocks(len(votes)):
        heard = ~np.isnan(votes[rows])
        said = np.hstack([heard, np.where(heard, votes[rows], 0.0)])
        for k, root in enumerate(roots):
            weighted = said * root[rows, None]
            total[k] += weighted.T @ weighted
    covariance, spread = np.zeros((count, count)), np.zeros((count, count))
    with np.errstate(invalid="ignore", divide="ignore"):
        for by_class in total:
            heard_both, yes_i, yes_both = by_class[:count, :count], by_class[count:, :count], by_class[count:, count:]
            mean = np.where(heard_both > 0, yes_i / heard_both, 0.0)
            covariance += yes_both - heard_both * mean * mean.T
            spread += heard_both * mean * (1.0 - mean)
        scale = np.sqrt(spread * spread.T)
        found = np.where(scale > MIN_SPREAD, covariance / scale, np.nan)
    return np.clip(found, -1.0, 1.0)


def worst_pairs(correlation: np.ndarray, names: tuple[str, ...], most: int = 5) -> list[dict[str, Any]]:
    """The pairs of verifiers whose errors are most alike, largest first."""
    rows, columns = np.triu_indices(len(names), k=1)
    values = correlation[rows, columns]
    order = np.argsort(-np.nan_to_num(np.abs(values), nan=-1.0), kind="stable")[:most]
    return [
        {"verifiers": [names[rows[i]], names[columns[i]]], "correlation": float(values[i])}
        for i in order
        if not np.isnan(values[i])
    ]
