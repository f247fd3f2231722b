"""Logistic regression on the labelled samples: the baseline that a handful of labels must be measured against.

Legend: N samples, L labelled samples, M features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from align.ensemble.base import Fit, logit, sigmoid, weighted_rates
from align.ensemble.normalise import binarise, normalise, row_mean
from align.ensemble.table import VerdictTable

MAX_STEP = 4.0  # largest change of a coefficient in one Newton step: far from the optimum a full step overshoots


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


def logistic_regression(
    features: np.ndarray, labels: np.ndarray, ridge: float, towards: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """Weights [M] and offset that minimise the log loss plus ridge/2 |w - towards|^2, by Newton's method.

    The offset is hardly penalised; with more features than labels the weights are found in the labels' span, where
    they lie, so the cost is that of the smaller of the two.
    """
    count, width = features.shape
    aim = np.zeros(width) if towards is None else towards
    if width > count:
        kernel = features @ features.T  # w = aim + X' a
        left, values, _ = np.linalg.svd(kernel)
        reduced = left * np.sqrt(values)  # the same inner products with `count` features
        inner, offset = _newton(reduced, labels, ridge, np.zeros(count), features @ aim)
        keep = values > 1e-10 * max(float(values.max(initial=0.0)), 1e-300)
        return aim + features.T @ (left[:, keep] @ (inner[keep] / np.sqrt(values[keep]))), offset
    weights, offset = _newton(features, labels, ridge, np.zeros(width), features @ aim)
    return aim + weights, offset


def _newton(
    features: np.ndarray, labels: np.ndarray, ridge: float, start: np.ndarray, base: np.ndarray
) -> tuple[np.ndarray, float]:
    """Minimiser of the penalised log loss of base + X w + b over w and b."""
    design = np.column_stack([features, np.ones(len(labels))])
    penalty = np.append(np.full(features.shape[1], max(ridge, 1e-6)), 1e-2)
    share = float(np.clip(labels.mean(), 0.05, 0.95))
    found = np.append(start, logit(np.array(share)))
    for _ in range(100):
        p = sigmoid(base + design @ found)
        gradient = design.T @ (p - labels) + penalty * found
        curvature = (design.T * (p * (1.0 - p))) @ design + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        largest = float(np.abs(step).max())
        found = found - step * min(1.0, MAX_STEP / max(largest, 1e-12))
        if largest < 1e-9:
            break
    return found[:-1], float(found[-1])
