"""How far stated probabilities come true: the reliability curve and its summaries.

Legend: N predictions, B bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Reliability:
    """Stated against observed, in bins of equal count.

    Example: Reliability(stated=np.array([0.1, 0.8]), observed=np.array([0.2, 0.7]), count=np.array([50, 50]))
    """

    stated: np.ndarray  # [B] mean probability in the bin
    observed: np.ndarray  # [B] share that came true
    count: np.ndarray  # [B]


def reliability(probability: np.ndarray, truth: np.ndarray, bins: int = 15) -> Reliability:
    """The curve over [N], NaN on either side left out; equal probabilities stay in one bin."""
    known = ~(np.isnan(probability) | np.isnan(truth))
    p, y = probability[known], truth[known]
    if not len(p):
        return Reliability(np.empty(0), np.empty(0), np.empty(0, dtype=int))
    edges = np.unique(np.quantile(p, np.linspace(0.0, 1.0, bins + 1)[1:-1]))
    place = np.searchsorted(edges, p, side="left")
    count = np.bincount(place, minlength=len(edges) + 1)
    kept = count > 0
    stated, observed = (np.bincount(place, x, len(count))[kept] / count[kept] for x in (p, y))
    return Reliability(stated, observed, count[kept])


def expected_calibration_error(probability: np.ndarray, truth: np.ndarray, bins: int = 15) -> float | None:
    """Mean over predictions of |stated - observed| of their bin (Naeini et al. 2015); None without any."""
    curve = reliability(probability, truth, bins)
    if not len(curve.count):
        return None
    return float(curve.count @ np.abs(curve.stated - curve.observed) / curve.count.sum())


def brier(probability: np.ndarray, truth: np.ndarray) -> float | None:
    """Mean squared error of the probability; None where nothing is known."""
    known = ~(np.isnan(probability) | np.isnan(truth))
    return float(((probability[known] - truth[known]) ** 2).mean()) if known.any() else None
