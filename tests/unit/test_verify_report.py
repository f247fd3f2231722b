"""The figures of the verifier report, worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.ensemble.combine import combine
from align.ensemble.table import VerdictTable
from align.recipe import Ensemble
from align.verifying.report import calibration, error_correlation, selection, true_report, wilson, worst_pairs

NAN = math.nan


def test_calibration_by_hand() -> None:
    """Four values, so four bins of one: gaps .1, .8, .38 and .68."""
    found = calibration(np.array([0.1, 0.2, 0.62, 0.68, NAN]), np.array([0.0, 1.0, 1.0, 0.0, 1.0]))
    assert found["ece"] == pytest.approx((0.1 + 0.8 + 0.38 + 0.68) / 4)
    assert found["brier"] == pytest.approx((0.01 + 0.64 + 0.1444 + 0.4624) / 4)
    assert [(b["count"], b["good"]) for b in found["bins"]] == [(1, 0.0), (1, 1.0), (1, 1.0), (1, 0.0)]
    same = calibration(np.full(10, 0.7), np.array([1.0] * 6 + [0.0] * 4))["bins"]
    low, high = wilson(0.6, 10)
    assert same == [{"count": 10, "p_good": pytest.approx(0.7), "good": 0.6, "low": low, "high": high}]
    assert calibration(np.array([NAN]), np.array([1.0])) == {"ece": None, "brier": None, "bins": []}


def test_wilson_by_hand() -> None:
    z2 = 1.96**2
    assert wilson(0.5, 10) == pytest.approx((0.5 - 0.5 * (z2 / (10 + z2)) ** 0.5, 0.5 + 0.5 * (z2 / (10 + z2)) ** 0.5))
    assert wilson(1.0, 4) == pytest.approx((4 / (4 + z2), 1.0))
    assert all(math.isnan(x) for x in wilson(NAN, 0))


def test_selection_by_hand() -> None:
    groups = np.array([7, 3, 7, 3, 3, 9])
    truth = np.array([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    p_good = np.array([0.9, 0.5, 0.1, 0.5, 0.2, 0.3])  # group 7 right; group 3 a tie of a wrong and a right one
    majority = np.array([0.0, 1.0, 1.0, 0.0, 0.0, 1.0])
    found = selection(p_good, majority, truth, groups)
    assert found == {"groups": 2.0, "p_good": 0.75, "majority": 0.0, "random": (0.5 + 2 / 3) / 2, "oracle": 1.0}
    assert selection(p_good, majority, np.where(groups == 9, 1.0, NAN), groups) is None


def test_correlation_of_errors_by_hand() -> None:
    """Among good items a and b err together once in four, c never; among bad ones each is wrong once, apart."""
    truth = np.array([1.0, 1, 1, 1, 0, 0, 0, 0])
    a = np.array([0.0, 1, 1, 1, 1, 0, 0, 0])
    b = np.array([0.0, 1, 1, 1, 0, 1, 0, 0])
    found = error_correlation(np.column_stack([a, b, truth, 1.0 - a]), truth)
    # covariance: good 4 x (3/4 - 9/16) = .75, bad 4 x (0 - 1/16) = -.25; variance 4 x 3/16 in each class
    assert found[0, 1] == pytest.approx((0.75 - 0.25) / 1.5)
    assert found[0, 0] == pytest.approx(1.0) and found[0, 3] == pytest.approx(-1.0)
    assert math.isnan(found[0, 2])  # a perfect verifier has no errors to correlate
    pairs = worst_pairs(found, ("a", "b", "c", "d"))
    assert pairs[0] == {"verifiers": ["a", "d"], "correlation": pytest.approx(-1.0)} and len(pairs) == 3


def test_correlation_leaves_out_what_only_one_judged() -> None:
    truth = np.array([1.0, 1, 1, 1, 1, 1])
    a = np.array([0.0, 1, 0, 1, NAN, 0])
    b = np.array([0.0, 1, 0, 1, 0, NAN])
    assert error_correlation(np.column_stack([a, b]), truth)[0, 1] == pytest.approx(1.0)


def test_the_truth_is_measured_where_gold_was_not_shown() -> None:
    values = np.array([[1.0, 0.0], [0.0, 0.0], [1.0, NAN], [1.0, 1.0]])
    table = VerdictTable(values, ("a", "b"), ("binary", "binary"), ("", ""), np.arange(4))
    gold = np.array([1.0, 1.0, 0.0, NAN])
    combined = combine(table, Ensemble(method="majority"))
    found = true_report(table, combined, gold, seen=np.array([0]))
    assert found is not None and found["items"] == 2 and found["good"] == 0.5
    assert [row["judged"] for row in found["verifiers"]] == [2, 1]
    assert found["verifiers"][0]["accuracy"] == 0.0  # a: no where gold says yes, yes where it says no
    assert (found["verifiers"][0]["tpr"], found["verifiers"][0]["tnr"]) == (0.0, 0.0)
    assert math.isnan(found["verifiers"][1]["tnr"])  # b never judged a bad item
    assert found["best_single"] == "b" and found["accuracy"]["best_single"] == 0.25  # silent on one of two
    assert true_report(table, combined, gold, seen=np.array([0, 1, 2])) is None
    assert gold.tolist()[:3] == [1.0, 1.0, 0.0]
