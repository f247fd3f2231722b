"""The ensemble against its verifiers, on gold.  For reporting only: nothing here reaches training.

Legend: N samples, M verifiers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from align.ensemble.combine import Combined
from align.ensemble.normalise import binarise, midranks, normalise, row_mean
from align.ensemble.table import VerdictTable


@dataclass(frozen=True, slots=True)
class Agreement:
    """How well one source of opinion agrees with gold.

    Example: Agreement("nines", accuracy=0.94, accuracy_at_balance=0.94, auc=0.95, coverage=0.99)
    """

    name: str
    accuracy: float  # cut at one half (a score: at its class-balance quantile); no opinion counts as half right
    accuracy_at_balance: float  # cut so that the share of yes is the ensemble's class balance
    auc: float | None  # chance that a right response is above a wrong one; None where gold has one class only
    coverage: float  # share of the responses known to gold that it had an opinion on


@dataclass(frozen=True, slots=True)
class EnsembleReport:
    """P(good), the mean, the majority and each verifier, on the responses that gold judged.

    Example: EnsembleReport(p_good=Agreement(…), mean=…, majority=…, verifiers=(…), best_single="nines", gold_rate=0.4,
    judged=2048, method="dawid_skene", class_balance=0.41)
    """

    p_good: Agreement
    mean: Agreement
    majority: Agreement
    verifiers: tuple[Agreement, ...]  # [M]
    best_single: str  # the verifier with the best accuracy, known only thanks to gold
    gold_rate: float  # share of right responses: the accuracy of always saying yes
    judged: int  # responses that gold judged
    method: str
    class_balance: float  # the ensemble's own estimate of gold_rate

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def explain(self) -> str:
        """The comparison in one line."""
        best = next(v for v in self.verifiers if v.name == self.best_single)
        return (
            f"accuracy on gold ({self.judged} responses, {self.gold_rate:.1%} right): P(good) by {self.method} "
            f"{self.p_good.accuracy:.1%}, best single verifier ({best.name}) {best.accuracy:.1%}, mean "
            f"{self.mean.accuracy:.1%} (cut at the class balance {self.mean.accuracy_at_balance:.1%}), majority "
            f"{self.majority.accuracy:.1%}"
        )


def ensemble_report(table: VerdictTable, combined: Combined, gold: np.ndarray) -> EnsembleReport | None:
    """The comparison on gold [N] of 0, 1 and NaN (not judged); None where gold judged nothing."""
    judged = ~np.isnan(gold)
    if not judged.any():
        return None
    truth = gold[judged]
    if not np.isin(truth, (0.0, 1.0)).all():
        raise ValueError("the ensemble can be compared with a binary gold verifier only")
    balance = float(np.clip(combined.class_balance, 0.0, 1.0))
    values, votes = normalise(table)[judged], binarise(table, balance)[judged]

    def measure(name: str, opinion: np.ndarray, decision: np.ndarray) -> Agreement:
        return Agreement(
            name=name,
            accuracy=accuracy(decision, truth),
            accuracy_at_balance=accuracy_at_balance(opinion, truth, balance),
            auc=auc(opinion, truth),
            coverage=float((~np.isnan(opinion)).mean()),
        )

    p_good, mean, majority = combined.p_good[judged], row_mean(values), row_mean(votes)
    verifiers = tuple(measure(name, values[:, j], votes[:, j]) for j, name in enumerate(table.names))
    return EnsembleReport(
        p_good=measure("p_good", p_good, p_good),
        mean=measure("mean", mean, mean),
        majority=measure("majority", majority, majority),
        verifiers=verifiers,
        best_single=max(verifiers, key=lambda v: v.accuracy).name,
        gold_rate=float(truth.mean()),
        judged=len(truth),
        method=combined.method,
        class_balance=balance,
    )


def accuracy(opinion: np.ndarray, truth: np.ndarray) -> float:
    """Share of [N] where opinion > 1/2 agrees with truth; one half, or no opinion, is half right."""
    with np.errstate(invalid="ignore"):
        decided = np.where(opinion > 0.5, 1.0, np.where(opinion < 0.5, 0.0, 0.5))
    return float(1.0 - np.abs(decided - truth).mean())


def auc(opinion: np.ndarray, truth: np.ndarray) -> float | None:
    """Chance that a right response's opinion is above a wrong one's, ties half, among those with an opinion."""
    known = ~np.isnan(opinion)
    ranks, truth = midranks(opinion[known]) * known.sum() + 0.5, truth[known]
    right, wrong = truth.sum(), (1.0 - truth).sum()
    if right == 0 or wrong == 0:
        return None
    return float((ranks @ truth - right * (right + 1) / 2) / (right * wrong))


def accuracy_at_balance(opinion: np.ndarray, truth: np.ndarray, balance: float) -> float:
    """Accuracy of saying yes to the top `balance` share of [N]; a tie that straddles the cut is drawn by lot.

    Needs no label but the class balance, so it is what an opinion without a natural cut could have had.
    """
    known = ~np.isnan(opinion)
    _, inverse, counts = np.unique(opinion[known], return_inverse=True, return_counts=True)
    top = np.cumsum(counts) / max(known.sum(), 1)  # share at or below each value
    share = counts / max(known.sum(), 1)
    yes = np.full(len(opinion), 0.5)
    yes[known] = np.clip((top - (1.0 - balance)) / share, 0.0, 1.0)[inverse]
    return float(1.0 - np.abs(yes - truth).mean())
