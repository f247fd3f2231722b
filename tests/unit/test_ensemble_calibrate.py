"""Calibration by hand and by simulation, pairs, and votes in a stream."""

from __future__ import annotations

import gzip
import time
from pathlib import Path

import numpy as np
import pytest

from align.ensemble.base import Fit, logit, sigmoid
from align.ensemble.calibrate import (
    GRID,
    PairProbability,
    cautious,
    difficulty,
    fit_pairs,
    isotonic,
    joint_log_loss,
    log_loss,
    pairs_within,
    platt,
    share_difficulty,
    share_error,
    shift_balance,
    soft_limit,
)
from align.ensemble.combine import combine
from align.ensemble.dawid_skene import DawidSkene
from align.ensemble.ladder import Rung, calibrated
from align.ensemble.mean import Mean
from align.ensemble.patterns import patterns
from align.ensemble.streaming import fit_stream, read_chunks
from align.ensemble.table import VerdictTable
from align.evaluation.calibration import brier, expected_calibration_error, reliability
from align.evaluation.pair_calibration import pair_calibration
from align.recipe import Ensemble

NAN = float("nan")


# ---- reliability ----------------------------------------------------------------------------------------------------


def test_the_reliability_curve_by_hand() -> None:
    p, y = np.array([0.2, 0.2, 0.2, 0.2, 0.8, 0.8, NAN]), np.array([1.0, 0, 0, 0, 1, 0, 1])
    curve = reliability(p, y, bins=2)
    np.testing.assert_allclose(curve.stated, [0.2, 0.8])
    np.testing.assert_allclose(curve.observed, [0.25, 0.5])
    assert curve.count.tolist() == [4, 2]
    assert expected_calibration_error(p, y, bins=2) == pytest.approx((4 * 0.05 + 2 * 0.3) / 6)
    assert brier(np.array([0.5, 1.0]), np.array([0.0, 1.0])) == pytest.approx(0.125)
    assert expected_calibration_error(np.array([NAN]), np.array([1.0])) is None and brier(p[:0], y[:0]) is None


# ---- labels ---------------------------------------------------------------------------------------------------------


def test_platt_undoes_a_posterior_that_is_three_times_too_sure() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=6000)
    y = (rng.random(6000) < sigmoid(true)).astype(float)
    curve = platt(sigmoid(3 * true), y)
    assert curve.slope == pytest.approx(1 / 3, abs=0.03) and curve.offset == pytest.approx(0.0, abs=0.1)
    told = curve(sigmoid(3 * true))
    assert (expected_calibration_error(told, y) or 0) < 0.03 < (expected_calibration_error(sigmoid(3 * true), y) or 0)


def test_few_labels_hardly_move_a_likelihood_and_set_the_scale_of_a_mean() -> None:
    p, y = np.array([0.3, 0.4, 0.6, 0.7]), np.array([0.0, 0, 1, 1])
    assert platt(p, y).slope == pytest.approx(1.0, abs=0.4)
    assert platt(p, y, likelihood=False).slope > 2.0
    assert platt(p, 1 - y).slope > 0  # never turned round


def test_isotonic_pools_by_hand() -> None:
    x, y = np.array([0.1, 0.2, 0.3, 0.9]), np.array([0.0, 1, 0, 1])
    # 0.2 and 0.3 are pooled: (1 + 1/2) / 3; single ones (0 + 1/2) / 2 and (1 + 1/2) / 2
    np.testing.assert_allclose(isotonic(x, y, np.array([0.0, 0.25, 0.9, NAN])), [0.25, 0.5, 0.75, NAN])


def test_the_soft_limit_keeps_order_and_small_values() -> None:
    z = np.array([-50.0, -9, 0, 2, 8, 9, 50])
    soft = soft_limit(z, 8.0)
    assert (np.diff(soft) > 0).all() and np.abs(soft).max() < 8.0 and soft[3] == pytest.approx(2.0, abs=0.01)


def test_the_class_balance_is_read_from_the_unlabelled() -> None:
    rng = np.random.default_rng(0)
    y = (rng.random(5000) < 0.2).astype(float)
    evidence = np.where(y == 1, 2.0, -2.0) + 2.0 * rng.normal(size=5000)  # log-likelihood ratio of N(2, 4), N(-2, 4)
    told_under_half = sigmoid(evidence)
    moved, share = shift_balance(told_under_half, 0.5, error=0.2)
    assert 0.2 < share < 0.35  # the labels' own 0.5 is mixed in
    assert (expected_calibration_error(moved, y) or 0) < 0.06 < (expected_calibration_error(told_under_half, y) or 0)
    assert shift_balance(np.full(9, 0.5), 0.3, error=0.01)[1] == pytest.approx(0.3, abs=2e-3)  # nothing to go by


def test_the_error_of_a_share_counts_prompts_and_not_responses() -> None:
    labels, prompts = np.array([1.0, 1, 1, 0, 0, 0]), np.array([0, 0, 0, 1, 1, 1])
    assert share_error(labels, prompts) == pytest.approx(np.sqrt((0.5 + 0.25) / 4))


def test_siblings_say_how_hard_a_prompt_is() -> None:
    rng = np.random.default_rng(0)
    rate = rng.beta(0.5, 0.5, 300)
    prompts = np.repeat(np.arange(300), 12)
    y = (rng.random(3600) < rate[prompts]).astype(float)
    alone = sigmoid(np.where(y == 1, 0.5, -0.5) + rng.normal(size=3600))  # d' = 1
    found = difficulty(alone, 0.5, prompts)
    assert found is not None
    shared = share_difficulty(alone, found)
    assert (brier(shared, y) or 1) < (brier(alone, y) or 0) - 0.02
    assert (expected_calibration_error(shared, y) or 1) < 0.04
    first = np.argsort(alone[:12])
    assert (np.diff(shared[:12][first]) >= 0).all()
    assert difficulty(alone, 0.5, np.arange(3600)) is None  # nobody has siblings


def test_the_labels_of_one_prompt_are_judged_together_by_hand() -> None:
    p, prompts = np.array([0.9, 0.8, NAN, 0.5, 0.3, 0.6]), np.array([4, 4, 4, 4, 9, 9])
    found = difficulty(p, 0.4, prompts)
    assert found is not None and found.weight.sum() == pytest.approx(1.0)
    odds = p / (1 - p) * (0.6 / 0.4)
    terms = {0: (1.0, 0.0), 1: (0.0, 1.0)}  # what (1 - d) and d x odds are worth under a label

    def chance(rows: list[int], labels: dict[int, int]) -> float:
        each = [[terms[labels[i]] if i in labels else (1.0, 1.0)] for i in rows]
        parts = [(1 - GRID) * e[0][0] + GRID * odds[i] * e[0][1] for i, e in zip(rows, each, strict=True)]
        return float((found.weight * np.prod(parts, axis=0)).sum())

    known = np.array([1.0, NAN, NAN, 0.0, 0.0, NAN])
    expected = chance([0, 1, 3], {0: 1, 3: 0}) / chance([0, 1, 3], {}) * chance([4, 5], {4: 0}) / chance([4, 5], {})
    assert joint_log_loss(found, known) == pytest.approx(-np.log(expected), rel=1e-9)
    assert joint_log_loss(found, np.full(6, NAN)) == 0.0
    one = np.array([NAN, 1.0, NAN, NAN, NAN, NAN])  # a single label of a prompt is judged as by share_difficulty
    assert joint_log_loss(found, one) == pytest.approx(-np.log(share_difficulty(p, found)[1]), rel=1e-6)


def test_caution_scales_log_odds_by_the_effective_number() -> None:
    p = np.array([0.2, 0.5, 0.9, NAN])
    np.testing.assert_allclose(logit(cautious(p, 2.0, 4.0))[:3], logit(p)[:3] / 2, atol=1e-2)
    assert np.isnan(cautious(p, 2.0, 4.0)[3])


# ---- pairs ----------------------------------------------------------------------------------------------------------


def test_pair_probabilities_by_hand() -> None:
    assert PairProbability()(0.9, 0.2) == pytest.approx((0.72, 0.26, 0.02))
    win, tie, loss = PairProbability(0.5)(0.5, 0.5)
    assert (win, tie, loss) == pytest.approx((0.125, 0.75, 0.125))
    assert PairProbability(0.9)(0.9, 0.2)[2] == 0.0  # never negative


def test_the_correlation_of_siblings_is_found_from_labelled_pairs() -> None:
    rng = np.random.default_rng(0)
    rate = rng.choice([0.1, 0.9], 400)  # y are 0.64 correlated in a prompt, and p = 1/2 says nothing of it
    prompts = np.repeat(np.arange(400), 4)
    y = (rng.random(1600) < rate[prompts]).astype(float)
    assert fit_pairs(np.full(1600, 0.5), y, prompts).correlation == pytest.approx(0.64, abs=0.1)
    assert fit_pairs(np.full(4, 0.5), y[:4], prompts[:4]).correlation == 0.0  # too few pairs
    assert len(pairs_within(prompts)[0]) == 400 * 6


def test_pairs_are_those_of_a_prompt_and_not_without_end() -> None:
    prompts = np.array([7, 3, 7, 3, 7, 5])
    a, b = pairs_within(prompts)
    assert {tuple(sorted(p)) for p in zip(a.tolist(), b.tolist(), strict=True)} == {(0, 2), (0, 4), (2, 4), (1, 3)}
    assert len(pairs_within(np.array([1, 2, 3]))[0]) == len(pairs_within(np.empty(0, dtype=int))[0]) == 0
    assert len(pairs_within(np.zeros(1000, dtype=int))[0]) == 64 * 63 // 2
    assert len(pairs_within(np.repeat(np.arange(1000), 32))[0]) == 334 * 496  # every third prompt


def test_the_reliability_of_pairs_by_hand() -> None:
    # Two prompts: 0.8 against 0.5 came true, 0.8 against 0.5 was a tie; an unjudged and an equal one make no pair.
    p = np.array([0.8, 0.5, 0.5, 0.8, 0.9, NAN, 0.3, 0.3])
    gold = np.array([1.0, 0.0, 1.0, 1.0, NAN, 1.0, 1.0, 0.0])
    found = pair_calibration(p, PairProbability(), gold, np.array([0, 0, 1, 1, 1, 1, 2, 2]))
    assert found is not None and found["pairs"] == 2
    assert found["win"]["bins"] == [{"count": 2, "stated": pytest.approx(0.4), "observed": 0.5}]
    assert found["win"]["ece"] == pytest.approx(0.1) and found["tie"]["ece"] == pytest.approx(0.0)
    assert found["win"]["brier"] == pytest.approx((0.36 + 0.16) / 2)
    assert pair_calibration(p[:1], PairProbability(), gold[:1], np.array([0])) is None


def test_platt_settles_where_a_sure_posterior_is_wrong() -> None:
    # Log-odds of +-20 of which a quarter are wrong: whole Newton steps jump to and fro for ever.
    p = sigmoid(np.where(np.arange(40) % 2 == 1, 20.0, -20.0))
    y = np.where(np.arange(40) < 10, np.arange(40) % 2 == 0, np.arange(40) % 2 == 1).astype(float)
    curve = platt(p, y)
    assert 0.02 < curve.slope < 0.1 and log_loss(curve(p), y) < 0.6 < log_loss(p, y)


def test_siblings_are_listened_to_where_the_labels_bear_it_out() -> None:
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(100), 8)
    settings, rung = Ensemble(), Rung(Mean(2.0), learns=False)
    shown = np.isin(prompts, np.arange(10))
    for shared in (True, False):
        rate = rng.choice([0.05, 0.95], 100)[prompts] if shared else np.full(800, 0.5)
        y = (rng.random(800) < rate).astype(float)
        evidence = np.where(y == 1, 1.0, -1.0) + rng.normal(size=800)
        if not shared:  # what one response is said to be, all its siblings are: their verdicts are no new evidence
            evidence = np.repeat(rng.normal(size=100) * 2.0, 8) + 0.2 * evidence
        fit = Fit(sigmoid(evidence), 0.5, np.empty(0), np.empty(0))
        known = np.where(shown, y, NAN)
        p, seen, told, said = calibrated(fit, fit.p_good[shown], rung, known, prompts, settings)
        assert told["difficulty_shared"] == float(shared) and ("and what siblings say" in said) is shared
        np.testing.assert_array_equal(seen, p[shown])


@pytest.mark.parametrize(("block", "seed"), [(0, 1), (4, 2), (4, 3)])
def test_two_in_a_hundred_labelled_prompts_calibrate_responses_and_pairs(block: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompts = np.repeat(np.arange(300), 16)
    y = (rng.random(4800) < rng.beta(0.6, 0.8, 300)[prompts]).astype(float)
    noise = rng.normal(size=(4800, 9))
    noise[:, :block] = np.sqrt(0.4) * noise[:, :block] + np.sqrt(0.6) * rng.normal(size=(4800, 1))  # a shared error
    ids = tuple(str(i) for i in range(4800))
    scores = y[:, None] * np.linspace(0.3, 1.6, 9) + noise
    table = VerdictTable(scores, tuple("abcdefghi"), ("score",) * 9, ("",) * 9, prompts, ids=ids)
    combined = combine(table, Ensemble(), {ids[i]: bool(y[i]) for i in range(6 * 16)})
    p, truth = combined.p_good[96:], y[96:]
    assert (expected_calibration_error(p, truth) or 1) < 0.04
    a, b = pairs_within(prompts[96:][:1600])
    win = combined.pairs.of(p[a], p[b])[0]
    assert (expected_calibration_error(win, (truth[a] > truth[b]).astype(float)) or 1) < 0.05
    first = np.arange(0, len(p), 16)
    best, worst = first + p.reshape(-1, 16).argmax(axis=1), first + p.reshape(-1, 16).argmin(axis=1)
    win = combined.pairs.of(p[best], p[worst])[0]  # extremes of one prompt: where a shared difficulty shows
    assert (expected_calibration_error(win, (truth[best] > truth[worst]).astype(float)) or 1) < 0.08


# ---- patterns and streams ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [300, 70_000])  # distinct rows are counted, or each row is its own
def test_patterns_count_and_sum_like_a_loop(rows: int) -> None:
    rng = np.random.default_rng(0)
    sizes = [2, 3, 8, 2, 2, 8, 8, 2, 4, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    codes = [rng.integers(-1, size, rows) for size in sizes]
    table = patterns(codes, sizes)
    weight, value = rng.random(rows), rng.normal(size=sum(sizes))
    by_row = table.rows(weight)
    first = np.cumsum([0, *sizes])
    expected = np.zeros(sum(sizes))
    for c, code in enumerate(codes):
        np.add.at(expected, first[c] + code[code >= 0], table.samples(by_row)[code >= 0])
    np.testing.assert_allclose(table.votes(by_row), expected, rtol=1e-9)
    sums = sum(np.where(code >= 0, value[first[c] + np.maximum(code, 0)], 0.0) for c, code in enumerate(codes))
    np.testing.assert_allclose(table.samples(table.sums(value)), sums, atol=1e-9)


def test_rows_with_different_marks_stay_apart() -> None:
    table = patterns([np.array([0, 0, 0])], [2], np.array([2, 1, 1]))
    assert table.counts.tolist() == [2.0, 1.0]


def stream_votes(n: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    truth = rng.random(n) < 0.4
    votes = np.where(rng.random((n, 12)) < np.linspace(0.55, 0.9, 12), truth[:, None], ~truth[:, None]).astype(float)
    votes[rng.random(votes.shape) < 0.2] = NAN
    votes[7] = NAN
    return votes


@pytest.mark.parametrize("suffix", ["parquet", "csv", "csv.gz"])
def test_a_stream_gives_what_a_table_gives(tmp_path: Path, suffix: str) -> None:
    import pyarrow as pa
    from pyarrow import csv, parquet

    votes = stream_votes(3000)
    names = [f"v{j}" for j in range(12)]
    table = pa.table(
        {"item": list(range(3000)), **{n: pa.array(votes[:, j], from_pandas=True) for j, n in enumerate(names)}}
    )
    path = tmp_path / f"votes.{suffix}"
    if suffix == "parquet":
        parquet.write_table(table, path)
    else:
        csv.write_csv(table, tmp_path / "votes.csv")
        if suffix == "csv.gz":
            path.write_bytes(gzip.compress((tmp_path / "votes.csv").read_bytes()))
    streamed = fit_stream(read_chunks(path, names, rows=700), DawidSkene(2.0))
    whole = DawidSkene(2.0)._fit_once(VerdictTable(votes, tuple(names), ("binary",) * 12, ("",) * 12, np.arange(3000)))
    np.testing.assert_allclose(streamed.p_good, whole.p_good, atol=1e-6)
    np.testing.assert_allclose(streamed.tpr, whole.tpr, atol=0.01)
    assert np.isnan(streamed.p_good[7]) and streamed.balance == pytest.approx(whole.balance, abs=1e-6)


def test_a_stream_refuses_what_is_no_vote() -> None:
    with pytest.raises(ValueError, match="0, 1 or blank"):
        fit_stream([np.array([[2.0, 1.0]])], DawidSkene(2.0))
    with pytest.raises(ValueError, match="no votes"):
        fit_stream([], DawidSkene(2.0))


def test_a_stream_of_two_hundred_thousand_takes_about_a_second() -> None:
    votes = stream_votes(200_000)
    started = time.process_time()
    fit_stream((votes[i : i + 50_000] for i in range(0, 200_000, 50_000)), DawidSkene(2.0))
    assert time.process_time() - started < 3.0  # 0.3 s on an idle core
