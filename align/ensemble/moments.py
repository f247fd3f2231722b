"""Label models from pairwise agreement: no EM, only the second moments of the votes.

With D_k = TPR_k - FPR_k and votes independent given the class, Cov(S_i, S_j) = pi (1 - pi) D_i D_j off the diagonal and
E S_k = FPR_k + pi D_k.  Second moments do not tell pi: it is given, or the labels' share, or the majority's.

Legend: N samples, M verifiers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from align.ensemble.base import Fit, logit, sigmoid
from align.ensemble.normalise import binarise, blocks, row_mean
from align.ensemble.table import VerdictTable

EDGE = 0.01  # rates are held this far from 0 and 1, as MeTaL does at prediction
ROUNDS = 5000
TOLERANCE = 1e-10
NOISE = 2.0  # standard errors below which a covariance is no divisor


@dataclass(frozen=True, slots=True)
class Moments:
    """Closed form: a rank-1 matrix fitted to the off-diagonal covariances by alternating least squares.

    Then TPR_k = mu_k + (1 - pi) D_k and FPR_k = mu_k - pi D_k, and P(good) is naive Bayes.
    """

    balance: float | None = None

    def fit(self, table: VerdictTable, labels: np.ndarray | None = None) -> Fit:
        votes, balance = votes_and_balance(table, self.balance, labels)
        covariance, count = pairwise(votes)
        return from_loadings(votes, balance, rank_one(covariance, count))


@dataclass(frozen=True, slots=True)
class Triplets:
    """FlyingSquid's triplets (Fu et al. 2020), centred: |a_i| = median over j, k of sqrt(|C_ij C_ik / C_jk|).

    a = D sqrt(pi (1 - pi)).  The median lets a few dependent triplets do little harm; divisors within the noise are
    skipped.  A verifier's sign is that of its covariance with the others' sum.
    """

    balance: float | None = None

    def fit(self, table: VerdictTable, labels: np.ndarray | None = None) -> Fit:
        votes, balance = votes_and_balance(table, self.balance, labels)
        covariance, count = pairwise(votes)
        spread = np.sqrt(np.maximum(np.diag(covariance), 0.0))
        weak = np.abs(covariance) < NOISE * np.outer(spread, spread) / np.sqrt(np.maximum(count, 1.0))
        width = len(spread)
        loading = np.zeros(width)
        for i in range(width):
            others = np.delete(np.arange(width), i)
            j, k = np.triu_indices(len(others), 1)
            j, k = others[j], others[k]
            kept = ~weak[j, k] & (covariance[j, k] != 0.0)
            if kept.any():
                j, k = j[kept], k[kept]
                square = np.abs(covariance[i, j] * covariance[i, k] / covariance[j, k])
                loading[i] = np.sqrt(np.median(square))
        sign = np.sign((covariance - np.diag(np.diag(covariance))).sum(axis=1))
        return from_loadings(votes, balance, loading * np.where(sign == 0, 1.0, sign))


@dataclass(frozen=True, slots=True)
class MatchedMoments:
    """The objective of MeTaL and metal-ama, minimised to convergence.

    mu [2M, 2] stacks P(S_k = a | Y = b); O [2M, 2M] is how often two answers come together; P = diag(1 - pi, pi).
    Minimise |O - mu P mu'|^2 over pairs of different verifiers + |diag(O) - mu P 1|^2 (Ratner et al. 2019; Weaver,
    arXiv 2506.18203, eq. 5), by gradient descent with Barzilai and Borwein's step.  As in Snorkel an abstention is an
    answer that is left out: rates are shares of all responses and P(good) multiplies those of the answers given.
    """

    balance: float | None = None

    def fit(self, table: VerdictTable, labels: np.ndarray | None = None) -> Fit:
        votes, balance = votes_and_balance(table, self.balance, labels)
        return fit_matched(votes, balance)


def fit_matched(votes: np.ndarray, balance: float) -> Fit:
    """The fit of votes [N, M] of any number type under a class balance; what is neither 0 nor 1 is no answer."""
    width = votes.shape[1]
    together = np.zeros((2 * width, 2 * width))
    for rows in blocks(len(votes)):
        answers = _answers(votes[rows])
        together += answers.T @ answers
    together /= max(len(votes), 1)
    owner = np.tile(np.arange(width), 2)
    apart = (owner[:, None] != owner[None]).astype(float)
    prior = np.array([1.0 - balance, balance])
    mean = np.diag(together)
    start = np.empty((2 * width, 2))
    start[:width] = mean[:width, None] * np.array([1.2, 0.8])  # sources are a little better than chance
    start[width:] = mean[width:, None] * np.array([0.8, 1.2])
    mu, rounds = _descend(start, together, apart, mean, prior)
    mu = np.clip(mu, EDGE, 1.0 - EDGE)
    evidence = np.log(mu[:, 1]) - np.log(mu[:, 0])
    p_good = np.empty(len(votes))
    for rows in blocks(len(votes)):
        answers = _answers(votes[rows])
        log_odds = logit(np.array(balance)) + answers @ evidence
        p_good[rows] = np.where(answers.sum(axis=1) > 0, sigmoid(log_odds), np.nan)
    tpr = mu[width:, 1] / (mu[:width, 1] + mu[width:, 1])
    tnr = mu[:width, 0] / (mu[:width, 0] + mu[width:, 0])
    return Fit(p_good, balance, tpr, tnr, {"iterations": float(rounds)})


def _answers(votes: np.ndarray) -> np.ndarray:
    """[n, M] -> [n, 2M] float32: 1 where the answer is no; then, where it is yes."""
    width = votes.shape[1]
    answers = np.empty((len(votes), 2 * width), dtype=np.float32)
    np.equal(votes, 0, out=answers[:, :width], casting="unsafe")
    np.equal(votes, 1, out=answers[:, width:], casting="unsafe")
    return answers


def _descend(
    mu: np.ndarray, together: np.ndarray, apart: np.ndarray, mean: np.ndarray, prior: np.ndarray
) -> tuple[np.ndarray, int]:
    """The minimiser from `mu`, and how many steps it took."""
    before = before_slope = None
    for step in range(1, ROUNDS + 1):
        off = apart * (mu * prior @ mu.T - together)
        slope = 4.0 * (off @ mu) * prior + 2.0 * (mu @ prior - mean)[:, None] * prior
        if before is None:
            size = 0.05
        else:
            moved, turned = mu - before, slope - before_slope
            size = float((moved * moved).sum() / max(abs(float((moved * turned).sum())), 1e-300))
        before, before_slope = mu, slope
        mu = mu - min(size, 10.0) * slope
        if float(np.abs(slope).max()) < TOLERANCE:
            return mu, step
    return mu, ROUNDS


def votes_and_balance(
    table: VerdictTable, balance: float | None, labels: np.ndarray | None
) -> tuple[np.ndarray, float]:
    """Votes [N, M] (a score is cut at the class-balance quantile) and the class balance."""
    if balance is None:
        known = np.empty(0) if labels is None else labels[~np.isnan(labels)]
        majority = row_mean(binarise(table, None))
        majority = majority[~np.isnan(majority)]
        share = (known.sum() + 1.0) / (len(known) + 2.0) if len(known) else 0.5
        if not len(known) and len(majority):
            share = float((majority > 0.5).mean() + 0.5 * (majority == 0.5).mean())
        balance = float(np.clip(share, 0.05, 0.95))
    return binarise(table, balance), balance


def pairwise(votes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Covariance [M, M] over the samples that both judged, 0 where there are none, and how many those are."""
    heard = (~np.isnan(votes)).astype(float)
    yes = np.nan_to_num(votes)
    count = heard.T @ heard
    safe = np.maximum(count, 1.0)
    first = yes.T @ heard / safe
    return yes.T @ yes / safe - first * first.T, count


def rank_one(covariance: np.ndarray, count: np.ndarray) -> np.ndarray:
    """a [M] of least sum over i != j of count_ij (C_ij - a_i a_j)^2; the sign makes most of them positive."""
    weight = count / max(float(count.max(initial=1.0)), 1.0)
    np.fill_diagonal(weight, 0.0)
    spread = np.sqrt(np.maximum(np.diag(covariance), 0.0))
    loading = 0.5 * spread
    for _ in range(ROUNDS):
        before = loading.copy()
        for i in range(len(loading)):
            scale = float(weight[i] @ loading**2)
            loading[i] = float((weight[i] * covariance[i]) @ loading) / scale if scale > 1e-15 else 0.0
            loading[i] = float(np.clip(loading[i], -spread[i], spread[i]))
        if float(np.abs(loading - before).max(initial=0.0)) < TOLERANCE:
            break
    return loading if loading.sum() >= 0 else -loading


def from_loadings(votes: np.ndarray, balance: float, loading: np.ndarray) -> Fit:
    """The fit of D = loading / sqrt(pi (1 - pi)): rates, and P(good) by naive Bayes over the votes given."""
    heard = ~np.isnan(votes)
    mean = np.where(heard, votes, 0.0).sum(axis=0) / np.maximum(heard.sum(axis=0), 1)
    power = loading / np.sqrt(balance * (1.0 - balance))
    tpr = np.clip(mean + (1.0 - balance) * power, EDGE, 1.0 - EDGE)
    fpr = np.clip(mean - balance * power, EDGE, 1.0 - EDGE)
    yes = np.where(heard, votes, 0.0)
    log_odds = logit(np.array(balance)) + yes @ np.log(tpr / fpr)
    log_odds = log_odds + (heard - yes) @ np.log((1.0 - tpr) / (1.0 - fpr))
    return Fit(np.where(heard.any(axis=1), sigmoid(log_odds), np.nan), balance, tpr, 1.0 - fpr)
