"""What the run summary says of an ensemble beside its answer: dependence, effective number, class-balance interval.

Legend: N samples, M verifiers.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from align.ensemble.base import wins
from align.ensemble.channels import channels
from align.ensemble.dawid_skene import DawidSkene
from align.ensemble.diagnostics import effective_number, residual_correlations
from align.ensemble.gate import Choice, take
from align.ensemble.gaussian import GaussianEM
from align.ensemble.normalise import binarise
from align.ensemble.prepare import MIN_SOURCES
from align.ensemble.table import VerdictTable
from align.recipe import Ensemble

ROWS = 4_000  # rows of a half on which the class balance is fitted again
Z = 1.96
FAR = 0.2  # how far a stated class balance may be from what the verdicts say


def describe(table: VerdictTable, choice: Choice, p_good: np.ndarray, settings: Ensemble) -> dict[str, float]:
    """`residual_dependence`, `effective_verifiers`, and `balance_low` to `balance_high`."""
    lean, fit = choice.table, choice.fit
    votes = binarise(lean, float(np.clip(fit.balance, 0.01, 0.99)))
    residual = residual_correlations(lean, votes, fit.balance, fit.tpr, fit.tnr)
    low, high = balance_interval(choice, p_good)
    found = {
        "residual_dependence": float(np.abs(residual).max(initial=0.0)),
        "effective_verifiers": effective_number(residual, len(votes)),
        "balance_low": low,
        "balance_high": high,
    }
    if settings.class_balance is not None:
        found["balance_by_verdicts"] = free_balance(lean, settings)
    return found


def balance_interval(choice: Choice, p_good: np.ndarray) -> tuple[float, float]:
    """A 95% interval of the share of good responses: the answer's share, and what two halves of the prompts say.

    Half the gap between the halves estimates the standard error of the whole, the model's own uncertainty included;
    that of a share over so many prompts is the least it can be.  What a wrong model gets wrong in both halves is not
    in it.
    """
    known = p_good[~np.isnan(p_good)]
    if not len(known):
        return 0.0, 1.0
    share, table = float(known.mean()), choice.table
    order = np.random.default_rng(0).permutation(int(table.prompts.max()) + 1)
    place = order[table.prompts]
    halves = []
    for side in (0, 1):
        rows = np.flatnonzero(place % 2 == side)[:ROWS]
        part = choice.model.fit(take(table, rows)).p_good if len(rows) else np.empty(0)
        halves.append(float(np.nanmean(part)) if len(part) and not np.isnan(part).all() else share)
    error = float(
        np.hypot(abs(halves[0] - halves[1]) / 2, np.sqrt(share * (1.0 - share) / len(np.unique(table.prompts))))
    )
    return max(0.0, share - Z * error), min(1.0, share + Z * error)


def free_balance(table: VerdictTable, settings: Ensemble) -> float:
    """The class balance by EM where none is stated; NaN where the verifiers are too few to tell."""
    part = take(table, np.arange(min(len(table.values), ROWS)))
    made = channels(part, silence=True)
    if len(made) < MIN_SOURCES:
        return float("nan")
    if all(kind == "score" for kind in part.kinds):
        return GaussianEM(None, None, settings.max_iterations).fit(part).balance
    return DawidSkene(settings.prior_strength, None, settings.max_iterations, careful=True).fit(part).balance


def wrong_balance(stated: float | None, diagnostics: Mapping[str, float]) -> tuple[str, ...]:
    """A sentence where the stated class balance is far from what the verdicts say."""
    if stated is None:
        return ()
    found = diagnostics["balance_by_verdicts"]
    if not abs(found - stated) > FAR:
        return ()
    return (f"class_balance is {stated:.2f} in the recipe, and the verdicts speak for {found:.2f}",)


def against_labels(p_good: np.ndarray, labels: np.ndarray) -> tuple[str, ...]:
    """A sentence where the answer ranks the labelled samples the wrong way round."""
    known = ~(np.isnan(labels) | np.isnan(p_good))
    good, bad = p_good[known & (labels == 1)], p_good[known & (labels == 0)]
    if not len(good) or not len(bad):
        return ()
    share = float(wins(good, bad).mean())
    error = 0.5 / np.sqrt(min(len(good), len(bad)))
    if share >= 0.5 - error:
        return ()
    return (f"upside down: on the labels a good response stands above a bad one only {share:.0%} of the time",)
