"""The simulation of verifiers with a known truth: every label model, with shared errors and without, and calibration.

    python benchmarks/ensemble_simulation.py [--seeds 10]

300 prompts of 32 responses, success rate of a prompt ~ Beta(0.6, 0.8), nine verifiers with separations d' from 0.3 to
1.6 on three monotone scales, 2% of the prompts labelled.  `dependent`: four of the nine share a factor (rho 0.6);
the table does not say which, and much hangs on it.  `few`: 12% of the responses are good.  `m=33`: 33 verifiers.
`small`: 60 prompts of 8.  Votes are cut at the class balance of the labelled prompts.  The table is selection accuracy:
the response with the highest P(good) is good.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import numpy as np
from common import Row, print_report

from align.ensemble.base import sigmoid
from align.ensemble.calibrate import pairs_within
from align.ensemble.combine import combine
from align.ensemble.dawid_skene import DawidSkene
from align.ensemble.gaussian import GaussianEM
from align.ensemble.labelled import NaiveBayes
from align.ensemble.logistic import Logistic
from align.ensemble.moments import Moments, Triplets
from align.ensemble.normalise import binarise, row_mean
from align.ensemble.table import VerdictTable
from align.ensemble.weaver import percentiles
from align.evaluation.calibration import expected_calibration_error
from align.recipe import Ensemble

CASES: dict[str, dict[str, Any]] = {
    "independent": {},
    "dependent": {"block": (0, 2, 4, 6)},
    "few": {"beta": (0.2235, 1.703)},
    "m=33": {"verifiers": 33},
    "small": {"prompts": 60, "responses": 8},
}
COLUMNS = ("pass@1", "pass@K", "best single", "mean 5-95", "vote", "moments", "triplets", "EM", "Gaussian EM",
           "naive Bayes all labels", "LR 2% labels", "LR all labels")  # fmt: skip
GATED = ("auto, no labels", "plain mean", "auto, 2% labels", "ECE of P(good)", "ECE of P(win), best against worst",
         "ECE of P(win), all pairs")  # fmt: skip
PUBLISHED = {
    "independent": (0.428, 0.906, 0.804, 0.872, 0.834, 0.855, 0.855, 0.855, 0.889, 0.856, 0.889, 0.890),
    "dependent": (0.428, 0.906, 0.803, 0.833, 0.793, 0.792, 0.810, 0.792, 0.774, 0.824, 0.878, 0.882),
    "few": (0.116, 0.538, 0.388, 0.480, 0.418, 0.458, 0.457, 0.457, 0.505, 0.460, 0.476, 0.507),
    "m=33": (0.428, 0.906, 0.808, 0.906, 0.903, 0.906, 0.906, 0.906, 0.906, 0.906, 0.906, 0.906),
    "small": (0.447, 0.793, 0.713, 0.773, 0.717, 0.727, 0.739, 0.751, 0.783, 0.757, 0.782, 0.790),
}
"""The table that these cases were first measured in, for comparison."""


def simulate(
    seed: int, prompts: int = 300, responses: int = 32, verifiers: int = 9, beta: tuple[float, float] = (0.6, 0.8),
    block: tuple[int, ...] = (), rho: float = 0.6,
) -> tuple[VerdictTable, np.ndarray, np.ndarray]:  # fmt: skip
    """The table, the truth [N] and the labels [N] of 2% of the prompts (at least six), NaN elsewhere."""
    rng = np.random.default_rng(seed)
    count = prompts * responses
    rate = np.repeat(rng.beta(*beta, size=prompts), responses)
    truth = (rng.random(count) < rate).astype(float)
    apart = np.linspace(0.3, 1.6, verifiers)
    noise = rng.normal(size=(count, verifiers))
    if block:
        shared = rng.normal(size=(count, 1))
        noise[:, block] = np.sqrt(1.0 - rho) * noise[:, block] + np.sqrt(rho) * shared
    scores = truth[:, None] * apart + noise
    scores[:, 1::3] = np.exp(scores[:, 1::3])
    scores[:, 2::3] = sigmoid(3.0 * scores[:, 2::3])
    group = np.repeat(np.arange(prompts), responses)
    names = tuple(f"v{j}" for j in range(verifiers))
    ids = tuple(str(i) for i in range(count))
    table = VerdictTable(scores, names, ("score",) * verifiers, ("",) * verifiers, group, ids=ids)
    told = rng.choice(prompts, max(6, round(0.02 * prompts)), replace=False)
    return table, truth, np.where(np.isin(group, told), truth, np.nan)


def selected(opinion: np.ndarray, truth: np.ndarray, prompts: np.ndarray) -> float:
    """Share of prompts whose best response by `opinion` is good; ties share."""
    opinion = opinion.reshape(prompts.max() + 1, -1)
    top = opinion >= opinion.max(axis=1, keepdims=True) - 1e-12
    return float(((truth.reshape(opinion.shape) * top).sum(axis=1) / top.sum(axis=1)).mean())


def ladder(table: VerdictTable, truth: np.ndarray, labels: np.ndarray) -> list[float]:
    """The row of COLUMNS."""
    prompts = table.prompts
    balance = float(np.clip(np.nanmean(labels), 0.02, 0.98))
    votes = replace(table, values=binarise(table, balance), kinds=("binary",) * len(table.names))
    fits = [model.fit(votes).p_good for model in (Moments(balance), Triplets(balance), DawidSkene(2.0, balance))]
    fits = [*fits[:2], DawidSkene(2.0, balance)._fit_once(votes).p_good]
    everything = [
        GaussianEM().fit(table).p_good,
        NaiveBayes().fit(votes, truth).p_good,
        Logistic().fit(table, labels).p_good,
        Logistic().fit(table, truth).p_good,
    ]
    opinions = [row_mean(percentiles(table)), row_mean(votes.values), *fits, *everything]
    single = max(selected(table.values[:, j], truth, prompts) for j in range(len(table.names)))
    passed = truth.reshape(prompts.max() + 1, -1)
    found = [float(truth.mean()), float(passed.max(axis=1).mean()), single]
    return found + [selected(opinion, truth, prompts) for opinion in opinions]


def gated(table: VerdictTable, truth: np.ndarray, labels: np.ndarray) -> list[float]:
    """Selection by auto without labels, by the plain mean, by auto with labels; then ECE of P(good) and of P(win)."""
    known = ~np.isnan(labels)
    alone = combine(table, Ensemble())
    mean = combine(table, Ensemble(method="mean"))
    told = combine(table, Ensemble(), {table.ids[i]: bool(labels[i]) for i in np.flatnonzero(known).tolist()})
    free = np.flatnonzero(~known)
    p, y, group = told.p_good[free], truth[free], table.prompts[free]
    best = [rows[[np.argmax(p[rows]), np.argmin(p[rows])]] for rows in np.split(np.arange(len(p)), _cuts(group))]
    a, b = np.array(best).T
    stated = told.pairs.of(p[a], p[b])[0]
    first, second = pairs_within(group[:3200])
    swap = p[first] < p[second]
    high, low = np.where(swap, second, first), np.where(swap, first, second)
    every = told.pairs.of(p[high], p[low])[0]
    return [
        selected(alone.p_good, truth, table.prompts), selected(mean.p_good, truth, table.prompts),
        selected(np.where(known, -1.0, told.p_good)[free], y, np.unique(group, return_inverse=True)[1]),
        expected_calibration_error(p, y) or 0.0, expected_calibration_error(stated, (y[a] > y[b]).astype(float)) or 0.0,
        expected_calibration_error(every, (y[high] > y[low]).astype(float)) or 0.0,
    ]  # fmt: skip


def _cuts(group: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.diff(group)) + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="at least two")
    arguments = parser.parse_args()
    rows = []
    for case, settings in CASES.items():
        drawn = [simulate(seed, **settings) for seed in range(arguments.seeds)]
        every = np.array([ladder(*one) for one in drawn])
        found, spread = every.mean(axis=0), every.std(axis=0, ddof=1) / len(every) ** 0.5
        for column, ours, error, theirs in zip(COLUMNS, found, spread, PUBLISHED[case], strict=True):
            gap = f"({ours - theirs:+.3f}, standard error {error:.3f})"
            print(f"{case:12s} {column:24s} {ours:.3f} table {theirs:.3f} {gap}", flush=True)
            rows.append(Row(f"{case}: {column}", float(ours), theirs, float(ours / theirs), "selection accuracy"))
        for name, value in zip(GATED, np.mean([gated(*one) for one in drawn], axis=0), strict=True):
            print(f"{case:12s} {name:34s} {value:.3f}", flush=True)
            rows.append(Row(f"{case}: {name}", float(value), float("nan"), float("nan"), "accuracy or error"))
    print_report("ensemble_simulation", rows)


if __name__ == "__main__":
    main()
