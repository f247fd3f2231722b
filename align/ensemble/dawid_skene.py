"""Two-class Dawid-Skene EM: learns how far to trust each verifier from how they agree, without a label.

Dawid and Skene, "Maximum likelihood estimation of observer error-rates using the EM algorithm" (1979), with the
usual care: pseudo-votes that tilt each verifier to better than chance, a start from the mean verdict and never from
chance, log-space, and a silent verifier left out of the product rather than counted as a no.

Legend: N samples, M verifiers, C channels, U distinct rows (patterns.py), L levels of all channels together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from align.ensemble.base import Fit, nothing, shrink, sigmoid, weighted_rates
from align.ensemble.channels import Channel, channels
from align.ensemble.diagnostics import join_kin, residual_dependence, support_of_others, worse_than_chance
from align.ensemble.normalise import binarise, normalise, row_mean
from align.ensemble.patterns import Patterns, patterns
from align.ensemble.prepare import explained_variance, learning_sets, within_prompts
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
    """P(good) by naive Bayes over the channels, with rates from EM and each channel held to odds of e^4.

    `careful` is for a round that nobody has looked at: see prepare.py.
    """

    pseudo: float
    balance: float | None = None
    max_iterations: int = 200
    careful: bool = False
    one_coin: bool = False  # each two-level channel is right with one probability, whatever the class

    def fit(self, table: VerdictTable, labels: np.ndarray | None = None) -> Fit:
        """The fit; where the other verifiers do not bear it out, again with the leader's closest kin in its family.

        EM's usual mistake is to take an error that a few verifiers share for the answer.  Then one of them leads, and
        the one most correlated with it is the likeliest to share.  A fit that stays unsupported is returned as it was.
        """
        first = fit = self._fit_once(table, labels)
        joined = table
        while fit.diagnostics["support"] < MIN_SUPPORT and len(channels(joined)) > MIN_SOURCES:
            joined = join_kin(joined, int(fit.diagnostics["leader"]))
            fit = self._fit_once(joined, labels)
        if fit.diagnostics["support"] < MIN_SUPPORT:
            return first
        if joined is table:
            return fit
        kin = [n for n, now, before in zip(table.names, joined.families, table.families, strict=True) if now != before]
        said = f"{', '.join(kin)} were taken for one source: apart they outvote the rest; declare them one `family`"
        return replace(fit, warnings=fit.warnings + (said,))

    def _fit_once(self, table: VerdictTable, labels: np.ndarray | None = None) -> Fit:
        heard = table.voters > 0
        if not heard.any():
            return replace(nothing(table), diagnostics={"support": 0.0, "leader": 0.0})
        made, em, learnt = self.learn(table, labels)
        said = level_log_odds(made, em, MAX_LOG_ODDS)
        evidence = np.zeros(len(heard))
        for channel, levels in zip(made, said, strict=True):
            evidence += levels[channel.codes]
        p_good = np.where(heard, sigmoid(np.log(em.balance) - np.log1p(-em.balance) + evidence), np.nan)
        votes = binarise(table, em.balance)
        tpr, tnr = weighted_rates(votes, np.where(heard, em.p_good, np.nan), self.pseudo, TILT)
        residual, one, other = residual_dependence(table, votes, em.balance, tpr, tnr)
        warnings = worse_than_chance(table.names, tpr, tnr)
        if not em.converged:
            warnings += (f"Dawid-Skene stopped after {em.iterations} iterations, before it settled",)
        if residual > HIGH_RESIDUAL:
            warnings += (
                f"{one} and {other} agree in a way that the model does not explain (residual correlation "
                f"{residual:.2f}): if they share a source of error, give them the same `family`",
            )
        leader, support = support_of_others(table, made, said, p_good, learnt)
        diagnostics = {
            "iterations": float(em.iterations),
            "converged": float(em.converged),
            "residual_dependence": residual,
            "support": support,
            "leader": float(leader),
        }
        return Fit(p_good, em.balance, tpr, tnr, diagnostics, warnings)

    def learn(self, table: VerdictTable, labels: np.ndarray | None = None) -> tuple[list[Channel], Em, np.ndarray]:
        """The channels as weighted, where EM ended, and which channels were learnt from [C]."""
        made = channels(table, silence=self.careful)
        start = np.nan_to_num(shrink(row_mean(normalise(table)), table.voters, self.pseudo), nan=0.5)
        if not self.careful:
            return made, expectation_maximisation(made, start, self, labels), np.ones(len(made), dtype=bool)
        fits = []
        for heard in learning_sets(made, table.kinds):
            listened = [c if h else replace(c, weight=0.0) for c, h in zip(made, heard, strict=True)]
            em = expectation_maximisation(listened, start, self, labels)
            fits.append((explained_variance(made, em.good, em.bad, em.balance), em, heard))
        _, em, heard = max(fits, key=lambda fit: fit[0])
        said = level_log_odds(made, em, MAX_LOG_ODDS)
        factors = [
            1.0 if h else within_prompts(levels[c.codes], em.p_good, table.prompts)
            for c, levels, h in zip(made, said, heard, strict=True)
        ]
        return [replace(c, weight=c.weight * f) for c, f in zip(made, factors, strict=True)], em, heard


def expectation_maximisation(
    made: Sequence[Channel], start: np.ndarray, model: DawidSkene, labels: np.ndarray | None = None
) -> Em:
    """EM to the posterior mode from P(good) = `start` [N]; labelled samples (1, 0, else NaN) stay at their label.

    A channel with weight 0 is learnt about and not learnt from.
    """
    marks = None if labels is None else np.where(np.isnan(labels), 2, labels).astype(np.int64)
    table = patterns([c.codes for c in made], [len(c.levels) for c in made], marks)
    held = np.full(len(table.counts), np.nan) if labels is None else table.rows(labels)  # [U]
    em = maximise(table, made, table.rows(start), held, model)
    return replace(em, p_good=table.samples(em.p_good))


def maximise(table: Patterns, made: Sequence[Channel], start: np.ndarray, held: np.ndarray, model: DawidSkene) -> Em:
    """EM on vote patterns: `start` and `held` are by row [U], and so is the P(good) that is returned.

    Of the channels only levels and weights are read.  With weights other than 1 the likelihood is a composite one; each
    round of EM still raises it.
    """
    segment = np.repeat(np.arange(len(made)), [len(c.levels) for c in made])  # [L] channel of each slot
    level = np.concatenate([c.levels for c in made])
    weight = np.array([c.weight for c in made])[segment]  # [L]
    prior_good, prior_bad = (_pseudo_votes(x, segment, model.pseudo) for x in (level, 1.0 - level))
    total = table.votes(np.ones(len(table.counts)))
    p_good = np.where(np.isnan(held), start, held)  # [U]
    balance, counts = model.balance, table.counts
    known = balance is not None
    previous, posterior, converged, iterations = -np.inf, -np.inf, False, 0
    while iterations < model.max_iterations and not converged:
        iterations += 1
        good_votes = table.votes(p_good)
        good = _rates(good_votes + prior_good, segment)
        bad = _rates(total - good_votes + prior_bad, segment)
        if model.one_coin:
            good, bad = _one_coin(made, good_votes + prior_good, total - good_votes + prior_bad)
        if not known:
            balance = float((counts @ p_good + BALANCE_PSEUDO) / (counts.sum() + 2 * BALANCE_PSEUDO))
        assert balance is not None
        log_good = np.log(balance) + table.sums(weight * np.log(good))
        log_bad = np.log1p(-balance) + table.sums(weight * np.log(bad))
        p_good = np.where(np.isnan(held), sigmoid(log_good - log_bad), held)
        mixed = np.logaddexp(log_good, log_bad)
        posterior = float(counts @ np.where(np.isnan(held), mixed, np.where(held > 0.5, log_good, log_bad)))
        posterior += float(prior_good @ np.log(good) + prior_bad @ np.log(bad))
        if not known:
            posterior += BALANCE_PSEUDO * float(np.log(balance) + np.log1p(-balance))
        converged = abs(posterior - previous) <= TOLERANCE * abs(posterior)
        previous = posterior
    ends = np.cumsum([len(c.levels) for c in made])[:-1]
    assert balance is not None
    rates = tuple(np.split(good, ends)), tuple(np.split(bad, ends))
    return Em(p_good, balance, *rates, posterior, iterations, converged)


def channel_log_odds(made: Sequence[Channel], em: Em, limit: float) -> np.ndarray:
    """[N, C]: what each channel says for (above 0) or against each sample, in log-odds, held within +-`limit`."""
    said = level_log_odds(made, em, limit)
    return np.column_stack([levels[channel.codes] for channel, levels in zip(made, said, strict=True)])


def level_log_odds(made: Sequence[Channel], em: Em, limit: float) -> list[np.ndarray]:
    """[C] of [levels + 1]: what each level says for (above 0) or against a sample; last, as code -1, silence: 0.

    The limit keeps one over-trusted channel from settling a response alone; among responses that pass every check
    it leaves the order to the others.
    """
    return [
        np.append(np.clip(channel.weight * (np.log(good) - np.log(bad)), -limit, limit), 0.0)
        for channel, good, bad in zip(made, em.good, em.bad, strict=True)
    ]


def _pseudo_votes(favour: np.ndarray, segment: np.ndarray, pseudo: float) -> np.ndarray:
    """[L]: `pseudo` votes per channel, most on the levels that speak for the class; two levels get 0.7 and 0.3."""
    weight = 1.0 - TILT + (2.0 * TILT - 1.0) * favour
    return pseudo * weight / np.bincount(segment, weight)[segment]


def _one_coin(made: Sequence[Channel], good: np.ndarray, bad: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[L] each: as _rates, with P(yes | good) = P(no | not good) where a channel has two levels."""
    first, rates = 0, ([], [])  # type: ignore[var-annotated]
    for channel in made:
        span = slice(first, first + len(channel.levels))
        first = span.stop
        g, b = good[span], bad[span]
        if len(channel.levels) == 2:
            g = b[::-1] + g
            b = g[::-1]
        for out, votes in zip(rates, (g, b), strict=True):
            out.append(np.maximum(votes, 1e-12) / np.maximum(votes, 1e-12).sum())
    return np.concatenate(rates[0]), np.concatenate(rates[1])


def _rates(votes: np.ndarray, segment: np.ndarray) -> np.ndarray:
    """[L]: votes as shares of their channel; a floor keeps the logarithm finite where the prior is switched off."""
    votes = np.maximum(votes, 1e-12)
    return votes / np.bincount(segment, votes)[segment]
