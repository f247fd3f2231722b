"""Logistic regression on the labelled samples: the baseline that a handful of labels must be measured against.

Legend: N samples, L labelled samples, M features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from align.ensemble.base import Fit, sigmoid, weighted_rates
from align.ensemble.normalise import binarise, normalise, row_mean
from align.ensemble.table import VerdictTable

OFFSET_RIDGE = 1e-2


@dataclass(frozen=True, slots=True)
class Logistic:
    """P(good) = sigmoid(w . (verdict - mean verdict) + b), w by ridge-penalised maximum likelihood on the labels.

    Silent verifiers count as their mean.  Without labels of both classes there is nothing to learn: the mean verdict
    is returned with a warning.
    """

    ridge: float = 5.0

    def fit(self, table: VerdictTable, labels: np.ndarray | None = None) -> Fit:
        values = normalise(table)
        spoken = (~np.isnan(values)).any(axis=1)
        warnings: tuple[str, ...] = ()
        if labels is None or not enough(labels):
            p_good = row_mean(values)
            warnings = ("logistic regression needs labels of both classes: the mean verdict stands in for it",)
        else:
            features = centred(values)
            known = ~np.isnan(labels)
            weights, offset = logistic_regression(features[known], labels[known], self.ridge)
            p_good = np.where(spoken, sigmoid(features @ weights + offset), np.nan)
        share = float(np.nanmean(p_good)) if not np.isnan(p_good).all() else 0.5
        tpr, tnr = weighted_rates(binarise(table, float(np.clip(share, 0.01, 0.99))), p_good, pseudo=2.0, tilt=0.7)
        return Fit(p_good, share, tpr, tnr, {}, warnings)


def enough(labels: np.ndarray) -> bool:
    """Whether at least one sample of each class is labelled."""
    known = labels[~np.isnan(labels)]
    return bool((known == 1).any() and (known == 0).any())


def centred(values: np.ndarray) -> np.ndarray:
    """[N, M] less each column's mean, 0 where silent."""
    heard = ~np.isnan(values)
    mean = np.where(heard, values, 0.0).sum(axis=0) / np.maximum(heard.sum(axis=0), 1)
    return np.where(heard, values - mean, 0.0)


def logistic_regression(features: np.ndarray, labels: np.ndarray, ridge: float) -> tuple[np.ndarray, float]:
    """Weights [M] and offset that minimise the log loss plus ridge/2 |w|^2; the offset is hardly pulled."""
    design = np.column_stack([features, np.ones(len(labels))])
    pull = np.append(np.full(features.shape[1], max(ridge, 1e-6)), OFFSET_RIDGE)
    found = shrunk_logistic(design, labels, pull, np.zeros(len(pull)))
    return found[:-1], float(found[-1])


def shrunk_logistic(design: np.ndarray, targets: np.ndarray, pull: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Coefficients [F] of least log loss of design [L, F] + sum pull/2 (coefficient - start)^2, each pull above 0.

    Newton's method, its step halved until it gains: where an answer is sure and wrong a whole step overshoots and never
    settles.  It is done in the span of the L rows, so more columns than rows cost no more.
    """
    scale = np.sqrt(pull)
    left, values, right = np.linalg.svd(design / scale, full_matrices=False)
    inner, base = left * values, design @ start

    def cost(found: np.ndarray) -> float:
        z = base + inner @ found
        return float(np.logaddexp(0.0, z).sum() - targets @ z + found @ found / 2)

    found = np.zeros(len(values))
    for _ in range(100):
        p = sigmoid(base + inner @ found)
        gradient = inner.T @ (p - targets) + found
        step = np.linalg.solve((inner.T * (p * (1.0 - p))) @ inner + np.eye(len(found)), gradient)
        size, before = 1.0, cost(found)
        while cost(found - size * step) > before - 1e-4 * size * float(gradient @ step) and size > 1e-9:
            size /= 2
        found = found - size * step
        if size <= 1e-9 or float(np.abs(step).max()) < 1e-9:
            break
    return start + right.T @ found / scale
