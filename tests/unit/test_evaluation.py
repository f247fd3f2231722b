"""Metrics with intervals, the ensemble against gold, and over-optimisation."""

from __future__ import annotations

import json
from itertools import combinations
from math import comb

import numpy as np
import pytest
from pydantic import TypeAdapter

from align.ensemble.combine import combine
from align.ensemble.table import VerdictTable
from align.evaluation.metrics import bootstrap, evaluate, pass_at_k
from align.evaluation.overoptimisation import proxy_gold_gap
from align.evaluation.report import accuracy, accuracy_at_balance, auc, ensemble_report, rank_correlation
from align.recipe import Ensemble, Evaluation
from align.records import Sample, Verdict

NAN = float("nan")
GOLD = {"kind": "answer", "name": "correct"}


def settings(**changes: object) -> Evaluation:
    base = {"k": (1, 2), "samples_per_prompt": 2, "bootstrap": 400, "gold": GOLD}
    return TypeAdapter(Evaluation).validate_python(base | changes)


def samples_of(lengths: list[list[int]], finish: str = "stop") -> list[Sample]:
    """lengths[prompt][response], in tokens."""
    return [
        Sample(f"s{i}-{j}", f"p{i}", j, 0, 0, (1,), (2,) * n, (-0.1,) * n, "", finish, 1.0, 1.0, 0, 8)
        for i, group in enumerate(lengths)
        for j, n in enumerate(group)
    ]


def verdicts_of(samples: list[Sample], name: str, values: list[float | None]) -> list[Verdict]:
    return [Verdict(s.id, name, v, None if v is not None else "odd") for s, v in zip(samples, values, strict=True)]


# ---- pass@k ----------------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_draws_with_a_right_one() -> None:
    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(combinations([1] * c + [0] * (n - c), k))
                assert pass_at_k(np.array([n]), np.array([c]), k)[0] == pytest.approx(np.mean([any(d) for d in draws]))


def test_pass_at_k_stays_exact_where_factorials_do_not_fit() -> None:
    exact = 1 - comb(990, 100) / comb(1000, 100)
    assert pass_at_k(np.array([1000]), np.array([10]), 100)[0] == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(2, 1, 3), (3, 4, 1), (3, -1, 1)])
def test_pass_at_k_refuses_the_impossible(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k}"):
        pass_at_k(np.array([n]), np.array([c]), k)


# ---- bootstrap -------------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(5.0, 2.0, (400, 1))
    (estimate,) = bootstrap(values, np.ones((400, 1)), settings(bootstrap=4000), seed=1)
    half = 1.96 * values.std() / 20
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.03)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.03)


def test_responses_to_one_prompt_are_not_independent_evidence() -> None:
    # 100 prompts, all or none of 8 right: the interval is that of 100 coins, not of 800.
    right = (np.arange(100) < 50)[:, None] * 8.0
    (estimate,) = bootstrap(right, np.full((100, 1), 8.0), settings(bootstrap=2000), seed=1)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * 0.05, abs=0.02)


def test_the_same_seed_gives_the_same_interval_and_more_confidence_a_wider_one() -> None:
    values = np.random.default_rng(0).random((50, 2))
    ones = np.ones((50, 2))
    assert bootstrap(values, ones, settings(), 3) == bootstrap(values, ones, settings(), 3)
    narrow, wide = (bootstrap(values, ones, settings(confidence=c), 3)[0] for c in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


# ---- evaluate --------------------------------------------------------------------------------------------------


def test_metrics_by_hand() -> None:
    samples = samples_of([[3, 5], [4, 4], [2, 6]])
    verdicts = verdicts_of(samples, "nines", [1, 0, 1, 1, None, 0])
    verdicts += verdicts_of(samples, "score", [2.5, 0, 0, 0, 0, 0.5])
    gold = verdicts_of(samples, "correct", [1, 0, 0, 0, None, 1])
    stats = {"kl": [0.0, 1, 2, 3, 4, 5], "entropy": [0.5, NAN, 0.5, 0.5, 0.5, 1.5]}
    metrics = evaluate(samples, verdicts, gold, stats, settings(), ["nines", "score"])
    values = {name: metric["value"] for name, metric in metrics.items()}
    assert values == pytest.approx(
        {
            "length": 4.0, "truncated": 0.0, "verifier/nines": 3 / 5, "coverage/nines": 5 / 6,
            "verifier/score": 0.5, "coverage/score": 1.0, "gold_coverage": 5 / 6, "accuracy": 2 / 5,
            "pass@1": (0.5 + 0 + 1) / 3,  # the third prompt has one judged response
            "pass@2": (1 + 0) / 2,  # and too few for k = 2
            "kl": 2.5, "entropy": 0.7,
        }
    )  # fmt: skip
    assert all(m["low"] <= m["value"] <= m["high"] for m in metrics.values())
    json.dumps(metrics, allow_nan=False)
    assert metrics == evaluate(samples, verdicts, gold, stats, settings(), ["nines", "score"])


def test_the_order_of_the_verdicts_does_not_matter() -> None:
    samples = samples_of([[3, 5], [4, 4], [2, 6]])
    gold = verdicts_of(samples, "correct", [1, 0, 0, 1, 1, 1])
    args: tuple = ({}, settings(), [])
    assert evaluate(samples, [], gold, *args) == evaluate(samples, [], gold[::-1], *args)


def test_a_gold_score_has_a_mean_and_no_accuracy() -> None:
    samples = samples_of([[1, 1], [1, 1]], finish="length")
    gold = {"kind": "repetition", "name": "fresh"}
    metrics = evaluate(samples, [], verdicts_of(samples, "fresh", [0.25, 0.75, 1, 1]), {}, settings(gold=gold), [])
    assert metrics["gold/fresh"]["value"] == 0.75 and metrics["truncated"]["value"] == 1.0
    assert not {"accuracy", "pass@1"} & set(metrics)


def test_what_was_not_measured_is_absent() -> None:
    samples = samples_of([[1, 1]])
    gold = verdicts_of(samples, "correct", [None, None])
    metrics = evaluate(samples, [], gold, {}, settings(), [])
    assert set(metrics) == {"length", "truncated", "gold_coverage"} and metrics["gold_coverage"]["value"] == 0.0


def test_bad_input_to_evaluate_is_refused() -> None:
    samples = samples_of([[1, 1]])
    with pytest.raises(ValueError, match="no samples"):
        evaluate([], [], None, {}, settings(), [])
    with pytest.raises(ValueError, match="'odd'"):
        evaluate(samples, verdicts_of(samples, "odd", [1, 1]), None, {}, settings(), ["nines"])
    with pytest.raises(ValueError, match="two of one verifier"):
        evaluate(samples, verdicts_of(samples, "a", [1, 1]) * 2, None, {}, settings(), ["a"])
    with pytest.raises(ValueError, match="kl: 1 values for 2 samples"):
        evaluate(samples, [], None, {"kl": [1.0]}, settings(), [])
    with pytest.raises(ValueError, match="'length' is measured twice"):
        evaluate(samples, [], None, {"length": [1.0, 1.0]}, settings(), [])


# ---- the ensemble against gold ----------------------------------------------------------------------------------


def test_agreement_by_hand() -> None:
    truth = np.array([1.0, 1, 0, 0])
    assert accuracy(np.array([0.9, 0.5, 0.2, NAN]), truth) == (1 + 0.5 + 1 + 0.5) / 4
    assert auc(np.array([0.9, 0.4, 0.4, 0.1]), truth) == (1 + 1 + 0.5 + 1) / 4
    assert auc(np.array([0.9, 0.4, NAN, NAN]), truth) is None
    assert rank_correlation(np.array([4.0, 3, 2, 1]), np.array([40.0, 30, 2, 1])) == pytest.approx(1.0)
    assert rank_correlation(np.ones(4), truth) is None


def test_a_cut_at_the_balance_draws_lots_among_equals() -> None:
    truth = np.array([1.0, 1, 0, 0])
    assert accuracy_at_balance(np.array([0.3, 0.2, 0.1, 0.0]), truth, 0.5) == 1.0
    drawn = (1 + 1 / 3 + 2 / 3 + 2 / 3) / 4  # one yes among three equals
    assert accuracy_at_balance(np.array([0.3, 0.1, 0.1, 0.1]), truth, 0.5) == pytest.approx(drawn)
    assert accuracy_at_balance(np.full(4, NAN), truth, 0.5) == 0.5


def test_the_report_compares_every_opinion_on_what_gold_judged() -> None:
    values = np.array([[1, 1, 9.0], [1, 0, 8.0], [0, 1, 2.0], [0, 0, 1.0], [1, 1, 5.0]])
    table = VerdictTable(values, ("good", "coin", "score"), ("binary", "binary", "score"), ("",) * 3, np.zeros(5, int))
    combined = combine(table, Ensemble(method="mean"))
    report = ensemble_report(table, combined, [1.0, 1.0, 0.0, 0.0, None])
    assert report is not None
    assert set(report["accuracy"]) == {"p_good", "mean", "majority", "verifier/good", "verifier/coin", "verifier/score"}
    assert report["accuracy"]["verifier/good"] == 1.0 and report["accuracy"]["verifier/coin"] == 0.5
    assert report["accuracy"]["p_good"] == report["accuracy"]["mean"] == 1.0
    assert report["best_single"] == "verifier/good" and report["judged"] == 4 and report["gold_rate"] == 0.5
    assert "p_good 1.000, verifier/good 1.000" in report["explain"]
    json.dumps(report, allow_nan=False)


def test_gold_changes_nothing_but_the_report() -> None:
    table = VerdictTable(np.eye(3), tuple("abc"), ("binary",) * 3, ("",) * 3, np.zeros(3, int))
    combined = combine(table, Ensemble(method="mean"))
    before = combined.p_good.copy()
    ensemble_report(table, combined, np.array([0.0, 1.0, 1.0]))
    np.testing.assert_array_equal(combined.p_good, before)
    assert ensemble_report(table, combined, [None, None, None]) is None


def test_gold_that_gives_scores_is_compared_by_rank() -> None:
    values = np.array([[0.1, 3.0], [0.2, 1.0], [0.3, 2.0]])
    table = VerdictTable(values, ("up", "down"), ("score", "score"), ("", ""), np.zeros(3, int))
    report = ensemble_report(table, combine(table, Ensemble(method="mean")), [0.5, 0.6, 7.5])
    assert report is not None and report["accuracy"] == {} and report["auc"] == {}
    assert report["rank_correlation"]["verifier/up"] == pytest.approx(1.0)
    assert report["rank_correlation"]["verifier/down"] == pytest.approx(-0.5)
    assert report["best_single"] == "verifier/up"


# ---- over-optimisation ------------------------------------------------------------------------------------------


def at(gold: float, proxy: float, width: float = 0.02) -> dict[str, dict[str, float]]:
    pairs = {"accuracy": gold, "verifier/nines": proxy}
    return {name: {"value": v, "low": v - width, "high": v + width} for name, v in pairs.items()}


def test_a_proxy_that_rises_while_gold_falls_is_named() -> None:
    gap = proxy_gold_gap([at(0.3, 0.5), at(0.5, 0.7), at(0.4, 0.9)])
    assert gap.gold == "accuracy" and gap.gold_change == pytest.approx(0.1)
    assert gap.changes["verifier/nines"] == pytest.approx(0.4)
    assert gap.correlations["verifier/nines"] == pytest.approx(0.5)
    assert gap.warnings == (
        "verifier/nines rose from 0.7 to 0.9 while accuracy fell from 0.5 to 0.4: the policy games this verifier",
    )


@pytest.mark.parametrize(
    "history",
    [
        [at(0.3, 0.5), at(0.5, 0.7)],
        [at(0.5, 0.5), at(0.4, 0.7, width=0.2)],  # within the intervals
        [at(0.5, 0.7), at(0.4, 0.5)],  # both fell
        [at(0.5, 0.7)],
        [],
    ],
)
def test_otherwise_nothing_is_said(history: list) -> None:
    assert proxy_gold_gap(history).warnings == ()


def test_without_gold_there_is_nothing_to_compare() -> None:
    metrics = {"verifier/nines": {"value": 1.0, "low": 1.0, "high": 1.0}}
    assert proxy_gold_gap([metrics, metrics]).gold is None
