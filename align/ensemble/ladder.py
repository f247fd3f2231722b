"""The gate with labels: every rung scored on held-out prompts, the winner calibrated on the same held-out scores.

Legend: N samples, L labelled samples, R rungs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from align.ensemble.base import Fit, LabelModel, logit, wins
from align.ensemble.calibrate import (
    MANY_LABELS,
    difficulty,
    fit_pairs,
    isotonic,
    joint_log_loss,
    log_loss,
    log_losses,
    platt,
    share_difficulty,
    share_error,
    shift_balance,
)
from align.ensemble.correct import Corrected
from align.ensemble.dawid_skene import DawidSkene
from align.ensemble.gate import Choice, take
from align.ensemble.gaussian import GaussianEM
from align.ensemble.labelled import BestSingle, NaiveBayes
from align.ensemble.logistic import Logistic, enough
from align.ensemble.mean import Mean
from align.ensemble.normalise import normalise
from align.ensemble.strata import upside_down_in_part
from align.ensemble.table import VerdictTable
from align.recipe import Ensemble

FOLDS = 5
MIN_LABELS = 8  # fewer held-out labels cannot tell rungs apart
UNLABELLED_ROWS = 4_000  # unlabelled rows that a held-out fit sees; the final fit sees all
SCORED = 400  # labelled rows that rungs are compared on
RESAMPLES = 100
SURE = 1.5  # standard errors by which a rung must beat the standing one; 1.5 to 3 choose alike on real votes
SURE_LOSS = 2.5  # the same in log loss, a second look at as many rungs; heavy tails at 20 labels reach 2.0 for nothing
WITHIN_PAIRS = 10  # pairs of a good and a bad response to one prompt before those are scored apart
MAX_MATRIX = 200  # verifiers beyond which a full covariance is not tried


@dataclass(frozen=True, slots=True)
class Rung:
    """A label model on the ladder.

    Example: Rung(Logistic(1.0), learns=True)
    """

    model: LabelModel
    learns: bool  # from labels, so that its score must be held out
    likelihood: bool = True  # its log-odds have a scale; those of a mean have none
    shrunk: bool = False  # already as unsure as its labels are few, so that it is not scaled again


STANDING = "corrected"
"""The rung that another one must surely beat: what would be used without labels, corrected by them."""


def rungs(table: VerdictTable, chosen: Choice, settings: Ensemble) -> dict[str, Rung]:
    """The ladder for this table; `chosen` is what would be used without labels."""
    count, width = table.values.shape
    shrink = float(np.clip(0.1 + 2.0 * width / count, 0.1, 0.5))
    rounds, balance = min(settings.max_iterations, 60), settings.class_balance
    careful = DawidSkene(settings.prior_strength, balance, rounds, careful=True)
    likelihood = chosen.method != "mean"
    ladder = {
        STANDING: Rung(Corrected(chosen.model, likelihood), True, shrunk=True),
        chosen.method: Rung(chosen.model, False, likelihood),
        "mean": Rung(Mean(settings.prior_strength, balance), False, likelihood=False),
        "best_single": Rung(BestSingle(), True, likelihood=False),
        "logistic": Rung(Logistic(1.0), True),
        "naive_bayes": Rung(NaiveBayes(settings.prior_strength, balance), True),
        "anchored": Rung(careful, True),
    }
    if width <= MAX_MATRIX:
        ladder["anchored_gaussian"] = Rung(GaussianEM(balance, shrink, rounds), True)
    if all(kind == "score" for kind in table.kinds):
        ladder["gaussian"] = Rung(GaussianEM(balance, None, rounds), False)
        del ladder["anchored"]  # the Gaussian one is its like, and far quicker
    return ladder


def with_labels(
    table: VerdictTable, chosen: Choice, settings: Ensemble, labels: np.ndarray
) -> tuple[Choice, np.ndarray]:
    """The rung that held-out labels pick, and its calibrated P(good) [N]; labelled samples stand at their label.

    `chosen` is what would be used without labels.
    """
    known = ~np.isnan(labels)
    if known.sum() < MIN_LABELS or not enough(labels):
        kind = f"{int(known.sum())} labels" if enough(labels) else "labels of one class only"
        why = f"{chosen.why}; {kind} cannot choose between models or calibrate one"
        return replace(chosen, why=why), np.where(known, labels, chosen.fit.p_good)
    lean = chosen.table
    ladder = rungs(lean, chosen, settings)
    rows, held_out = _held_out(lean, ladder, labels)
    scores, errors = _compare(held_out, labels[rows], lean.prompts[rows], STANDING)
    gains = _gains(held_out, ladder, labels[rows], lean.prompts[rows])
    best, first = pick(scores, errors, gains), chosen.method
    fit = ladder[best].model.fit(lean, labels if ladder[best].learns else None)
    p_good, seen, diagnostics, steps = calibrated(fit, held_out[best], ladder[best], labels, lean.prompts, settings)
    pairs = fit_pairs(seen, labels[rows], lean.prompts[rows])
    diagnostics["pair_correlation"] = pairs.correlation
    seen_by = f"{int(known.sum())} labels of {len(np.unique(lean.prompts[known]))} prompts"
    why = f"{_say(scores, errors, gains, best, seen_by)}; {steps}"
    warnings = chosen.warnings
    if scores[first] < 0.5 - errors[first] and best != first:
        warnings += (f"upside down: without labels {first} would have ranked bad responses above good ones",)
    if scores[best] < 0.55:
        warnings += (f"no rung tells good from bad on held-out labels (best {best}, {scores[best]:.2f}; chance 0.50)",)
    seen_by_none = np.full(len(labels), np.nan)
    seen_by_none[rows] = held_out[best]
    warnings += upside_down_in_part(seen_by_none, labels, lean.prompts, normalise(lean))
    diagnostics = {**fit.diagnostics, **diagnostics, **{f"held_out/{name}": value for name, value in scores.items()}}
    fit = replace(fit, diagnostics=diagnostics)
    choice = Choice(best, fit, why, warnings, lean, ladder[best].model, pairs)
    return choice, np.where(known, labels, p_good)


def pick(
    scores: Mapping[str, float], errors: Mapping[str, float], gains: Mapping[str, float], sure: float = SURE
) -> str:
    """The rung with the best held-out score where it leads the standing one by `sure` standard errors.

    Else, of those that rank no worse than the standing one, the rung whose log loss is the most standard errors lower
    (`gains`), where they are more than SURE_LOSS: ranks that are nearly perfect hardly differ where probabilities do.
    """
    best = max(scores, key=lambda name: scores[name])
    if scores[best] - scores[STANDING] > sure * errors[best]:
        return best
    best = max((name for name in gains if scores[name] >= scores[STANDING]), key=lambda name: gains[name])
    return best if gains[best] > SURE_LOSS else STANDING


def calibrated(
    fit: Fit, held_out: np.ndarray, rung: Rung, known: np.ndarray, prompts: np.ndarray, settings: Ensemble
) -> tuple[np.ndarray, np.ndarray, dict[str, float], str]:
    """P(good) [N], calibrated on held-out scores [L] of the samples whose label is `known` [N]; those scores [L]
    calibrated as well; how it was done, as numbers and in words.
    """
    raw, labels = np.nan_to_num(held_out, nan=fit.balance), known[~np.isnan(known)]
    if len(labels) >= MANY_LABELS:
        both = isotonic(raw, labels, np.concatenate([fit.p_good, raw]))
        balance = float((labels.sum() + 1.0) / (len(labels) + 2.0))
        told = {"calibration/labels": float(len(labels))}
        said = f"isotonic regression on {len(labels)} held-out scores"
    elif rung.shrunk:
        both, balance = np.concatenate([fit.p_good, raw]), float((labels.sum() + 1.0) / (len(labels) + 2.0))
        told, said = {}, "its probabilities as they are, shrunk to the label-free answer"
    else:
        curve = platt(raw, labels, rung.likelihood)
        both, balance = curve(np.concatenate([fit.p_good, raw])), curve.balance
        told = {"calibration/slope": curve.slope, "calibration/offset": curve.offset}
        said = f"log-odds times {curve.slope:.2f} by Platt scaling on {len(labels)} held-out scores"
    p_good, where = both[: len(known)], ~np.isnan(known)
    if settings.class_balance is None:
        p_good, found = shift_balance(p_good, balance, share_error(labels, prompts[where]))
    else:
        found = settings.class_balance
        p_good = shift_to(p_good, balance, found)
    p_good[where] = shift_to(both[len(known) :], balance, found)  # the model's own scores there have seen the labels
    shared = difficulty(p_good, found, prompts)
    told |= {"balance": found, "difficulty_shared": 0.0}
    if shared is None:
        return p_good, p_good[where], told, said
    if joint_log_loss(shared, known) < len(labels) * log_loss(p_good[where], labels):
        p_good, said = share_difficulty(p_good, shared), f"{said}, and what siblings say of a prompt's difficulty"
        told["difficulty_shared"] = 1.0
    else:
        said += "; what siblings would say of a prompt's difficulty is left out, as the labels contradict it"
    return p_good, p_good[where], told, said


def shift_to(p_good: np.ndarray, balance: float, known: float) -> np.ndarray:
    """P(good) under a class balance that is known instead of the labels' own."""
    moved = logit(p_good) + logit(np.array(known)) - logit(np.array(balance))
    return 1.0 / (1.0 + np.exp(-moved))


def _held_out(
    table: VerdictTable, ladder: Mapping[str, Rung], labels: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The labelled rows [L] and each rung's P(good) there, by models that saw no label of the same prompt."""
    rng = np.random.default_rng(0)
    known, free = np.flatnonzero(~np.isnan(labels)), np.flatnonzero(np.isnan(labels))
    some = np.sort(rng.choice(free, min(len(free), UNLABELLED_ROWS), replace=False))
    rows = np.concatenate([known, some])
    part, truth, own = take(table, rows), labels[rows], np.arange(len(known))
    prompts = np.unique(table.prompts[known])
    fold_of = dict(zip(prompts.tolist(), (rng.permutation(len(prompts)) % FOLDS).tolist(), strict=True))
    fold = np.array([fold_of[p] for p in table.prompts[known].tolist()])
    found = {}
    for name, rung in ladder.items():
        if not rung.learns:
            found[name] = rung.model.fit(part).p_good[own]
            continue
        out = np.full(len(known), np.nan)
        for f in np.unique(fold):
            shown = truth.copy()
            shown[own[fold == f]] = np.nan
            if enough(shown):
                out[fold == f] = rung.model.fit(part, shown).p_good[own[fold == f]]
        found[name] = out
    return known, found


def _compare(
    held_out: Mapping[str, np.ndarray], labels: np.ndarray, prompts: np.ndarray, first: str
) -> tuple[dict[str, float], dict[str, float]]:
    """Each rung's held-out score, and the standard error of its lead on `first` over resampled prompts.

    The score is the chance that a good response stands above a bad one; where prompts have several labelled responses,
    the mean of that over all pairs and over pairs of one prompt, since pairs are what training sees.
    """
    rng = np.random.default_rng(0)
    rows = np.arange(len(labels)) if len(labels) <= SCORED else np.sort(rng.choice(len(labels), SCORED, replace=False))
    y, group = labels[rows], np.unique(prompts[rows], return_inverse=True)[1]
    good, bad = np.flatnonzero(y == 1), np.flatnonzero(y == 0)
    same = group[good][:, None] == group[bad][None]
    above = {}
    for name, p_good in held_out.items():
        x = np.nan_to_num(p_good[rows], nan=0.5)
        above[name] = wins(x[good], x[bad])
    within = same.sum() >= WITHIN_PAIRS
    groups = int(group.max()) + 1
    draws = np.vstack([np.ones(groups), rng.multinomial(groups, np.full(groups, 1.0 / groups), RESAMPLES)])
    table = {
        name: np.array([_score(win, same, within, d[group], good, bad) for d in draws]) for name, win in above.items()
    }
    scores = {name: float(values[0]) for name, values in table.items()}
    floor = 0.5 / max(min(len(good), len(bad)), 1)  # one response ranked otherwise; perfect ranks have no spread
    errors = {name: float(np.hypot(np.nanstd(values[1:] - table[first][1:]), floor)) for name, values in table.items()}
    return scores, errors


def _gains(
    held_out: Mapping[str, np.ndarray], ladder: Mapping[str, Rung], labels: np.ndarray, prompts: np.ndarray
) -> dict[str, float]:
    """By how many standard errors the held-out log loss of each rung that is a likelihood is below the standing one's.

    Each is taken as it would be used: scaled on the labels of other prompts, unless it is shrunk already.
    """
    group = np.unique(prompts, return_inverse=True)[1]
    fold, losses = group % FOLDS, {}
    for name in (name for name in held_out if ladder[name].likelihood):
        raw = np.nan_to_num(held_out[name], nan=float(labels.mean()))
        p_good = raw.copy()
        for f in np.unique(fold) if not ladder[name].shrunk else ():
            p_good[fold == f] = platt(raw[fold != f], labels[fold != f])(raw[fold == f])
        losses[name] = log_losses(p_good, labels)
    gains = {name: losses[STANDING] - loss for name, loss in losses.items()}
    return {name: float(gain.sum()) / _spread_of_sum(gain, group) for name, gain in gains.items()}


def _spread_of_sum(gain: np.ndarray, group: np.ndarray) -> float:
    """Standard error of the sum of [L] over prompts, and one response told otherwise: as likely as not, not surely."""
    by_prompt = np.bincount(group, gain - gain.mean())
    correction = len(by_prompt) / max(len(by_prompt) - 1, 1)
    return float(np.hypot(np.sqrt(np.square(by_prompt).sum() * correction), np.log(2.0)))


def _score(
    win: np.ndarray, same: np.ndarray, within: bool, weight: np.ndarray, good: np.ndarray, bad: np.ndarray
) -> float:
    """Weighted share of pairs won; NaN where a resample has none."""
    pairs = weight[good][:, None] * weight[bad][None]
    total = pairs.sum()
    if total == 0:
        return np.nan
    overall = float((pairs * win).sum() / total)
    inner = (pairs * same).sum()
    return (overall + float((pairs * same * win).sum() / inner)) / 2 if within and inner > 0 else overall


def _say(
    scores: Mapping[str, float], errors: Mapping[str, float], gains: Mapping[str, float], best: str, labels: str
) -> str:
    told = ", ".join(f"{name} {value:.3f}" for name, value in sorted(scores.items(), key=lambda x: -x[1]))
    head, against = f"auto: {best} on {labels} (held-out ranking: {told})", "what would be used without labels"
    if best == STANDING:
        return f"{head}; no rung is surely better than {against}, corrected by them"
    lead = f"{scores[best] - scores[STANDING]:.3f} (standard error {errors[best]:.3f})"
    also = f", and its log loss is {gains[best]:.1f} standard errors lower" if gains.get(best, 0.0) > 0 else ""
    return f"{head}; it leads {against}, corrected by them, by {lead}{also}"
