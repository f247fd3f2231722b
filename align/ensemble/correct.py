"""The label-free answer, corrected by labels: what a handful of them can improve without forgetting the rest.

Legend: N samples, L labelled samples, M verifiers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from align.ensemble.base import Fit, LabelModel, logit, sigmoid
from align.ensemble.calibrate import FINE, MAX_LOGIT, scale_of, soft_limit
from align.ensemble.logistic import centred, enough, shrunk_logistic
from align.ensemble.normalise import normalise
from align.ensemble.table import VerdictTable

RIDGE = 2.0
"""Pull of a verifier's own weight to 0; a verdict is 0 to 1, so one verifier moves the log-odds by about 0.7."""


@dataclass(frozen=True, slots=True)
class Corrected:
    """logit P(good) = slope x (log-odds of `standing`, which sees no label) + offset + w . (verdict - mean verdict).

    One logistic regression on the labels, with the slope pulled to 1 and the rest to 0 (calibrate.py has how hard).  No
    label at all leaves the standing answer; many make it the supervised one.  The pulls already shrink it as much as
    its labels are few, so it is not calibrated a second time: held-out scores come from fewer labels and ask for more.
    """

    standing: LabelModel
    likelihood: bool = True  # the standing answer's log-odds have a scale; those of a mean have none

    def fit(self, table: VerdictTable, labels: np.ndarray | None = None) -> Fit:
        before = self.standing.fit(table)
        if labels is None or not enough(labels):
            return before
        known = ~np.isnan(labels)
        opinion = np.nan_to_num(before.p_good, nan=before.balance)
        centre, spread, pull = scale_of(opinion, self.likelihood)
        own = centred(normalise(table))
        scaled = soft_limit((logit(opinion, FINE) - centre) / spread, MAX_LOGIT)
        design = np.column_stack([scaled, np.ones(len(scaled)), own])
        pulls = np.concatenate([pull, np.full(own.shape[1], RIDGE)])
        start = np.zeros(len(pulls))
        start[0] = 1.0
        found = shrunk_logistic(design[known], labels[known], pulls, start)
        p_good = sigmoid(soft_limit(design @ found, MAX_LOGIT))
        return replace(before, p_good=np.where(np.isnan(before.p_good), np.nan, p_good))
