"""Which of two opinions the verifiers themselves bear out; no label is needed.

A verifier whose errors are independent of the others' is a noisy label: its correlation with an opinion formed without
it is (opinion with truth) x (truth with verifier), so of two opinions it ranks the better one first.  A verifier that
shares its errors with a bloc prefers the bloc's opinion; so verifiers that say nearly the same are one juror.

Legend: N samples, M verifiers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from align.ensemble.normalise import blocks

ALIKE = 0.6  # |correlation| from which two verifiers are one juror
MIN_COMMON = 10  # samples that a juror must have judged

Opinion = Callable[[int], np.ndarray]
"""Column -> the opinion [N] formed without that column."""


@dataclass(frozen=True, slots=True)
class Ballot:
    """How the verifiers voted on a challenger against the opinion that stands.

    Example: Ballot(share=0.8, gain=0.04, jurors=6.5)
    """

    share: float  # of the jurors who prefer the challenger
    gain: float  # weighted median of |correlation with the challenger| - |correlation with the standing opinion|
    jurors: float  # effective number: verifiers that say nearly the same count as one


def ballot(values: np.ndarray, standing: Opinion, challenger: Opinion) -> Ballot:
    """The vote of the columns of values [N, M]; NaN where a verifier is silent."""
    weight, gain = [], []
    alike = juror_weights(values)
    for j in range(values.shape[1]):
        column = values[:, j]
        before, after = (correlation(column, opinion(j)) for opinion in (standing, challenger))
        if (~np.isnan(column)).sum() >= MIN_COMMON and not np.isnan(before + after):
            weight.append(alike[j])
            gain.append(abs(after) - abs(before))
    if not gain:
        return Ballot(0.5, 0.0, 0.0)
    weights, gains = np.array(weight), np.array(gain)
    share = float((weights * ((gains > 0) + 0.5 * (gains == 0))).sum() / weights.sum())
    return Ballot(share, weighted_median(gains, weights), float(weights.sum()))


def juror_weights(values: np.ndarray) -> np.ndarray:
    """[M]: 1 / the number of verifiers that a verifier is |correlated| with from ALIKE on, itself included."""
    return 1.0 / (np.abs(correlations(values)) >= ALIKE).sum(axis=1).clip(1)


def correlations(values: np.ndarray) -> np.ndarray:
    """[M, M] of values [N, M], each over the samples that both judged; 0 where it is not defined, 1 with itself."""
    heard = (~np.isnan(values)).astype(float)
    filled = np.nan_to_num(values)
    both = heard.T @ heard
    with np.errstate(invalid="ignore", divide="ignore"):
        first = filled.T @ heard / both  # [M, M] mean of i where j speaks
        second = (filled**2).T @ heard / both - first**2
        found = (filled.T @ filled / both - first * first.T) / np.sqrt(second * second.T)
    found[~np.isfinite(found) | (both < MIN_COMMON) | ~(second * second.T > 1e-12)] = 0.0
    np.fill_diagonal(found, 1.0)
    return np.clip(found, -1.0, 1.0)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Over the samples where both are known; NaN where it is not defined."""
    both = ~(np.isnan(a) | np.isnan(b))
    a, b = a[both], b[both]
    if len(a) < MIN_COMMON:
        return np.nan
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 1e-12 else np.nan


def correlations_with(values: np.ndarray, opinion: np.ndarray) -> np.ndarray:
    """[M]: correlation of each column of values [N, M] with the opinion [N]; NaN where it is not defined."""
    known = ~np.isnan(opinion)
    shifted = np.where(known, opinion, 0.0) - (opinion[known].mean() if known.any() else 0.0)
    weights = np.vstack([known, np.where(known, shifted, 0.0), np.where(known, shifted**2, 0.0)])
    count, first, second = np.zeros((3, values.shape[1]))  # over what both know: how many, sum of a, of its square
    other, other_second, product = np.zeros((3, values.shape[1]))  # sum of b, of its square, of a x b
    for rows in blocks(len(values)):
        heard = ~np.isnan(values[rows])
        filled = np.where(heard, values[rows], 0.0)
        sums = weights[:, rows] @ heard.astype(float)
        count, other, other_second = count + sums[0], other + sums[1], other_second + sums[2]
        sums = weights[:2, rows] @ filled
        first, product = first + sums[0], product + sums[1]
        second = second + weights[0, rows] @ filled**2
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.sqrt((second - first**2 / count) * (other_second - other**2 / count))
        found = (product - first * other / count) / scale
    return np.where((count >= MIN_COMMON) & (scale > 1e-12), found, np.nan)


def weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    """The smallest value at which half of the weight is reached."""
    order = np.argsort(values)
    return float(values[order][np.searchsorted(np.cumsum(weights[order]), weights.sum() / 2)])
