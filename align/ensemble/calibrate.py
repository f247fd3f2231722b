"""Probabilities that mean what they say: from labels where there are any, cautious where there are none.

With labels: Platt's two numbers, fitted to out-of-fold scores, so that no label judges a score it helped to make.  A
handful of labelled prompts says little of how many responses are good, so the class balance is read from the unlabelled
ones by the EM of Saerens et al. (2002).  Responses to one prompt share its difficulty; a distribution of difficulty
over the prompts, fitted without parameters (Laird 1978), gives each response the evidence of its siblings.

Legend: N samples, L labelled samples, G prompts, P points of the grid of difficulties.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from align.ensemble.base import logit, sigmoid
from align.ensemble.logistic import shrunk_logistic
from align.ensemble.normalise import blocks

MAX_LOGIT = 8.0  # no calibrated probability is beyond odds of e^8
FINE = 1e-13  # how near 0 and 1 raw probabilities are told apart: the order is kept
MAX_UNSEEN = 4.0  # and none that no label has seen, beyond e^4
GRID = (np.arange(41) + 0.5) / 41  # [P] success rates of a prompt
MANY_LABELS = 1000  # from here on isotonic regression has enough to go by
SLOPE_PRIOR = 4.0  # strength of the pull of the slope to 1, in units of the log loss
OFFSET_PRIOR = 2.0  # strength of the pull of the offset to 0
FREE = 0.02  # share of those pulls for an opinion that is no likelihood
SIBLINGS = 64  # responses to one prompt of which all pairs are looked at
PAIRS = 200_000  # pairs that are looked at
BALANCE_BIAS = 0.25  # how far the EM of the class balance may be off where the classes overlap wholly


@dataclass(frozen=True, slots=True)
class Platt:
    """P(good) = sigmoid(slope x logit + offset).

    Example: Platt(slope=0.6, offset=-0.1, balance=0.4)
    """

    slope: float
    offset: float
    balance: float  # class balance of the labels that it was fitted to

    def __call__(self, p_good: np.ndarray) -> np.ndarray:
        """[N] raw -> [N] calibrated."""
        return sigmoid(soft_limit(self.slope * logit(p_good, FINE) + self.offset, MAX_LOGIT))


def soft_limit(log_odds: np.ndarray, limit: float) -> np.ndarray:
    """x / (1 + (x / limit)^4)^(1/4): near x, never beyond the limit, and no two values made equal."""
    return log_odds / np.sqrt(np.sqrt(1.0 + (log_odds / limit) ** 4))


def platt(p_good: np.ndarray, labels: np.ndarray, likelihood: bool = True) -> Platt:
    """Slope and offset of least log loss on [L], both pulled to leaving it as it is (Platt 1999).

    The loss is sum log(1 + exp(-+z)) + SLOPE_PRIOR/2 (slope - 1)^2 + OFFSET_PRIOR/2 offset^2, and the slope is kept
    above 0.  An opinion that is no `likelihood`, such as a mean, has log-odds of arbitrary scale: it is brought to
    standard deviation 1 about its mean first, and hardly pulled.
    """
    centre, spread, pull = scale_of(p_good, likelihood)
    design = np.column_stack([(logit(p_good, FINE) - centre) / spread, np.ones(len(p_good))])
    smooth = (labels * (len(labels) + 1.0) + 0.5) / (len(labels) + 2.0)  # Platt's targets: never quite 0 or 1
    slope, offset = shrunk_logistic(design, smooth, pull, np.array([1.0, 0.0])).tolist()
    share = float((labels.sum() + 1.0) / (len(labels) + 2.0))
    slope = max(slope, 0.02) / spread
    return Platt(slope, offset - slope * centre, share)


def scale_of(p_good: np.ndarray, likelihood: bool) -> tuple[float, float, np.ndarray]:
    """Centre and spread that log-odds are brought to, and how hard their slope and offset are pulled to 1 and 0."""
    pull = np.array([SLOPE_PRIOR, OFFSET_PRIOR])
    if likelihood:
        return 0.0, 1.0, pull
    raw = logit(p_good, FINE)
    return float(raw.mean()), max(float(raw.std()), 1e-6), pull * FREE


def isotonic(p_good: np.ndarray, labels: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The rising step function of least squared error on [L], read at the probabilities `at`.

    Pool adjacent violators (Ayer et al. 1955), linear between the middles of the pools.
    """
    order = np.argsort(p_good, kind="stable")
    pools: list[list[float]] = []  # [labels, count, sum of x]
    for x, y in zip(p_good[order].tolist(), labels[order].tolist(), strict=True):
        pools.append([y, 1.0, x])
        while len(pools) > 1 and pools[-2][0] * pools[-1][1] >= pools[-1][0] * pools[-2][1]:
            last = pools.pop()
            pools[-1] = [a + b for a, b in zip(pools[-1], last, strict=True)]
    middle = np.array([x / n for _, n, x in pools])
    height = np.array([(y + 0.5) / (n + 1.0) for y, n, _ in pools])  # a pool of one kind is not certain
    return np.where(np.isnan(at), np.nan, np.interp(at, middle, np.maximum.accumulate(height)))


def log_losses(p_good: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """-log of the probability that was given to what is so, [L]."""
    z = logit(p_good)
    return np.logaddexp(0.0, z) - labels * z


def log_loss(p_good: np.ndarray, labels: np.ndarray) -> float:
    """The mean of log_losses on [L]."""
    return float(log_losses(p_good, labels).mean())


def shift_balance(
    p_good: np.ndarray, balance: float, error: float = np.inf, rounds: int = 200
) -> tuple[np.ndarray, float]:
    """P(good) [N] and the class balance, once the balance is that of these samples and not that of the labels.

    EM of Saerens, Latinne and Decaestecker (2002): q = p-odds x (pi' odds / pi odds), pi' = mean q, until it settles.
    The labels' own share is then mixed in with the weight b^2 / (b^2 + error^2): `error` is its standard error, and
    b = BALANCE_BIAS x mean 4 q (1 - q) is the bias that the EM may have, more where the classes overlap more.
    """
    present = ~np.isnan(p_good)
    evidence = logit(p_good[present]) - logit(np.array(balance))
    share = balance
    overlap = float((4.0 * p_good[present] * (1.0 - p_good[present])).mean()) if len(evidence) else 1.0
    own = (BALANCE_BIAS * overlap) ** 2 / ((BALANCE_BIAS * overlap) ** 2 + error**2)
    for _ in range(rounds if len(evidence) else 0):
        now = float(np.clip(sigmoid(evidence + logit(np.array(share))).mean(), 1e-3, 1.0 - 1e-3))
        moved, share = abs(now - share), now
        if moved < 1e-7:
            break
    share = (1.0 - own) * share + own * balance
    shifted = np.full(len(p_good), np.nan)
    shifted[present] = sigmoid(evidence + logit(np.array(share)))
    return shifted, share


def share_error(labels: np.ndarray, prompts: np.ndarray) -> float:
    """Standard error of the labels' share of good, over prompts; one more prompt of spread 1/2 keeps it from 0."""
    _, group = np.unique(prompts, return_inverse=True)
    count = np.bincount(group)
    means = np.bincount(group, labels) / count
    return float(np.sqrt((np.square(means - means.mean()).sum() + 0.25) / len(count) ** 2))


@dataclass(frozen=True, slots=True)
class Difficulty:
    """A distribution of difficulty over the prompts, and how well each point of it explains each prompt.

    y ~ Bernoulli(d) with d the prompt's own success rate, d from a grid whose weights are fitted to all prompts by EM.

    Example: difficulty(np.array([0.9, 0.8]), 0.5, np.array([7, 7])) has group [0, 0] and odds [9, 4]
    """

    present: np.ndarray  # [N] bool: the samples with an opinion
    group: np.ndarray  # [those] the prompt of each, counted from 0
    odds: np.ndarray  # [those] likelihood ratio of its evidence
    fit: np.ndarray  # [G, P] log-likelihood of a prompt's evidence at each difficulty
    weight: np.ndarray  # [P] sums to 1


def difficulty(p_good: np.ndarray, balance: float, prompts: np.ndarray, rounds: int = 100) -> Difficulty | None:
    """The distribution of difficulty that explains P(good) [N]; none where no prompt has two opinions."""
    present = ~np.isnan(p_good)
    _, group = np.unique(prompts[present], return_inverse=True)
    if np.bincount(group, minlength=1).max() < 2:
        return None
    odds = np.exp(logit(p_good[present]) - logit(np.array(balance)))
    count = int(group.max()) + 1
    fit = np.zeros((count, len(GRID)))
    for k, d in enumerate(GRID):
        fit[:, k] = np.bincount(group, np.log1p(d * (odds - 1.0)), count)
    likelihood = np.exp(fit - fit.max(axis=1, keepdims=True))
    weight = np.full(len(GRID), 1.0 / len(GRID))
    for _ in range(rounds - 1):
        share = np.zeros(len(GRID))  # sum of the posteriors, over the weights
        for rows in blocks(count):
            share += (1.0 / (likelihood[rows] @ weight)) @ likelihood[rows]
        weight = (weight * share + 1.0 / len(GRID)) / (count + 1.0)
    return Difficulty(present, group, odds, fit, weight)


def share_difficulty(p_good: np.ndarray, shared: Difficulty) -> np.ndarray:
    """P(good) [N] with what the other responses to the prompt say of its difficulty.

    q = E[d e^x / (d e^x + 1 - d)] with x the sample's evidence, over the posterior of d given the whole prompt.  The
    order within a prompt stays.
    """
    likelihood = np.exp(shared.fit - shared.fit.max(axis=1, keepdims=True))
    found = np.empty(len(shared.odds))
    for rows in blocks(len(found)):
        posterior = likelihood[shared.group[rows]] * shared.weight
        posterior /= posterior.sum(axis=1, keepdims=True)
        good = GRID * shared.odds[rows, None]
        found[rows] = (posterior * (good / (good + 1.0 - GRID))).sum(axis=1)
    out = p_good.copy()
    out[shared.present] = found
    return out


def joint_log_loss(shared: Difficulty, known: np.ndarray) -> float:
    """-log of the probability of all labels [N], NaN where there is none, under one difficulty for each prompt.

    The labels of one prompt are judged together, as E[prod_i P(y_i | x_i, d)] over the posterior of d given the whole
    prompt's evidence: that siblings go together is what a shared difficulty says, and no label by itself can show it.
    """
    labels = known[shared.present]
    told = np.flatnonzero(~np.isnan(labels))
    asked, group = np.unique(shared.group[told], return_inverse=True)
    y, odds = labels[told, None], shared.odds[told, None]
    each = np.where(y == 1, np.log(GRID * odds), np.log1p(-GRID)) - np.log1p(GRID * (odds - 1.0))
    given = np.zeros((len(asked), len(GRID)))
    np.add.at(given, group, each)
    before = shared.fit[asked] + np.log(shared.weight)
    return float((np.logaddexp.reduce(before, axis=1) - np.logaddexp.reduce(before + given, axis=1)).sum())


def cautious(p_good: np.ndarray, effective: float, voters: float) -> np.ndarray:
    """P(good) where no label can check it: log-odds times effective / nominal number of verifiers, at most e^4 odds.

    A posterior that takes M verifiers for independent is too sure by about M / M_eff in log-odds.  The order and the
    side of one half stay.
    """
    factor = float(np.clip(effective / max(voters, 1.0), 0.2, 1.0))
    return sigmoid(soft_limit(factor * logit(p_good, FINE), MAX_UNSEEN))


Chances = TypeVar("Chances", np.float64, np.ndarray)


@dataclass(frozen=True, slots=True)
class PairProbability:
    """P(win), P(tie), P(loss) of a pair from the P(good) of its two responses.

    P(win) = (q_a (1 - q_b) - c)+ and P(loss) = (q_b (1 - q_a) - c)+ with c = correlation x sqrt(q_a (1 - q_a) q_b
    (1 - q_b)), the covariance of two responses to one prompt beyond what their scores say.  With correlation 0 that is
    the product rule of pairs.py.

    Example: PairProbability(0.0)(0.9, 0.2) == (0.72, 0.26, 0.02)
    """

    correlation: float = 0.0

    def __call__(self, better: float, worse: float) -> tuple[float, float, float]:
        win, tie, loss = self.of(np.float64(better), np.float64(worse))
        return float(win), float(tie), float(loss)

    def of(self, better: Chances, worse: Chances) -> tuple[Chances, Chances, Chances]:
        """P(win), P(tie), P(loss) [pairs] of P(good) [pairs] on either side."""
        shared = self.correlation * np.sqrt(better * (1.0 - better) * worse * (1.0 - worse))
        win = np.maximum(0.0, better * (1.0 - worse) - shared)
        loss = np.maximum(0.0, worse * (1.0 - better) - shared)
        return win, np.maximum(0.0, 1.0 - win - loss), loss


def fit_pairs(p_good: np.ndarray, labels: np.ndarray, prompts: np.ndarray) -> PairProbability:
    """The correlation of least log loss over (win, tie, loss) on all labelled pairs of one prompt [L].

    Found on a grid, and pulled to 0 by a prior worth ten pairs.
    """
    a, b = pairs_within(prompts)
    if len(a) < 20:
        return PairProbability()
    best, least = 0.0, np.inf
    for rho in np.linspace(-0.3, 0.9, 49):
        win, tie, loss = (np.clip(x, 1e-4, 1.0) for x in PairProbability(rho).of(p_good[a], p_good[b]))
        told = np.where(labels[a] > labels[b], win, np.where(labels[a] < labels[b], loss, tie))
        cost = float(-np.log(told).sum() + 10.0 * rho**2)
        if cost < least:
            best, least = float(rho), cost
    return PairProbability(best)


def pairs_within(prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of pairs of samples that answer one prompt: all, of the first SIBLINGS of each.

    Where those are more than about PAIRS, of evenly spread prompts; more tell nothing new.
    """
    order = np.argsort(prompts, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(prompts[order]) != 0]) if len(order) else np.empty(0, dtype=np.int64)
    sizes = np.minimum(np.diff(np.r_[starts, len(order)]), SIBLINGS)
    every = max(1, int(np.ceil((sizes * (sizes - 1) // 2).sum() / PAIRS)))
    starts, sizes = starts[sizes > 1][::every], sizes[sizes > 1][::every]
    first, second = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for size in np.unique(sizes):
        i, j = np.triu_indices(size, 1)
        begin = starts[sizes == size][:, None]
        first.append(order[begin + i].ravel())
        second.append(order[begin + j].ravel())
    return np.concatenate(first), np.concatenate(second)
