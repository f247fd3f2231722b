"""The choice of a label model for a round that nobody has looked at; every step of it is said in words.

Without labels the mean stands, and a label model replaces it only with a licence: three sources that are not one
family, a fit that the verifiers outside the leader's kin bear out, and no objection from the jury (jury.py).  With
labels every rung of the ladder is scored on held-out prompts, and the best one is taken where it is surely better than
what would have been used without them.

Legend: N samples, M verifiers, L labelled samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from align.ensemble.base import Fit, LabelModel, logit, sigmoid
from align.ensemble.calibrate import PairProbability
from align.ensemble.channels import channels
from align.ensemble.dawid_skene import MAX_LOG_ODDS, MIN_SUPPORT, DawidSkene, channel_log_odds
from align.ensemble.gaussian import GaussianEM, leave_one_out
from align.ensemble.jury import Ballot, ballot
from align.ensemble.mean import Mean
from align.ensemble.normalise import binarise, normalise
from align.ensemble.prepare import MIN_SOURCES, determined, pooled, without
from align.ensemble.table import VerdictTable
from align.recipe import Ensemble

JURY_ROWS = 20_000  # rows that the jury looks at
LICENCE_SHARE = 2 / 3  # of the jurors, for a model of scores to replace the mean
OBJECTION_SHARE = 0.4  # of the jurors below which a model of votes is refused
SURE_GAIN = 0.5  # median gain in correlation that counts, in units of 1 / sqrt(rows)
MIN_JURORS = 3.5  # independent voices without which the jury cannot object


@dataclass(frozen=True, slots=True)
class Choice:
    """What the gate settled on.

    Example: Choice("dawid_skene", fit, "…", (), table, DawidSkene(2.0, careful=True))
    """

    method: str
    fit: Fit
    why: str
    warnings: tuple[str, ...]
    table: VerdictTable  # less the verifiers that say nothing new
    model: LabelModel
    pairs: PairProbability = PairProbability()


def without_labels(table: VerdictTable, settings: Ensemble) -> Choice:
    """The mean, or the label model that the diagnostics license."""
    gone = determined(table)
    lean = without(table, gone)
    said = tuple(f"{table.names[j]} is determined by the other verifiers and says nothing new: left out" for j in gone)
    mean = Mean(settings.prior_strength, settings.class_balance)
    made = channels(lean, silence=True)
    if len(made) < MIN_SOURCES:
        why = f"auto: {len(made)} verifiers or families speak, and it takes {MIN_SOURCES} to judge each other: the mean"
        return Choice("mean", mean.fit(table), why, said, table, mean)
    votes = sum(all(lean.kinds[j] == "binary" for j in c.columns) for c in made)
    if votes >= MIN_SOURCES:
        model, fit, verdict = _license_votes(lean, settings)
    else:
        model, fit, verdict = _license_scores(lean, settings)
    if fit is None:
        return Choice("mean", mean.fit(table), f"auto: the mean, as {verdict}", said, table, mean)
    method = "dawid_skene" if votes >= MIN_SOURCES else "gaussian"
    return Choice(method, fit, f"auto: {verdict}", said, lean, model)


def _license_votes(table: VerdictTable, settings: Ensemble) -> tuple[LabelModel, Fit | None, str]:
    """Dawid-Skene for votes: refused without support, when it collapses, or when the jury surely objects."""
    model = DawidSkene(settings.prior_strength, settings.class_balance, settings.max_iterations, careful=True)
    fit = model.fit(table)
    support = fit.diagnostics["support"]
    if support < MIN_SUPPORT:
        return model, None, f"Dawid-Skene follows one source against the rest (support {support:.2f} < {MIN_SUPPORT})"
    share = float((fit.p_good[~np.isnan(fit.p_good)] > 0.5).mean())
    if settings.class_balance is None and not 0.005 < share < 0.995:
        return model, None, f"Dawid-Skene calls {share:.1%} of the responses good"
    vote, rows = jury_on_votes(table, model)
    objects = vote.share < OBJECTION_SHARE and vote.jurors > MIN_JURORS
    if objects and vote.gain < -SURE_GAIN / np.sqrt(rows):
        return model, None, f"the verifiers bear the mean out better than Dawid-Skene ({_told(vote)})"
    return model, fit, f"Dawid-Skene, borne out by the other verifiers (support {support:.2f}; {_told(vote)})"


def _license_scores(table: VerdictTable, settings: Ensemble) -> tuple[LabelModel, Fit | None, str]:
    """Gaussian EM for scores: refused unless the jury surely prefers it."""
    model = GaussianEM(settings.class_balance, None, settings.max_iterations)
    sample = pooled(_rows(table, JURY_ROWS))
    values = normalise(sample)
    total, heard = np.nansum(values, axis=1), (~np.isnan(values)).sum(axis=1)
    vote = ballot(values, lambda j: _mean_without(values, total, heard, j), leave_one_out(model, sample))
    sure = vote.share >= LICENCE_SHARE and vote.gain > SURE_GAIN / np.sqrt(len(values))
    if not sure:
        return model, None, f"the verifiers do not surely prefer a model of scores ({_told(vote)})"
    return model, model.fit(table), f"two-class Gaussian EM, which the verifiers prefer to the mean ({_told(vote)})"


def jury_on_votes(table: VerdictTable, model: DawidSkene) -> tuple[Ballot, int]:
    """The jury on the hard votes of the mean against those of Dawid-Skene; the jurors are what it learnt from.

    Hard votes, since a sharper posterior correlates less with a noisy vote for its sharpness alone.
    """
    sample = _rows(table, JURY_ROWS)
    made, em, learnt = model.learn(sample)
    evidence = channel_log_odds(made, em, MAX_LOG_ODDS)
    log_odds = logit(np.array(em.balance)) + evidence.sum(axis=1)
    owner = {j: c for c, channel in enumerate(made) if learnt[c] for j in channel.columns}
    columns = sorted(owner)
    values, votes = normalise(sample), binarise(sample, em.balance)
    total, heard = np.nansum(values, axis=1), (~np.isnan(values)).sum(axis=1)

    def standing(i: int) -> np.ndarray:
        return _hard(_mean_without(values, total, heard, columns[i]))

    def challenger(i: int) -> np.ndarray:
        return _hard(sigmoid(log_odds - evidence[:, owner[columns[i]]]))

    return ballot(votes[:, columns], standing, challenger), len(votes)


def _mean_without(values: np.ndarray, total: np.ndarray, heard: np.ndarray, column: int) -> np.ndarray:
    own = ~np.isnan(values[:, column])
    count = heard - own
    left = total - np.where(own, np.nan_to_num(values[:, column]), 0.0)
    return np.where(count > 0, left / np.maximum(count, 1), np.nan)


def _hard(p_good: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(p_good), np.nan, 0.5 + 0.5 * np.sign(p_good - 0.5))


def _told(vote: Ballot) -> str:
    return f"{vote.share:.0%} of {vote.jurors:.1f} independent voices for it, median gain {vote.gain:+.3f}"


def _rows(table: VerdictTable, most: int) -> VerdictTable:
    """The table, or whole prompts of it drawn by a fixed seed until `most` rows are reached."""
    if len(table.values) <= most:
        return table
    order = np.random.default_rng(0).permutation(int(table.prompts.max()) + 1)
    keep = np.argsort(order[table.prompts], kind="stable")[:most]
    return take(table, np.sort(keep))


def take(table: VerdictTable, rows: np.ndarray) -> VerdictTable:
    """These rows of the table."""
    ids, answers = (tuple(x[i] for i in rows.tolist()) if x else () for x in (table.ids, table.answers))
    return replace(table, values=table.values[rows], prompts=table.prompts[rows], ids=ids, answers=answers)
