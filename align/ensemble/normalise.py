"""Verdicts on one scale.

A score verifier's numbers mean nothing beside another's, so they are replaced by their mid-rank over the round:
(rank - 1/2) / count, ties sharing the mean rank.  That is invariant to any rising transformation and to outliers.
Binary verdicts stay 0 and 1. Ranking them too would only halve their spread and take away how often a verifier says
yes, which is all that is known about how many responses are good; on the GSM8K candidates of four real models,
votes kept as 0/1 order the candidates better (AUC 0.878) than ranked votes (0.846).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from align.ensemble.table import VerdictTable

BLOCK_ROWS = 8_192
"""Rows worked on at once: what is made of them stays in the processor's cache, however many rows there are."""


def blocks(count: int) -> Iterator[slice]:
    """`count` rows as slices of at most BLOCK_ROWS."""
    for start in range(0, count, BLOCK_ROWS):
        yield slice(start, min(start + BLOCK_ROWS, count))


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
    """[N, M] in [0, 1], for reading only: votes as they are, scores as mid-ranks, NaN where abstained."""
    return table.normalised


def binarise(table: VerdictTable, balance: float | None) -> np.ndarray:
    """[N, M] of 0, 1 and NaN: votes as they are; a score is a yes in the top `balance` share, or above the median.

    For reading only.  Thresholding at the class-balance quantile is what Weaver does with reward models (arXiv
    2506.18203, Figure 9).
    """
    if "score" not in table.kinds:
        return normalise(table)
    values = normalise(table).copy(order="F")
    cut = 0.5 if balance is None else 1.0 - balance
    for j, kind in enumerate(table.kinds):
        if kind == "score":
            values[:, j] = np.where(np.isnan(values[:, j]), np.nan, values[:, j] > cut)
    return values


def row_mean(values: np.ndarray, columns: Sequence[int] | None = None) -> np.ndarray:
    """[N, M] -> [N]: mean over those present, of all columns or of these; NaN in a row without any."""
    mean = np.empty(len(values))
    for rows in blocks(len(values)):
        block = values[rows] if columns is None else values[rows][:, columns]
        present = ~np.isnan(block)
        count = count_rows(present)
        total = np.where(present, block, 0.0).sum(axis=1)
        mean[rows] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return mean


def count_rows(present: np.ndarray) -> np.ndarray:
    """[N, M] of yes and no -> [N]: how many yes."""
    return present.view(np.uint8).sum(axis=1, dtype=np.uint16 if present.shape[1] < 2**16 else np.int64)


def voters(values: np.ndarray) -> np.ndarray:
    """[N, M] -> [N] int: how many are present."""
    found = np.empty(len(values), dtype=np.int64)
    for rows in blocks(len(values)):
        found[rows] = count_rows(~np.isnan(values[rows]))
    return found


def row_spread(values: np.ndarray) -> np.ndarray:
    """[N, M] -> [N]: standard deviation over those present; NaN in a row without any."""
    spread = np.empty(len(values))
    for rows in blocks(len(values)):
        block = values[rows]
        spread[rows] = np.sqrt(row_mean((block - row_mean(block)[:, None]) ** 2))
    return spread


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
