"""The mean of the normalised verdicts: the default, since nothing unlabelled beats it when verifiers share errors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from align.ensemble.base import Fit, match_balance, shrink, weighted_rates
from align.ensemble.normalise import binarise, normalise, row_mean, voters
from align.ensemble.prepare import voices
from align.ensemble.table import VerdictTable


@dataclass(frozen=True, slots=True)
class Mean:
    """P(good) = (sum of normalised verdicts + pseudo/2) / (voters + pseudo), where a family is one voter.

    Rising in the mean and never 0 or 1, so it serves as a cautious probability; it is not calibrated.  Where the class
    balance is known, the log-odds are moved by one constant so that P(good) has that mean.
    """

    pseudo: float  # verifiers that say one half, added to every response
    balance: float | None = None

    def fit(self, table: VerdictTable, labels: np.ndarray | None = None) -> Fit:
        return fit_shared(table, voices(table, normalise(table)), self.pseudo, self.balance)


def fit_shared(table: VerdictTable, values: np.ndarray, pseudo: float, balance: float | None) -> Fit:
    """The fit of a model that gives each of the values [N, voters] the same say.

    The rates are agreement with the ensemble, a verifier's own vote included: kind to the verifier.
    """
    p_good = shrink(row_mean(values), voters(values), pseudo)
    if balance is not None:
        p_good = match_balance(p_good, balance)
    share = float(np.nanmean(p_good)) if not np.isnan(p_good).all() else 0.5
    tpr, tnr = weighted_rates(binarise(table, balance), p_good, pseudo=0.0, tilt=0.5)
    return Fit(p_good=p_good, balance=share, tpr=tpr, tnr=tnr)
