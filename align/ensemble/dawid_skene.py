"""Two-class Dawid-Skene EM: learns how far to trust each verifier from how they agree, without a label.

Dawid and Skene, "Maximum likelihood estimation of observer error-rates using the EM algorithm" (1979), with the
usual care: pseudo-votes that tilt each verifier to better than chance, a start from the mean verdict and never from
chance, log-space, and a silent verifier left out of the product rather than counted as a no.

Legend: N samples, M verifiers, C channels, U distinct rows, L levels of all channels together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from align.ensemble.base import Fit, shrink, sigmoid, weighted_rates
from align.ensemble.channels import Channel, channels
from align.ensemble.diagnostics import join_kin, residual_dependence, support_of_others, worse_than_chance
from align.ensemble.normalise import binarise, normalise, row_mean
from align.ensemble.table import VerdictTable

TILT = 0.7  # share of a verifier's pseudo-votes that are right; MeTaL's starting precision
TOLERANCE = 1e-9  # relative change of the log-posterior that ends EM; at 1e-7 doubtful responses still move by 1%
BALANCE_PSEUDO = 1.0  # pseudo-responses of each class behind a free class balance
MAX_LOG_ODDS = 4.0  # the most that one channel may say for or against a response
MIN_SUPPORT = 0.35  # below this the verifiers that are not the leading one's kin know nothing of the fit's "good"
MIN_SOURCES = 5  # joining kin stops here: with fewer sources left too little is left to bear the next fit out
HIGH_RESIDUAL = 0.4  # residual correlation that is worth a warning


@dataclass(frozen=True, slots=True)
class Em:
    """Where EM ended.

    Example: Em(p_good=np.array([0.97, 0.02]), balance=0.5, good=(np.array([0.2, 0.8]),), bad=(np.array([0.7, 0.3]),),
    log_posterior=-3.1, iterations=14, converged=True)
    """

    p_good: np.ndarray  # [N]
    balance: float
    good: tuple[np.ndarray, ...]  # [C] of [levels]: P(level | good)
    bad: tuple[np.ndarray, ...]  # [C] of [levels]: P(level | not good)
    log_posterior: float
    iterations: int
    converged: bool


@dataclass(frozen=True, slots=True)
class DawidSkene:
    """P(good) by naive Bayes over the channels, with rates from EM and each channel held to odds of e^4."""

    pseudo: float
    balance: float | None = None
    max_iterations: int = 200

    def fit(self, table: VerdictTable) -> Fit:
        """The fit; where the other verifiers do not bear it out, again with the leader's closest kin in its family.

        EM's usual mistake is to take an error that a few verifiers share for the answer.  Then one of them leads, and
        the one most correlated with it is the likeliest to share.  A fit that stays unsupported is returned as it was.
        """
        first = fit = self._fit_once(table)
        joined = table
        while fit.diagnostics["support"] < MIN_SUPPORT and len(channels(joined)) > MIN_SOURCES:
            joined = join_kin(joined, int(fit.diagnostics["leader"]))
            fit = self._fit_once(joined)
        if fit.diagnostics["support"] < MIN_SUPPORT:
            return first
        if joined is table:
            return fit
        kin = [n for n, now, before in zip(table.names, joined.families, table.families, strict=True) if now != before]
        said = f"{', '.join(kin)} were taken for one source: apart they outvote the rest; declare them one `family`"
        return replace(fit, warnings=fit.warnings + (said,))

    def _fit_once(self, table: VerdictTable) -> Fit:
        made = channels(table)
        voters = (~np.isnan(table.values)).sum(axis=1)
        start = np.nan_to_num(shrink(row_mean(normalise(table)), voters, self.pseudo), nan=0.5)
        em = expectation_maximisation(made, start, self)
        evidence = channel_log_odds(made, em, MAX_LOG_ODDS)  # [N, C]
        p_good = sigmoid(np.log(em.balance) - np.log1p(-em.balance) + evidence.sum(axis=1))
        p_good = np.where(voters > 0, p_good, np.nan)
        votes = binarise(table, em.balance)
        tpr, tnr = weighted_rates(votes, np.where(voters > 0, em.p_good, np.nan), self.pseudo, TILT)
        residual, one, other = residual_dependence(table, votes, em.balance, tpr, tnr)
        warnings = worse_than_chance(table.names, tpr, tnr)
        if not em.converged:
            warnings += (f"Dawid-Skene stopped after {em.iterations} iterations, before it settled",)
        if residual > HIGH_RESIDUAL:
            warnings += (
                f"{one} and {other} agree in a way that the model does not explain (residual correlation "
                f"{residual:.2f}): if they share a source of error, give them the same `family`",
            )
        leader, support = support_of_others(table, made, evidence, p_good)
        diagnostics = {
            "iterations": float(em.iterations),
            "converged": float(em.converged),
            "residual_dependence": residual,
            "support": support,
            "leader": float(leader),
        }
        return Fit(p_good, em.balance, tpr, tnr, diagnostics, warnings)


def expectation_maximisation(made: Sequence[Channel], start: np.ndarray, model: DawidSkene) -> Em:
    """EM to the posterior mode from P(good) = `start` [N].

    Equal rows are counted once.  A silent channel points at one spare slot whose log-probability is 0 in both classes.
    With weights other than 1 the likelihood is a composite one; each round of EM still raises it.
    """
    slots, counts, inverse = _distinct_rows(made)
    segment = np.repeat(np.arange(len(made)), [len(c.levels) for c in made])  # [L] channel of each slot
    level = np.concatenate([c.levels for c in made])
    weight = np.array([c.weight for c in made])[segment]  # [L]
    prior_good, prior_bad = (_pseudo_votes(x, segment, model.pseudo) for x in (level, 1.0 - level))
    total = np.bincount(slots.ravel(), np.tile(counts, len(made)), len(level) + 1)[:-1]
    p_good = np.bincount(inverse, start, len(counts)) / counts  # [U]
    balance = model.balance
    known = balance is not None
    previous, posterior, converged, iterations = -np.inf, -np.inf, False, 0
    while iterations < model.max_iterations and not converged:
        iterations += 1
        good_votes = np.bincount(slots.ravel(), np.tile(counts * p_good, len(made)), len(level) + 1)[:-1]
        good = _rates(good_votes + prior_good, segment)
        bad = _rates(total - good_votes + prior_bad, segment)
        if not known:
            balance = float((counts @ p_good + BALANCE_PSEUDO) / (counts.sum() + 2 * BALANCE_PSEUDO))
        assert balance is not None
        log_good = np.log(balance) + _log_likelihood(good, weight, slots)
        log_bad = np.log1p(-balance) + _log_likelihood(bad, weight, slots)
        p_good = sigmoid(log_good - log_bad)
        posterior = float(counts @ np.logaddexp(log_good, log_bad))
        posterior += float(prior_good @ np.log(good) + prior_bad @ np.log(bad))
        if not known:
            posterior += BALANCE_PSEUDO * float(np.log(balance) + np.log1p(-balance))
        converged = abs(posterior - previous) <= TOLERANCE * abs(posterior)
        previous = posterior
    ends = np.cumsum([len(c.levels) for c in made])[:-1]
    assert balance is not None
    rates = tuple(np.split(good, ends)), tuple(np.split(bad, ends))
    return Em(p_good[inverse], balance, *rates, posterior, iterations, converged)


def channel_log_odds(made: Sequence[Channel], em: Em, limit: float) -> np.ndarray:
    """[N, C]: what each channel says for (above 0) or against each sample, in log-odds, held within +-`limit`.

    The limit keeps one over-trusted channel from settling a response alone; among responses that pass every check
    it leaves the order to the others.
    """
    columns = []
    for channel, good, bad in zip(made, em.good, em.bad, strict=True):
        log_odds = np.append(np.clip(channel.weight * (np.log(good) - np.log(bad)), -limit, limit), 0.0)
        columns.append(log_odds[channel.codes])  # code -1 is the appended 0
    return np.column_stack(columns)


def _distinct_rows(made: Sequence[Channel]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slots [C, U] into the levels of all channels, how often each row occurs [U], and which row each sample is [N]."""
    codes = np.column_stack([c.codes for c in made]).astype(np.int16)
    sizes = np.array([len(c.levels) + 1 for c in made])
    if np.log2(sizes).sum() < 62:  # a row fits one integer, which sorts several times faster
        keys = (codes + 1) @ np.append(1, np.cumprod(sizes[:-1]))
        _, first, inverse, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
        rows = codes[first]
    else:
        rows, inverse, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    offsets = np.cumsum([0] + [len(c.levels) for c in made])
    slots = np.where(rows < 0, offsets[-1], rows + offsets[:-1])
    return np.ascontiguousarray(slots.T), counts.astype(float), inverse.ravel()


def _pseudo_votes(favour: np.ndarray, segment: np.ndarray, pseudo: float) -> np.ndarray:
    """[L]: `pseudo` votes per channel, most on the levels that speak for the class; two levels get 0.7 and 0.3."""
    weight = 1.0 - TILT + (2.0 * TILT - 1.0) * favour
    return pseudo * weight / np.bincount(segment, weight)[segment]


def _rates(votes: np.ndarray, segment: np.ndarray) -> np.ndarray:
    """[L]: votes as shares of their channel; a floor keeps the logarithm finite where the prior is switched off."""
    votes = np.maximum(votes, 1e-12)
    return votes / np.bincount(segment, votes)[segment]


def _log_likelihood(rates: np.ndarray, weight: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """[U]: log P(row | class), each channel's share times its weight."""
    return np.append(weight * np.log(rates), 0.0)[slots].sum(axis=0)
