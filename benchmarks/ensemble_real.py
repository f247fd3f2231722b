"""The ensemble on real verdicts: without labels against majority and full Dawid-Skene, and with a handful of labels.

    python benchmarks/ensemble_real.py FOLDER [--labels 20] [--draws 20] [--leave-one-out]

FOLDER holds `<set>.csv.gz` with columns item,group,gold,<verifier...>; a blank is an abstention and a name that ends in
`~` is a score.  Accuracy is at one half; where a group has several items, the item chosen by P(good) is right.  The
references are computed here on the votes: the majority, Dawid and Skene's EM with all verifiers independent, and naive
Bayes with all labels by five-fold cross-validation.  With labels, `ours` is on the items without a label.

--leave-one-out asks whether the gate's thresholds fit these sets only: for each set they are chosen on all other sets
(the classes of one file are one set) and measured on it, beside the ones that are shipped.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
from common import Row, print_report

from align.ensemble import gate
from align.ensemble.combine import combine
from align.ensemble.dawid_skene import DawidSkene
from align.ensemble.gate import without_labels
from align.ensemble.labelled import NaiveBayes
from align.ensemble.ladder import STANDING, SURE, _compare, _gains, _held_out, calibrated, pick, rungs
from align.ensemble.normalise import binarise, row_mean
from align.ensemble.table import VerdictTable
from align.evaluation.calibration import brier, expected_calibration_error
from align.recipe import Ensemble

LEADS = (SURE, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
TRIED = {"MIN_SUPPORT": (0.2, 0.7), "OBJECTION_SHARE": (0.2, 0.6), "SURE_GAIN": (0.25, 1.0), "MIN_JURORS": (2.5, 5.0)}
SHIPPED = {name: getattr(gate, name) for name in TRIED}
GATES: dict[str, dict[str, float]] = {"as shipped": SHIPPED}
GATES |= {f"{name} {value}": SHIPPED | {name: value} for name, values in TRIED.items() for value in values}
"""What is tried in place of the shipped thresholds, which come first and win ties."""

WORDS = ("upside down", "collapse", "two camps")


def tables(path: Path) -> Iterator[tuple[str, VerdictTable, np.ndarray]]:
    """The matrix, or one matrix per class where the votes name one of several."""
    with gzip.open(path, "rt", newline="") as file:
        header, *rows = csv.reader(file)
    values = np.array([[float(x) if x else np.nan for x in row[3:]] for row in rows])
    gold = np.array([float(row[2]) if row[2] else np.nan for row in rows])
    number: dict[str, int] = {}
    prompts = np.array([number.setdefault(row[1], len(number)) for row in rows])
    kinds = tuple("score" if name.endswith("~") else "binary" for name in header[3:])
    table = VerdictTable(
        np.where(np.isin(values, (0, 1)), values, np.nan) if "binary" in kinds else values,
        tuple(header[3:]), kinds, ("",) * len(kinds), prompts, ids=tuple(str(i) for i in range(len(rows))),
    )  # fmt: skip
    name = path.name.removesuffix(".csv.gz")
    classes = np.unique(gold[~np.isnan(gold)])
    if len(classes) > 2:
        for k in classes:
            votes = np.where(np.isnan(values), np.nan, values == k)
            yield f"{name}/{k:g}", replace(table, values=votes, prompts=np.arange(len(rows))), (gold == k).astype(float)
        return
    scores = np.array([kind == "score" for kind in kinds])
    yield name, replace(table, values=np.where(scores, values, table.values)), gold


def accuracy(p_good: np.ndarray, gold: np.ndarray, prompts: np.ndarray, rows: np.ndarray) -> float:
    """At one half, or of the best item of each group where groups are groups."""
    p_good = np.where(np.isnan(p_good), 0.5, p_good)
    if len(np.unique(prompts)) < 0.6 * len(prompts):
        picked = []
        for group in np.unique(prompts):
            inside = np.flatnonzero(prompts == group)
            top = p_good[inside] >= p_good[inside].max() - 1e-12
            picked.append(gold[inside][top].mean())
        return float(np.mean(picked))
    right = np.where(p_good > 0.5, gold, np.where(p_good < 0.5, 1.0 - gold, 0.5))
    return float(right[rows].mean())


def supervised(table: VerdictTable, gold: np.ndarray) -> np.ndarray:
    """P(good) by naive Bayes on votes with all labels of the other four folds of the groups."""
    votes = only_votes(table)
    fold = np.random.default_rng(0).permutation(int(table.prompts.max()) + 1)[table.prompts] % 5
    p_good = np.empty(len(gold))
    for f in range(5):
        fit = NaiveBayes(2.0).fit(votes, np.where(fold == f, np.nan, gold))
        p_good[fold == f] = fit.p_good[fold == f]
    return p_good


def only_votes(table: VerdictTable) -> VerdictTable:
    kept = [j for j, kind in enumerate(table.kinds) if kind == "binary"]
    names, kinds, families = (tuple(x[j] for j in kept) for x in (table.names, table.kinds, table.families))
    return replace(table, values=table.values[:, kept], names=names, kinds=kinds, families=families)


def draw(gold: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Rows to label, some of either class."""
    while True:
        rows = rng.choice(len(gold), min(count, len(gold) // 2), replace=False)
        if 0 < gold[rows].sum() < len(rows):
            return np.sort(rows)


def measure(name: str, table: VerdictTable, gold: np.ndarray, labels: int, draws: int) -> list[Row]:
    everything = np.arange(len(gold))
    votes = binarise(only_votes(table), None)
    majority = accuracy(row_mean(votes), gold, table.prompts, everything)
    full = accuracy(DawidSkene(2.0)._fit_once(only_votes(table)).p_good, gold, table.prompts, everything)
    bound = accuracy(supervised(table, gold), gold, table.prompts, everything)
    auto = combine(table, Ensemble())
    ours = accuracy(auto.p_good, gold, table.prompts, everything)
    one_coin = combine(table, Ensemble(method="one_coin"))
    said = [w for w in (*auto.warnings, *one_coin.warnings) if w.startswith(WORDS)]
    coin = accuracy(one_coin.p_good, gold, table.prompts, everything)
    print(f"{name}: majority {majority:.3f}, Dawid-Skene {full:.3f}, supervised {bound:.3f}, one-coin {coin:.3f}")
    print(f"  without labels {ours:.3f}: {auto.why}")
    for warning in said:
        print(f"  warned: {warning[:150]}")
    rows = [Row(f"{name}, no labels", ours, max(majority, full), ours / max(majority, full, 1e-9), "accuracy")]
    found, known_too, methods, sureness = [], [], [], []
    for seed in range(draws):
        known = draw(gold, labels, np.random.default_rng(seed))
        told = combine(table, Ensemble(), {table.ids[i]: bool(gold[i]) for i in known.tolist()})
        rest = np.setdiff1d(everything, known)
        found.append(accuracy(told.p_good, gold, table.prompts, rest))
        known_too.append(accuracy(told.p_good, gold, table.prompts, everything))
        methods.append(told.method)
        p, truth = told.p_good[rest], gold[rest]
        chance = np.random.default_rng(seed).random(len(p)) < p  # what perfect calibration would show on as many
        sureness.append([expected_calibration_error(p, y) or 0.0 for y in (truth, chance)] + [brier(p, truth) or 0.0])
    if found:
        way, whole = (
            np.nan if bound <= majority else (np.mean(x) - majority) / (bound - majority) for x in (found, known_too)
        )
        counts = {m: methods.count(m) for m in dict.fromkeys(methods)}
        print(f"  with {labels} labels {np.mean(found):.3f} on the others ({way:.2f} of the way)", end=", ")
        print(f"{np.mean(known_too):.3f} on all ({whole:.2f}); {counts}")
        print("  ECE {:.3f} (of perfect calibration {:.3f}), Brier score {:.3f}".format(*np.mean(sureness, axis=0)))
        rows.append(
            Row(f"{name}, {labels} labels", float(np.mean(found)), bound, float(np.mean(found) / bound), "accuracy")
        )
    return rows


def by_threshold(table: VerdictTable, gold: np.ndarray, labels: int, draws: int) -> tuple[list[float], list[float]]:
    """Accuracy without labels by each of GATES, and with labels, mean over the draws, by each of LEADS."""
    settings, everything = Ensemble(), np.arange(len(gold))
    alone = []
    for thresholds in GATES.values():
        with patch.multiple(gate, **thresholds):
            alone.append(accuracy(without_labels(table, settings).fit.p_good, gold, table.prompts, everything))
    choice, told = without_labels(table, settings), []
    for seed in range(draws):
        known = draw(gold, labels, np.random.default_rng(seed))
        seen = np.where(np.isin(everything, known), gold, np.nan)
        ladder = rungs(choice.table, choice, settings)
        rows, held_out = _held_out(choice.table, ladder, seen)
        scores, errors = _compare(held_out, seen[rows], table.prompts[rows], STANDING)
        gains = _gains(held_out, ladder, seen[rows], table.prompts[rows])
        by_rung = {}
        for name in {pick(scores, errors, gains, lead) for lead in LEADS}:
            fit = ladder[name].model.fit(choice.table, seen if ladder[name].learns else None)
            p_good = calibrated(fit, held_out[name], ladder[name], seen, table.prompts, settings)[0]
            p_good[known] = gold[known]
            by_rung[name] = accuracy(p_good, gold, table.prompts, np.setdiff1d(everything, known))
        told.append([by_rung[pick(scores, errors, gains, lead)] for lead in LEADS])
    return alone, np.mean(told, axis=0).tolist()


def leave_one_out(found: dict[str, list[list[float]]], names: Sequence[str], what: str) -> list[Row]:
    """For each set the threshold that is best on all others, measured on it; `found` has accuracies by threshold."""
    by_set = {name: np.mean(values, axis=0) for name, values in found.items()}
    rows = []
    for name, own in by_set.items():
        others = np.mean([values for other, values in by_set.items() if other != name], axis=0)
        best = int(np.argmax(others > others.max() - 1e-9))
        print(f"{name}, {what}: {names[best]} is best on the others; here {own[best]:.3f}, as shipped {own[0]:.3f}")
        rows.append(
            Row(f"{name}, {what}, left out", float(own[best]), float(own[0]), float(own[best] / own[0]), "accuracy")
        )
    chosen, shipped = float(np.mean([r.ours for r in rows])), float(np.mean([r.peer for r in rows]))
    print(f"{what}, mean over the sets left out: {chosen:.4f}; as shipped {shipped:.4f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--labels", type=int, default=20)
    parser.add_argument("--draws", type=int, default=20, help="draws of the labelled items")
    parser.add_argument("--only", default="", help="sets whose name contains this")
    parser.add_argument("--leave-one-out", action="store_true", help="choose the gate's thresholds on the other sets")
    arguments = parser.parse_args()
    warnings.simplefilter("error")
    rows: list[Row] = []
    alone, told = defaultdict(list), defaultdict(list)
    for path in sorted(p for p in arguments.folder.glob("*.csv.gz") if arguments.only in p.name):
        for name, table, gold in tables(path):
            if np.isnan(gold).any():
                continue
            if arguments.leave_one_out:
                found = by_threshold(table, gold, arguments.labels, arguments.draws)
                for kept, one in zip((alone, told), found, strict=True):
                    kept[name.split("/")[0]].append(one)
            else:
                rows += measure(name, table, gold, arguments.labels, arguments.draws)
    if arguments.leave_one_out:
        rows += leave_one_out(alone, list(GATES), "no labels")
        rows += leave_one_out(told, [f"a lead of {lead:g}" for lead in LEADS], f"{arguments.labels} labels")
    print_report("ensemble_real", rows)


if __name__ == "__main__":
    main()
