"""From verdicts to scores: picks the label model, checks it, and says in words which one spoke and why.

Legend: N samples, M verifiers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from align.ensemble.base import Fit, LabelModel
from align.ensemble.channels import channels
from align.ensemble.dawid_skene import MIN_SUPPORT, DawidSkene
from align.ensemble.diagnostics import near_constant
from align.ensemble.majority import Majority
from align.ensemble.mean import Mean
from align.ensemble.normalise import binarise, normalise, row_spread
from align.ensemble.table import VerdictTable
from align.recipe import Ensemble
from align.records import Sample, Score

METHODS: dict[str, Callable[[Ensemble], LabelModel]] = {
    "mean": lambda settings: Mean(settings.prior_strength, settings.class_balance),
    "majority": lambda settings: Majority(settings.prior_strength, settings.class_balance),
    "dawid_skene": lambda settings: DawidSkene(
        settings.prior_strength, settings.class_balance, settings.max_iterations
    ),
}


@dataclass(frozen=True, slots=True)
class VerifierEstimate:
    """What the ensemble thinks of one verifier, without having seen a label.

    Example: VerifierEstimate("nines", accuracy=0.94, tpr=0.99, tnr=0.88, coverage=0.99, positive_rate=0.41,
    failures={"no number in the response": 20})
    """

    name: str
    accuracy: float  # balance * tpr + (1 - balance) * tnr
    tpr: float  # P(yes | good); a score says yes in the top `class balance` share
    tnr: float  # P(no | not good)
    coverage: float  # share of responses with a verdict
    positive_rate: float  # share of yes among its verdicts
    failures: Mapping[str, int]  # reason -> how often


@dataclass(frozen=True, slots=True)
class Combined:
    """The verdicts of a round, combined.

    Example: Combined(p_good=np.array([0.93, 0.08]), reward=np.array([0.93, 0.08]), spread=np.array([0.2, 0.3]),
    voters=np.array([6, 6]), method="mean", why="the recipe asks for it", class_balance=0.5, estimates=(…), …)
    """

    p_good: np.ndarray  # [N] NaN where every verifier abstained
    reward: np.ndarray  # [N] what pairs are built by; the same as p_good for every method here
    spread: np.ndarray  # [N] standard deviation of the normalised verdicts
    voters: np.ndarray  # [N] int
    method: str  # the method that gave the result, which need not be the one asked for
    why: str  # the reason for `method`, in words
    class_balance: float
    estimates: tuple[VerifierEstimate, ...]  # [M]
    warnings: tuple[str, ...]
    diagnostics: Mapping[str, float]


def combine(table: VerdictTable, settings: Ensemble, labels: Mapping[str, bool] | None = None) -> Combined:
    """P(good), reward and the estimates of this round's table.

    `labels` says of some samples, by the id they have in `table.ids`, whether they are good; ids that are not in the
    table are passed over.
    """
    method, fit, why, warnings = _choose(table, settings)
    values = normalise(table)
    return Combined(
        p_good=fit.p_good,
        reward=fit.p_good,
        spread=row_spread(values),
        voters=(~np.isnan(table.values)).sum(axis=1),
        method=method,
        why=why,
        class_balance=fit.balance,
        estimates=_estimates(table, fit),
        warnings=warnings + near_constant(table) + fit.warnings,
        diagnostics=fit.diagnostics,
    )


def _choose(table: VerdictTable, settings: Ensemble) -> tuple[str, Fit, str, tuple[str, ...]]:
    """The method that is used, its fit, the reason, and a warning where it is not the one that was asked for."""
    mean = METHODS["mean"](settings)
    if settings.method == "auto":
        return "mean", mean.fit(table), "auto: without labels the mean is the method that fails least", ()
    if settings.method != "dawid_skene":
        return settings.method, METHODS[settings.method](settings).fit(table), "the recipe asks for it", ()
    speaking = len(channels(table))
    if speaking < 3:
        why = f"Dawid-Skene needs three verifiers or families that speak, and {speaking} did: the mean is used"
        return "mean", mean.fit(table), why, (why,)
    fit = METHODS["dawid_skene"](settings).fit(table)
    if fit.diagnostics["support"] < MIN_SUPPORT:
        why = (
            f"Dawid-Skene followed one source against the rest (support {fit.diagnostics['support']:.2f}, needed "
            f"{MIN_SUPPORT}): the mean is used; verifiers that share a source of error should share a `family`"
        )
        return "mean", mean.fit(table), why, (why,)
    return "dawid_skene", fit, "the recipe asks for it, and the other verifiers bear its fit out", ()


def _estimates(table: VerdictTable, fit: Fit) -> tuple[VerifierEstimate, ...]:
    votes = binarise(table, fit.balance)
    heard = ~np.isnan(votes)
    positive = np.where(heard, votes, 0.0).sum(axis=0) / np.maximum(heard.sum(axis=0), 1)
    return tuple(
        VerifierEstimate(
            name=name,
            accuracy=float(fit.balance * fit.tpr[j] + (1.0 - fit.balance) * fit.tnr[j]),
            tpr=float(fit.tpr[j]),
            tnr=float(fit.tnr[j]),
            coverage=float(heard[:, j].mean()) if len(heard) else 0.0,
            positive_rate=float(positive[j]),
            failures=dict(table.failures[j]) if table.failures else {},
        )
        for j, name in enumerate(table.names)
    )


def to_scores(samples: Sequence[Sample], combined: Combined, min_voters: int) -> tuple[list[Score], dict[str, int]]:
    """A score for each sample with enough verdicts, and how many had them: {"scored", "too_few_voters"}."""
    if len(samples) != len(combined.p_good):
        raise ValueError(f"{len(samples)} samples but {len(combined.p_good)} combined verdicts")
    scores = [
        Score(s.id, s.prompt_id, float(p), float(r), float(d), int(v))
        for s, p, r, d, v in zip(
            samples, combined.p_good, combined.reward, combined.spread, combined.voters, strict=True
        )
        if v >= min_voters
    ]
    return scores, {"scored": len(scores), "too_few_voters": len(samples) - len(scores)}
