"""Continuous verifiers: two normal classes with a shared latent label, fitted by EM.

Scores go in by rank (normalise.gaussian_scores), so any rising scale gives the same answer.  With a diagonal
covariance the posterior is naive Bayes on scores; with a full one, shrunk towards its diagonal, verifiers that share
an error share their say as well, and the posterior is that of a linear discriminant.  Where some samples are labelled
EM starts from a logistic regression on them and keeps them at their labels: a few prompts are enough to say which of
two shared causes is the answer, which no number of unlabelled ones can.

Legend: N samples, M verifiers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from align.ensemble.base import Fit, logit, sigmoid, weighted_rates
from align.ensemble.logistic import enough, logistic_regression
from align.ensemble.normalise import binarise, gaussian_scores, normalise, row_mean
from align.ensemble.prepare import pooled
from align.ensemble.table import VerdictTable

TOLERANCE = 1e-5  # largest change of a probability that ends EM
START_SHARPNESS = 2.0  # log-odds per standard deviation of the mean score that EM starts from
RIDGE = 5.0


@dataclass(frozen=True, slots=True)
class GaussianEM:
    """logit P(good | s) = logit(pi) + (s - (m1 + m0)/2)' S^-1 (m1 - m0), with pi, m and S from EM.

    `full` is None for a diagonal S, else how far (0 to 1) S is shrunk to its diagonal.
    """

    balance: float | None = None
    full: float | None = None
    max_iterations: int = 200

    def fit(self, table: VerdictTable, labels: np.ndarray | None = None) -> Fit:
        verifiers, table = table, pooled(table)
        scores = gaussian_scores(table)
        start = self._start(table, scores, labels)
        held = np.full(len(scores), np.nan) if labels is None else labels
        q, balance, iterations, converged = _expectation_maximisation(self, scores, start, held)
        p_good = np.where(verifiers.voters > 0, q, np.nan)
        share = balance if self.balance is None else self.balance
        tpr, tnr = weighted_rates(binarise(verifiers, float(np.clip(share, 0.01, 0.99))), p_good, pseudo=2.0, tilt=0.7)
        diagnostics = {"iterations": float(iterations), "converged": float(converged)}
        warnings = () if converged else (f"Gaussian EM stopped after {iterations} iterations, before it settled",)
        return Fit(p_good, float(share), tpr, tnr, diagnostics, warnings)

    def _start(self, table: VerdictTable, scores: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
        """[N]: from the labels where they suffice, else from the mean verdict; never from chance."""
        if labels is not None and enough(labels):
            known = ~np.isnan(labels)
            weights, offset = logistic_regression(scores[known], labels[known], RIDGE)
            return sigmoid(scores @ weights + offset)
        mean = np.nan_to_num(row_mean(normalise(table)), nan=0.5)
        centred = mean - mean.mean()
        spread = float(centred.std())
        prior = 0.5 if self.balance is None else self.balance
        return sigmoid(logit(np.array(prior)) + START_SHARPNESS * centred / (spread if spread > 0 else 1.0))


def _expectation_maximisation(
    model: GaussianEM, scores: np.ndarray, start: np.ndarray, held: np.ndarray
) -> tuple[np.ndarray, float, int, bool]:
    """P(good) [N], the class balance, how many rounds it took and whether it settled."""
    free = np.isnan(held)
    q = np.where(free, start, np.nan_to_num(held))
    balance, moved, iterations = 0.5, np.inf, 0
    while iterations < model.max_iterations and moved > TOLERANCE:
        iterations += 1
        good, bad = q.sum() + 1e-9, (1.0 - q).sum() + 1e-9
        balance = float((good + 1.0) / (good + bad + 2.0)) if model.balance is None else model.balance
        m1, m0 = q @ scores / good, (1.0 - q) @ scores / bad
        weights = _discriminant(scores, q, m1, m0, model.full)
        log_odds = np.log(balance) - np.log1p(-balance) + (scores - (m1 + m0) / 2) @ weights
        now = np.where(free, sigmoid(log_odds), np.nan_to_num(held))
        moved = float(np.abs(now - q).max(initial=0.0))
        q = now
    return q, balance, iterations, moved <= TOLERANCE


def _discriminant(scores: np.ndarray, q: np.ndarray, m1: np.ndarray, m0: np.ndarray, full: float | None) -> np.ndarray:
    """S^-1 (m1 - m0) with S the covariance within the classes; a verifier without variance has no say.

    Scores have variance about 1, and what is within is what the means do not explain: S = E[s s'] - sum_y p_y m_y m_y'.
    """
    share = float(q.mean())
    if full is None:
        within = (scores**2).mean(axis=0) - share * m1**2 - (1.0 - share) * m0**2
        return np.where(within > 1e-6, (m1 - m0) / np.maximum(within, 1e-6), 0.0)
    within = scores.T @ scores / len(scores) - share * np.outer(m1, m1) - (1.0 - share) * np.outer(m0, m0)
    diagonal = np.diag(np.maximum(np.diag(within), 1e-6))
    within = (1.0 - full) * within + full * diagonal + 1e-9 * np.eye(len(within))
    return np.linalg.solve(within, m1 - m0)


def leave_one_out(model: GaussianEM, table: VerdictTable) -> Callable[[int], np.ndarray]:
    """Column -> the log-odds [N] of the fit without that column's term; the table has no family of several."""
    scores = gaussian_scores(table)
    q = np.nan_to_num(model.fit(table).p_good, nan=0.5)
    m1, m0 = q @ scores / (q.sum() + 1e-9), (1.0 - q) @ scores / ((1.0 - q).sum() + 1e-9)
    weights = _discriminant(scores, q, m1, m0, model.full)
    log_odds = (scores - (m1 + m0) / 2) @ weights
    return lambda column: log_odds - (scores[:, column] - (m1 + m0)[column] / 2) * weights[column]
