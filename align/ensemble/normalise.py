"""Verdicts on one scale.

A score verifier's numbers mean nothing beside another's, so they are replaced by their mid-rank over the round:
(rank - 1/2) / count, ties sharing the mean rank.  That is invariant to any rising transformation and to outliers.
Binary verdicts stay 0 and 1. Ranking them too would only halve their spread and take away how often a verifier says
yes, which is all that is known about how many responses are good; on the GSM8K candidates of four real models,
votes kept as 0/1 order the candidates better (AUC 0.878) than ranked votes (0.846).
"""

from __future__ import annotations

import numpy as np

from align.ensemble.table import VerdictTable


def midranks(values: np.ndarray) -> np.ndarray:
    """[N] -> [N] in (0, 1): share of the present values below, ties counted half; NaN stays NaN.

    Example: midranks([10, 30, 30, nan]) == [1/6, 4/6, 4/6, nan]
    """
    present = ~np.isnan(values)
    ranks = np.full(values.shape, np.nan)
    if present.any():
        _, inverse, counts = np.unique(values[present], return_inverse=True, return_counts=True)
        ranks[present] = ((np.cumsum(counts) - counts / 2) / counts.sum())[inverse]
    return ranks


def normalise(table: VerdictTable) -> np.ndarray:
    """[N, M] in [0, 1]: votes as they are, scores as mid-ranks, NaN where abstained."""
    columns = [
        table.values[:, j] if kind == "binary" else midranks(table.values[:, j]) for j, kind in enumerate(table.kinds)
    ]
    return np.column_stack(columns)


def binarise(table: VerdictTable, balance: float | None) -> np.ndarray:
    """[N, M] of 0, 1 and NaN: votes as they are; a score is a yes in the top `balance` share, or above the median.

    Thresholding at the class-balance quantile is what Weaver does with reward models (arXiv 2506.18203, Figure 9).
    """
    values = normalise(table)
    cut = 0.5 if balance is None else 1.0 - balance
    for j, kind in enumerate(table.kinds):
        if kind == "score":
            values[:, j] = np.where(np.isnan(values[:, j]), np.nan, values[:, j] > cut)
    return values


def row_mean(values: np.ndarray) -> np.ndarray:
    """[N, M] -> [N]: mean over those present; NaN in a row without any."""
    present = ~np.isnan(values)
    voters = present.sum(axis=1)
    total = np.where(present, values, 0.0).sum(axis=1)
    return np.where(voters > 0, total / np.maximum(voters, 1), np.nan)


def row_spread(values: np.ndarray) -> np.ndarray:
    """[N, M] -> [N]: standard deviation over those present; NaN in a row without any."""
    centred = values - row_mean(values)[:, None]
    return np.sqrt(row_mean(centred**2))


def probit(p: np.ndarray) -> np.ndarray:
    """The normal quantile of p in (0, 1), by the rational approximation of Abramowitz and Stegun, 26.2.23.

    Its error is below 4.5e-4, and a rank over a round is known no better; NaN stays NaN.
    """
    tail = np.clip(np.minimum(p, 1.0 - p), 1e-12, 0.5)
    t = np.sqrt(-2.0 * np.log(tail))
    top = 2.515517 + t * (0.802853 + t * 0.010328)
    bottom = 1.0 + t * (1.432788 + t * (0.189269 + t * 0.001308))
    return np.sign(p - 0.5) * (t - top / bottom)


def gaussian_scores(table: VerdictTable) -> np.ndarray:
    """[N, M]: each verifier as a standard normal, by rank; a silent one is 0, which speaks for neither class.

    Votes are ranked too, then brought to variance 1, so that a Gaussian model may take them in.
    """
    columns = []
    for j in range(table.values.shape[1]):
        column = np.nan_to_num(probit(midranks(table.values[:, j])))
        scale = float(np.sqrt((column**2).sum() / max((~np.isnan(table.values[:, j])).sum(), 1)))
        columns.append(column / scale if scale > 1e-6 else np.zeros(len(column)))
    return np.column_stack(columns)
