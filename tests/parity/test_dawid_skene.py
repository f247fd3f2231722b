"""Dawid-Skene against an independent implementation in plain loops, and on real votes."""

from __future__ import annotations

import csv
import gzip
import math
from pathlib import Path

import numpy as np
import pytest

from align.ensemble.channels import channels
from align.ensemble.combine import combine
from align.ensemble.dawid_skene import DawidSkene, expectation_maximisation
from align.ensemble.table import VerdictTable
from align.evaluation.report import accuracy, auc
from align.recipe import Ensemble

DATA = Path(__file__).parents[3] / "shared" / "data" / "verifier_matrices"


def loops(
    votes: list[list[float]], start: list[float], pseudo: float, rounds: int
) -> tuple[list[float], list[tuple[float, float]], float]:
    """Textbook EM, one response and one verifier at a time.

    Returns P(good), each verifier's P(yes | good) and P(yes | bad), and the class balance.
    """
    p, n, m = list(start), len(votes), len(votes[0])
    rates, balance = [(0.5, 0.5)] * m, 0.5
    for _ in range(rounds):
        rates = []
        for j in range(m):
            yes_good, good, yes_bad, bad = pseudo * 0.7, pseudo, pseudo * 0.3, pseudo
            for i in range(n):
                if not math.isnan(votes[i][j]):
                    good, bad = good + p[i], bad + 1 - p[i]
                    yes_good, yes_bad = yes_good + p[i] * votes[i][j], yes_bad + (1 - p[i]) * votes[i][j]
            rates.append((yes_good / good, yes_bad / bad))
        balance = (sum(p) + 1) / (n + 2)
        for i in range(n):
            good, bad = balance, 1 - balance
            for j in range(m):
                if votes[i][j] == 1:
                    good, bad = good * rates[j][0], bad * rates[j][1]
                elif votes[i][j] == 0:
                    good, bad = good * (1 - rates[j][0]), bad * (1 - rates[j][1])
            p[i] = good / (good + bad)
    return p, rates, balance


@pytest.mark.parametrize("rounds", [1, 2, 15])
def test_em_is_the_textbook_s(rounds: int) -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(150) < 0.4
    votes = (rng.random((150, 5)) < np.where(truth[:, None], 0.8, 0.3)).astype(float)
    votes[rng.random(votes.shape) < 0.2] = np.nan
    votes[3] = np.nan
    start = rng.uniform(0.05, 0.95, 150)
    same = votes.copy()
    same[np.isnan(same)] = 2
    for row in np.unique(same, axis=0):  # equal rows start equal: the fast path counts them once
        start[(same == row).all(axis=1)] = start[(same == row).all(axis=1)].mean()
    names = tuple("abcde")
    table = VerdictTable(votes, names, ("binary",) * 5, ("",) * 5, np.zeros(150, int))
    em = expectation_maximisation(channels(table), start, DawidSkene(2.0, max_iterations=rounds))
    p_good, rates, balance = loops(votes.tolist(), start.tolist(), 2.0, rounds)
    assert em.iterations == rounds
    np.testing.assert_allclose(em.p_good, p_good, atol=1e-8)
    np.testing.assert_allclose([g[1] for g in em.good], [r[0] for r in rates], atol=1e-8)
    np.testing.assert_allclose([b[1] for b in em.bad], [r[1] for r in rates], atol=1e-8)
    assert em.balance == pytest.approx(balance, abs=1e-8)


def test_the_log_posterior_never_falls() -> None:
    rng = np.random.default_rng(2)
    votes = (rng.random((80, 6)) < rng.uniform(0.2, 0.8, 6)).astype(float)
    table = VerdictTable(votes, tuple("abcdef"), ("binary",) * 6, ("x", "x", "", "", "", ""), np.zeros(80, int))
    start = np.clip(votes.mean(axis=1), 0.05, 0.95)
    track = [
        expectation_maximisation(channels(table), start, DawidSkene(2.0, max_iterations=k)).log_posterior
        for k in range(1, 30)
    ]
    assert (np.diff(track) >= -1e-9).all()


def load(name: str) -> tuple[VerdictTable, np.ndarray]:
    """A matrix of real verdicts and its gold column."""
    path = DATA / f"{name}.csv.gz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with gzip.open(path, "rt", newline="") as file:
        header, *rows = csv.reader(file)
    values = np.array([[float(x) if x else np.nan for x in row[3:]] for row in rows])
    kinds = tuple("score" if column.endswith("~") else "binary" for column in header[3:])
    groups = {group: i for i, group in enumerate(dict.fromkeys(row[1] for row in rows))}
    prompts = np.array([groups[row[1]] for row in rows])
    gold = np.array([float(row[2]) for row in rows])
    return VerdictTable(values, tuple(header[3:]), kinds, ("",) * len(kinds), prompts), gold


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("crowd_bluebirds", 0.898),
        ("llmbar_LLMBar_Natural", 0.940),
        ("llmbar_Processed_MT-Bench", 0.800),
        ("llmbar_LLMBar_Adversarial_Manual", 0.630),
        ("lf_tennis_dev", 0.891),
    ],
)
def test_real_votes_reach_the_reference_accuracy(name: str, reference: float) -> None:
    table, gold = load(name)
    combined = combine(table, Ensemble(method="dawid_skene"))
    assert combined.method == "dawid_skene"
    assert accuracy(combined.p_good, gold) >= reference - 0.006
    mean = combine(table, Ensemble(method="mean"))
    assert accuracy(combined.p_good, gold) >= accuracy(mean.p_good, gold)


def test_gsm8k_candidates_of_real_models() -> None:
    table, gold = load("gsm8k_openai_4models_first660")
    fitted, mean = (combine(table, Ensemble(method=m)) for m in ("dawid_skene", "mean"))
    assert fitted.method == "dawid_skene"
    assert accuracy(fitted.p_good, gold) > 0.80 > 0.45 > accuracy(mean.p_good, gold)
    first, second = auc(fitted.p_good, gold), auc(mean.p_good, gold)
    assert first is not None and second is not None and first > second > 0.85
    by_prompt = [np.flatnonzero(table.prompts == p) for p in range(int(table.prompts.max()) + 1)]
    picked = [gold[rows][mean.p_good[rows] == mean.p_good[rows].max()].mean() for rows in by_prompt]
    assert np.mean(picked) > gold.mean() + 0.1  # best of four by the mean against one at random
