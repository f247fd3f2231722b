"""Models that learn from labels alone: a verifier's rates counted on them, or the one verifier that does best.

Legend: N samples, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from align.ensemble.base import Fit, nothing, sigmoid, weighted_rates
from align.ensemble.channels import channels
from align.ensemble.dawid_skene import MAX_LOG_ODDS, DawidSkene, channel_log_odds, expectation_maximisation
from align.ensemble.jury import correlation
from align.ensemble.logistic import enough
from align.ensemble.mean import fit_shared
from align.ensemble.normalise import binarise, normalise
from align.ensemble.table import VerdictTable


@dataclass(frozen=True, slots=True)
class NaiveBayes:
    """Naive Bayes with the channels' rates counted on the labelled samples, `pseudo` prior votes each.

    This is one M step of Dawid and Skene's EM with the labels for a posterior, and then one E step.  Without labels of
    both classes what speaks is the prior, and that is said.
    """

    pseudo: float = 2.0
    balance: float | None = None

    def fit(self, table: VerdictTable, labels: np.ndarray | None = None) -> Fit:
        known = np.zeros(len(table.values), dtype=bool) if labels is None else ~np.isnan(labels)
        made = channels(table, silence=True)
        if not made:
            return nothing(table)
        seen = [replace(c, codes=c.codes[known]) for c in made]
        truth = np.empty(0) if labels is None else labels[known]
        once = DawidSkene(self.pseudo, self.balance, max_iterations=1)
        em = expectation_maximisation(seen, truth, once, truth)
        evidence = channel_log_odds(made, em, MAX_LOG_ODDS)
        p_good = sigmoid(np.log(em.balance) - np.log1p(-em.balance) + evidence.sum(axis=1))
        p_good = np.where(table.voters > 0, p_good, np.nan)
        tpr, tnr = weighted_rates(binarise(table, em.balance), np.full(len(known), np.nan), self.pseudo, 0.7)
        if labels is not None:
            tpr, tnr = weighted_rates(binarise(table, em.balance), labels, self.pseudo, 0.7)
        said = "naive Bayes needs labels of both classes: the prior votes, the same for every verifier, stand in for it"
        return Fit(p_good, em.balance, tpr, tnr, warnings=() if enough(truth) else (said,))


@dataclass(frozen=True, slots=True)
class BestSingle:
    """The verdicts of the one verifier that agrees best with the labels, turned round if it is best at being wrong.

    Agreement is the correlation over all labelled samples; a silent verdict is the class balance.  Without labels of
    both classes no verifier is known to be the best: the mean verdict is returned with a warning.
    """

    def fit(self, table: VerdictTable, labels: np.ndarray | None = None) -> Fit:
        values = normalise(table)
        truth = np.full(len(values), np.nan) if labels is None else labels
        if not enough(truth):
            said = "the best single verifier needs labels of both classes: the mean verdict stands in for it"
            return replace(fit_shared(table, values, 0.0, None), warnings=(said,))
        share = float(np.nanmean(truth))
        found = np.array([agreement(values[:, j], truth) for j in range(values.shape[1])])
        best = int(np.argmax(np.abs(found)))
        verdict = values[:, best] if found[best] >= 0 else 1.0 - values[:, best]
        p_good = np.where(np.isnan(verdict), share, verdict)
        p_good = np.where(table.voters > 0, p_good, np.nan)
        tpr, tnr = weighted_rates(binarise(table, float(np.clip(share, 0.01, 0.99))), truth, 2.0, 0.7)
        return Fit(p_good, share, tpr, tnr, {"best": float(best)})


def agreement(verdict: np.ndarray, labels: np.ndarray) -> float:
    """Correlation with the labels, times the root of the share of labels that it spoke on; 0 where undefined."""
    known = ~np.isnan(labels)
    found = correlation(verdict, labels)
    if np.isnan(found):
        return 0.0
    return found * float(np.sqrt((~np.isnan(verdict[known])).mean()))
