"""From verdicts to scores: picks the label model, checks it, and says in words which one spoke and why.

Legend: N samples, M verifiers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from align.ensemble.base import Fit, LabelModel, weighted_rates, weighted_votes
from align.ensemble.calibrate import PairProbability, cautious
from align.ensemble.channels import channels
from align.ensemble.dawid_skene import MIN_SUPPORT, DawidSkene
from align.ensemble.describe import against_labels, describe, wrong_balance
from align.ensemble.diagnostics import collapsed, near_constant, two_camps
from align.ensemble.gate import Choice, without_labels
from align.ensemble.gaussian import GaussianEM
from align.ensemble.labelled import BestSingle, NaiveBayes
from align.ensemble.ladder import with_labels
from align.ensemble.logistic import Logistic
from align.ensemble.majority import Majority
from align.ensemble.mean import Mean
from align.ensemble.moments import MatchedMoments, Moments, Triplets
from align.ensemble.normalise import binarise, normalise, row_mean, row_spread
from align.ensemble.prepare import MIN_SOURCES, pooled
from align.ensemble.strata import upside_down_in_part
from align.ensemble.table import VerdictTable
from align.ensemble.weaver import Weaver
from align.recipe import Ensemble
from align.records import Sample, Score

METHODS: dict[str, Callable[[Ensemble], LabelModel]] = {
    "mean": lambda s: Mean(s.prior_strength, s.class_balance),
    "majority": lambda s: Majority(s.prior_strength, s.class_balance),
    "moments": lambda s: Moments(s.class_balance),
    "matched_moments": lambda s: MatchedMoments(s.class_balance),
    "triplets": lambda s: Triplets(s.class_balance),
    "dawid_skene": lambda s: DawidSkene(s.prior_strength, s.class_balance, s.max_iterations),
    "one_coin": lambda s: DawidSkene(s.prior_strength, s.class_balance, s.max_iterations, one_coin=True),
    "gaussian": lambda s: GaussianEM(s.class_balance, None, s.max_iterations),
    "gaussian_full": lambda s: GaussianEM(s.class_balance, s.covariance_shrinkage, s.max_iterations),
    "naive_bayes": lambda s: NaiveBayes(s.prior_strength, s.class_balance),
    "logistic": lambda s: Logistic(s.ridge),
    "best_single": lambda s: BestSingle(),
    "weaver": lambda s: Weaver(s.class_balance, s.clusters),
}

LONE_VERIFIERS = ("moments", "matched_moments", "triplets")
"""Methods that know nothing of families: each family is made one vote before they see it."""
BY_AGREEMENT = (*LONE_VERIFIERS, "dawid_skene", "one_coin", "gaussian", "gaussian_full")
"""Methods that learn from how the verifiers agree; two of them tell only the product of what each is worth."""


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
    pairs: PairProbability = PairProbability()  # P(win), P(tie), P(loss) of two responses to one prompt


def combine(table: VerdictTable, settings: Ensemble, labels: Mapping[str, bool] | None = None) -> Combined:
    """P(good), reward and the estimates of this round's table.

    `labels` says of some samples, by the id they have in `table.ids`, whether they are good; ids that are not in the
    table are passed over.  A labelled sample's P(good) is its label.
    """
    known = _on_rows(table, labels)
    values = normalise(table)
    choice, p_good = _choose(table, settings, known)
    warnings = choice.warnings + near_constant(table) + choice.fit.warnings
    tpr, tnr = _all_rates(table, choice.fit, p_good)
    warnings += collapsed(p_good, settings.class_balance)
    warnings += two_camps(table.names, values, p_good, row_mean(values))
    if known is not None:
        warnings += against_labels(choice.fit.p_good, known)
        if settings.method != "auto":  # auto has looked, on held-out scores
            warnings += upside_down_in_part(choice.fit.p_good, known, table.prompts, values)
    diagnostics = {**choice.fit.diagnostics, **describe(table, choice, p_good, settings)}
    if settings.method == "auto" and known is None and choice.method != "mean":
        p_good = cautious(p_good, diagnostics["effective_verifiers"], float(len(choice.table.names)))
    warnings += wrong_balance(settings.class_balance, diagnostics)
    return Combined(
        p_good=p_good,
        reward=p_good,
        spread=row_spread(values),
        voters=table.voters,
        method=choice.method,
        why=choice.why,
        class_balance=diagnostics.get("balance", choice.fit.balance),
        estimates=_estimates(table, choice.fit.balance, tpr, tnr),
        warnings=tuple(dict.fromkeys(warnings)),
        diagnostics=diagnostics,
        pairs=choice.pairs,
    )


def _on_rows(table: VerdictTable, labels: Mapping[str, bool] | None) -> np.ndarray | None:
    """[N] of 1, 0 and NaN; none where no sample of the table is labelled."""
    if not labels:
        return None
    if not table.ids:
        raise ValueError("labels are found by sample id, and this table has no ids")
    known = np.array([labels.get(i, np.nan) for i in table.ids], dtype=float)
    return None if np.isnan(known).all() else known


def _choose(table: VerdictTable, settings: Ensemble, labels: np.ndarray | None) -> tuple[Choice, np.ndarray]:
    """The method that is used, its fit and reason, and P(good)."""
    if settings.method == "auto":
        choice = without_labels(table, settings)
        if labels is not None:
            return with_labels(table, choice, settings, labels)
        return choice, choice.fit.p_good
    choice = _named(table, settings, labels)
    p_good = choice.fit.p_good
    if labels is not None:
        p_good = np.where(np.isnan(labels), p_good, labels)
    return choice, p_good


def _named(table: VerdictTable, settings: Ensemble, labels: np.ndarray | None) -> Choice:
    """The method that the recipe names, or the mean with a warning where it cannot be used."""
    method, mean = settings.method, METHODS["mean"](settings)
    speaking = len(channels(table))
    if method in BY_AGREEMENT and speaking < MIN_SOURCES:
        name = "Dawid-Skene" if method == "dawid_skene" else method
        why = f"{name} needs three verifiers or families that speak, and {speaking} did: the mean is used"
        return Choice("mean", mean.fit(table), why, (why,), table, mean)
    model = METHODS[method](settings)
    if method == "dawid_skene":
        return _supported(table, model, settings, labels)
    seen = pooled(table) if method in LONE_VERIFIERS else table
    fit = model.fit(seen, labels)
    undecided = np.isnan(fit.p_good) & ~np.isnan(table.values).all(axis=1)  # a family that is divided
    fit = replace(fit, p_good=np.where(undecided, fit.balance, fit.p_good))
    return Choice(method, fit, "the recipe asks for it", (), seen, model)


def _supported(table: VerdictTable, model: LabelModel, settings: Ensemble, labels: np.ndarray | None) -> Choice:
    """Dawid-Skene where the verifiers bear it out, else the mean with a warning."""
    mean, fit = METHODS["mean"](settings), model.fit(table, labels)
    if fit.diagnostics["support"] < MIN_SUPPORT:
        why = (
            f"Dawid-Skene followed one source against the rest (support {fit.diagnostics['support']:.2f}, needed "
            f"{MIN_SUPPORT}): the mean is used; verifiers that share a source of error should share a `family`"
        )
        return Choice("mean", mean.fit(table), why, (why,), table, mean)
    why = "the recipe asks for it, and the other verifiers bear its fit out"
    return Choice("dawid_skene", fit, why, (), table, model)


def _all_rates(table: VerdictTable, fit: Fit, p_good: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """TPR and TNR [M] of every verifier of the table, those that the model left out included."""
    if len(fit.tpr) == len(table.names):
        return fit.tpr, fit.tnr
    return weighted_rates(binarise(table, float(np.clip(fit.balance, 0.01, 0.99))), p_good, pseudo=2.0, tilt=0.7)


def _estimates(table: VerdictTable, balance: float, tpr: np.ndarray, tnr: np.ndarray) -> tuple[VerifierEstimate, ...]:
    votes = binarise(table, balance)
    heard, yes = (found[0] for found in weighted_votes(votes, np.ones((1, len(votes)))))
    positive = yes / np.maximum(heard, 1.0)
    return tuple(
        VerifierEstimate(
            name=name,
            accuracy=float(balance * tpr[j] + (1.0 - balance) * tnr[j]),
            tpr=float(tpr[j]),
            tnr=float(tnr[j]),
            coverage=float(heard[j] / max(len(votes), 1)),
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
