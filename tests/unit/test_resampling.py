"""When sampling again pays: the worked example of the paper's model, limits by hand, and a simulation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from align import resampling
from align.resampling import Difficulty, acceptance_odds, best_of, best_samples, beta_classes, precision

TWO = Difficulty(np.array([0.58, 0.42]), np.array([0.87, 0.13]))
"""Easy and hard prompts; with t = 1 and f = 1/4 everything below was worked out by hand."""


@pytest.mark.parametrize(
    ("cost", "samples", "value"), [(0.7, 3, 0.525), (1.0, 2, 0.472), (2.0, 1, 0.339), (4.0, 1, 0.118), (8.0, 0, 0.0)]
)
def test_best_number_of_samples(cost: float, samples: int, value: float) -> None:
    found, worth = best_samples(TWO, 1.0, 0.25, cost)
    assert found == samples and worth == pytest.approx(value, abs=5e-4)


def test_value_of_two_samples_by_hand() -> None:
    """reject = 1 - .87 - .13/4 = .0975 and 1 - .13 - .87/4 = .6525; cost 1: gains .8375 and -.0875 a try."""
    gains = resampling.gains(TWO, 1.0, 0.25, 1.0, 0.0, 2)
    assert gains == pytest.approx([0.58 * 0.8375 - 0.42 * 0.0875, 0.58 * 0.0975 * 0.8375 - 0.42 * 0.6525 * 0.0875])


def test_precision_and_its_ceiling() -> None:
    once = (0.58 * 0.87 + 0.42 * 0.13) / (0.58 * (0.87 + 0.0325) + 0.42 * (0.13 + 0.2175))
    assert precision(TWO, 1.0, 0.25, 1) == pytest.approx(once)
    assert precision(TWO, 1.0, 0.25, None) == pytest.approx(0.716, abs=5e-4)
    assert precision(TWO, 1.0, 0.25, 500) == pytest.approx(precision(TWO, 1.0, 0.25, None))
    one = Difficulty(np.ones(1), np.array([0.3]))
    for samples in (1, 7, None):  # p t / (p t + (1 - p) f), however often
        assert precision(one, 0.8, 0.1, samples) == pytest.approx(0.24 / 0.31)
    assert precision(one, 0.8, 0.0, None) == 1.0
    assert math.isnan(precision(one, 0.0, 0.0, None))


def test_odds_fall_with_every_rejection() -> None:
    assert acceptance_odds(TWO, 1.0, 0.25, 4) == pytest.approx([5.07, 1.38, 0.72, 0.62], abs=5e-3)
    assert acceptance_odds(TWO, 1.0, 0.0, 2).tolist() == [math.inf, math.inf]


@pytest.mark.parametrize("cost", [0.7, 1.0, 2.0, 4.0])
def test_stopping_by_odds_is_stopping_at_the_best_number(cost: float) -> None:
    odds = acceptance_odds(TWO, 1.0, 0.25, 10)
    assert best_samples(TWO, 1.0, 0.25, cost)[0] == int((odds > cost).sum())


def test_more_is_always_better_where_every_try_pays_and_never_where_each_costs_more() -> None:
    one = Difficulty(np.ones(1), np.array([0.6]))
    samples, value = best_samples(one, 0.9, 0.1, 1.0)
    assert samples == resampling.MOST_SAMPLES
    assert value == pytest.approx((0.54 - 0.04) / (0.54 + 0.04))  # the share accepted is 1 in the end
    assert resampling.enough_samples(one, 0.9, 0.1, 1.0) == 6  # .42^5 = 1.3%, .42^6 = 0.5%
    assert best_samples(one, 0.9, 0.1, 1.0, per_sample=0.6) == (0, 0.0)


def test_a_best_number_beyond_what_a_float_can_tell_is_still_found() -> None:
    """Nearly all prompts end at once; what is left is hard, so there is an end although the sums no longer move."""
    classes = Difficulty(np.array([1.0 - 1e-15, 1e-15]), np.array([0.999, 0.2]))
    samples, _ = best_samples(classes, 0.9, 0.3, 2.0)
    odds = acceptance_odds(classes, 0.9, 0.3, 60)
    assert samples == int((odds > 2.0).sum()) and samples < 60


def test_classes_have_the_moments_of_their_distribution() -> None:
    assert beta_classes(1.0, 1.0, 2).success == pytest.approx([0.5 - 12**-0.5, 0.5 + 12**-0.5])  # Gauss-Legendre
    assert beta_classes(0.5, 0.5, 3).success == pytest.approx([0.5 - 0.75**0.5 / 2, 0.5, 0.5 + 0.75**0.5 / 2])
    for a, b in ((0.6, 0.8), (3.0, 1.0), (0.05, 0.2), (20.0, 30.0)):
        classes = beta_classes(a, b)
        moment = 1.0
        for k in range(1, 20):
            moment *= (a + k - 1) / (a + b + k - 1)
            assert classes.weight @ classes.success**k == pytest.approx(moment, rel=1e-8)


def test_difficulty_comes_back_from_soft_labels() -> None:
    rng = np.random.default_rng(0)
    p = rng.beta(0.6, 0.8, 4000)
    prompts = np.repeat(np.arange(4000), 6)
    good = rng.random(len(prompts)) < np.repeat(p, 6)
    classes = resampling.fit_difficulty(good.astype(float), prompts)
    mean = float(classes.weight @ classes.success)
    assert mean == pytest.approx(0.6 / 1.4, abs=0.015)
    assert float(classes.weight @ (classes.success - mean) ** 2) == pytest.approx(0.6 * 0.8 / (1.4**2 * 2.4), abs=0.005)
    alone = resampling.fit_difficulty(np.array([0.2, 0.6]), np.array([0, 1]))  # one response a prompt: nothing to see
    assert alone.success.tolist() == [0.4] and alone.weight.tolist() == [1.0]


def test_rates_by_hand() -> None:
    q, prompts = np.array([0.9, 0.5, 0.2, 0.4, np.nan]), np.array([0, 0, 1, 1, 1])
    rates = resampling.estimate_rates(q, prompts)
    assert rates.tpr == pytest.approx(1.4 / 2.0) and rates.fpr == pytest.approx(0.6 / 2.0)
    # left over: prompt 0 has 1.4 - .7 x 1.4 = .42, prompt 1 has 0 - .7 x .6 = -.42; two prompts, so times 2 / 1
    assert rates.tpr_low == pytest.approx(0.7 - 1.6449 * (2 * 2 * 0.42**2) ** 0.5 / 2.0)
    assert rates.fpr_high == 1.0 or rates.fpr_high > rates.fpr


def test_a_simulated_loop_does_as_predicted() -> None:
    """Prompts from Beta(.6, .8), a verifier with t = .9 and f = .2; the difficulty fitted to known labels."""
    rng = np.random.default_rng(1)
    p = rng.beta(0.6, 0.8, 30_000)
    good = rng.random((len(p), 12)) < p[:, None]
    accepted = rng.random(good.shape) < np.where(good, 0.9, 0.2)
    first = np.where(accepted.any(axis=1), accepted.argmax(axis=1), 99)
    right = good[np.arange(len(p)), np.minimum(first, 11)]
    prompts = np.repeat(np.arange(3000), 8)
    classes = resampling.fit_difficulty(good[:3000, :8].ravel().astype(float), prompts)
    for cost in (0.5, 1.0, 2.0):
        kept = [(first < k, (right & (first < k)).sum()) for k in range(1, 13)]
        values = [(r - cost * (inside.sum() - r)) / len(p) for inside, r in kept]
        predicted = np.cumsum(resampling.gains(classes, 0.9, 0.2, cost, 0.0, 12))
        assert np.abs(predicted - values).max() < 0.02
        best, _ = best_samples(classes, 0.9, 0.2, cost)
        assert values[best - 1] > max(values) - 0.005
    ratio = right[first < 12].mean()
    assert precision(classes, 0.9, 0.2, 12) == pytest.approx(ratio, abs=0.02)


def test_best_of_n_counts_every_subset() -> None:
    assert best_of([1, 2, 3], [1, 0, 1]) == pytest.approx([2 / 3, 2 / 3, 1.0])  # {1,2} bad, {1,3} and {2,3} good
    assert best_of([5, 5], [1, 0]) == pytest.approx([0.5, 0.5])  # a tie is drawn by lot
    assert best_of([1, 2], [1, 0]) == pytest.approx([0.5, 0.0])  # a wrong verifier: it falls
    assert best_of([], []) == []


def test_a_plan_says_nothing_where_nothing_is_known() -> None:
    assert resampling.plan_resampling(np.full(3, np.nan), np.arange(3)) is None
    assert resampling.plan_resampling(np.ones(3), np.arange(3)) is None  # nothing is bad: f cannot be told
    found = resampling.plan_resampling(np.array([0.9, 0.8, 0.3, 0.1]), np.array([0, 0, 1, 1]))
    assert found is not None and found["tpr"] == pytest.approx(1.7 / 2.1)
    text = "\n".join(resampling.render(found, "from a test"))
    assert "(from a test)" in text and "cost 8: none" in text


def test_the_closing_report_shows_the_newest_round(capsys: pytest.CaptureFixture[str]) -> None:
    from align.summary import render_report

    q, prompts = np.array([0.9, 0.8, 0.3, 0.1]), np.array([0, 0, 1, 1])
    older, newer = ({"resampling": resampling.plan_resampling(x, prompts), "on_gold": None} for x in (1 - q, q**2))
    summary = {
        "evaluation": {"after": {}}, "overoptimisation": None, "ensemble": [older, newer, None], "sync_share": 0.0,
        "seconds": {"total": 1.0},
    }  # fmt: skip
    render_report(summary, Path("run"))
    shown = capsys.readouterr().out
    expected = resampling.render(newer["resampling"], "rates estimated in round 1")
    assert "\n".join(expected) in shown and "round 0" not in shown


@pytest.mark.parametrize("absent", [None, math.nan])
def test_shares_of_nothing_are_said_to_be_unknown(absent: float | None) -> None:
    """A verifier that accepts nothing keeps nothing: read back from JSON its shares are null."""
    found = {"threshold": 0.5, "tpr": 0.0, "tpr_low": 0.0, "fpr": 0.0, "fpr_high": 0.1, "pass_rate": 0.4}
    found |= {"precision_once": absent, "ceiling": absent, "ceiling_cautious": absent, "odds": [None]}
    found["best"] = [{"cost": 1, "samples": 1, "enough": 1, "value": 0.1, "precision": absent, "unlimited": False}]
    assert "right among those kept: unknown, as nothing is kept" in resampling.render(found, "a test")[2]
