"""The majority vote."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from align.ensemble.base import Fit
from align.ensemble.mean import fit_shared
from align.ensemble.normalise import binarise
from align.ensemble.table import VerdictTable


@dataclass(frozen=True, slots=True)
class Majority:
    """P(good) = (yes votes + pseudo/2) / (votes + pseudo): above one half where most say yes, one half at a tie.

    Heads are counted: a family has as many votes as members, which is what the other methods are compared with.
    A score verifier votes yes for the top share `balance` of the round, or for the better half.
    """

    pseudo: float
    balance: float | None = None

    def fit(self, table: VerdictTable, labels: np.ndarray | None = None) -> Fit:
        return fit_shared(table, binarise(table, self.balance), self.pseudo, self.balance)
