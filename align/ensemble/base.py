"""What every label model has in common.

Legend: N samples, M verifiers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from align.ensemble.normalise import blocks
from align.ensemble.table import VerdictTable


@dataclass(frozen=True, slots=True)
class Fit:
    """A label model after it has seen a table: the posterior, the parameters and the diagnostics.

    Example: Fit(p_good=np.array([0.9, 0.2]), balance=0.55, tpr=np.array([0.8]), tnr=np.array([0.7]),
    diagnostics={"iterations": 12.0}, warnings=())
    """

    p_good: np.ndarray  # [N] in [0, 1]; NaN where every verifier abstained
    balance: float  # share of good responses
    tpr: np.ndarray  # [M] P(yes | good)
    tnr: np.ndarray  # [M] P(no | not good)
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def nothing(table: VerdictTable) -> Fit:
    """The fit where nobody spoke."""
    half = np.full(len(table.names), 0.5)
    return Fit(np.full(len(table.values), np.nan), 0.5, half, half)


class LabelModel(Protocol):
    """Turns a table of verdicts into P(good), from the verdicts themselves and, where there are any, from labels.

    `labels` [N] is 1 for good, 0 for not good and NaN where nobody knows; a model that has no use for labels takes no
    notice.  The posterior, the parameters and the diagnostics are those of the Fit.
    """

    def fit(self, table: VerdictTable, labels: np.ndarray | None = None) -> Fit: ...


def weighted_rates(votes: np.ndarray, p_good: np.ndarray, pseudo: float, tilt: float) -> tuple[np.ndarray, np.ndarray]:
    """TPR and TNR [M] of votes [N, M] where each sample counts as good with probability p_good [N].

    `pseudo` votes of which `tilt` are right are added to each count, so a verifier that was never heard is thought a
    little better than chance.  Without pseudo-votes a verifier that was never heard has rate NaN.
    """
    heard, yes = weighted_votes(votes, np.nan_to_num(np.vstack([p_good, 1.0 - p_good])))
    with np.errstate(invalid="ignore"):
        tpr = (yes[0] + pseudo * tilt) / (heard[0] + pseudo)
        tnr = (heard[1] - yes[1] + pseudo * tilt) / (heard[1] + pseudo)
    return tpr, tnr


def weighted_votes(votes: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[K, M] each: for each of the weights [K, N], their sum where a verifier of votes [N, M] speaks, and says yes."""
    heard, yes = np.zeros((2, len(weights), votes.shape[1]))
    for rows in blocks(len(votes)):
        present = ~np.isnan(votes[rows])
        heard += weights[:, rows] @ present.astype(float)
        yes += weights[:, rows] @ np.where(present, votes[rows], 0.0)
    return heard, yes


def shrink(mean: np.ndarray, voters: np.ndarray, pseudo: float) -> np.ndarray:
    """[N]: a mean verdict as if `pseudo` further verifiers had said one half, so few voters never make a certainty."""
    with np.errstate(invalid="ignore"):
        return np.where(voters > 0, (voters * mean + pseudo * 0.5) / (voters + pseudo), np.nan)


def match_balance(p_good: np.ndarray, balance: float) -> np.ndarray:
    """P(good) moved by one constant in log-odds so that its mean over the round is `balance`; the order stays."""
    present = ~np.isnan(p_good)
    if not present.any():
        return p_good
    clipped = np.clip(p_good, 1e-6, 1.0 - 1e-6)
    logit = np.log(clipped) - np.log1p(-clipped)
    low, high = -40.0, 40.0
    for _ in range(60):  # bisection: the mean rises with the shift
        shift = (low + high) / 2
        if sigmoid(logit[present] + shift).mean() < balance:
            low = shift
        else:
            high = shift
    return sigmoid(logit + (low + high) / 2)


def wins(good: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """[good, bad]: 1 where a good response stands above a bad one, 0 where below, one half where they are level."""
    return 0.5 + 0.5 * np.sign(good[:, None] - bad[None])


def logit(p: np.ndarray, edge: float = 1e-6) -> np.ndarray:
    """log(p / (1 - p)), with p held `edge` away from 0 and 1; NaN stays NaN."""
    p = np.clip(p, edge, 1.0 - edge)
    return np.log(p) - np.log1p(-p)


def sigmoid(logit: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow at either end; NaN stays NaN."""
    small = np.exp(-np.abs(logit))
    return np.where(logit > 0, 1.0, small) / (1.0 + small)
