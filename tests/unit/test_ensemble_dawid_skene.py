"""Dawid-Skene: hand-worked steps, what it recovers, and what it refuses to believe."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from align.ensemble.channels import Channel, channels
from align.ensemble.combine import combine
from align.ensemble.dawid_skene import MIN_SUPPORT, DawidSkene, channel_log_odds, expectation_maximisation
from align.ensemble.diagnostics import join_kin, residual_dependence, worse_than_chance
from align.ensemble.table import VerdictTable
from align.evaluation.report import accuracy, auc, ensemble_report
from align.recipe import Ensemble

NAN = float("nan")
SETTINGS = Ensemble(method="dawid_skene")


def table_of(
    values: np.ndarray, kinds: tuple[str, ...] | None = None, families: tuple[str, ...] | None = None
) -> VerdictTable:
    m = values.shape[1]
    names = tuple(f"v{j}" for j in range(m))
    return VerdictTable(values, names, kinds or ("binary",) * m, families or ("",) * m, np.zeros(len(values), int))


def votes_of(truth: np.ndarray, rates: list[tuple[float, float]], rng: np.random.Generator) -> np.ndarray:
    """Independent votes with the given (TPR, TNR)."""
    yes = np.where(truth[:, None] == 1, [r[0] for r in rates], [1 - r[1] for r in rates])
    return (rng.random(yes.shape) < yes).astype(float)


# ---- by hand ---------------------------------------------------------------------------------------------------


def test_one_step_by_hand() -> None:
    # Three verifiers, all yes on row one, all no on row two; start at 0.8 and 0.2, no pseudo-votes, balance 1/2.
    # M: P(yes | good) = 0.8 / 1, P(yes | bad) = 0.2 / 1.  E: odds of row one = (0.8 / 0.2)^3 = 64.
    made = channels(table_of(np.array([[1.0, 1, 1], [0, 0, 0]])))
    em = expectation_maximisation(made, np.array([0.8, 0.2]), DawidSkene(0.0, balance=0.5, max_iterations=1))
    np.testing.assert_allclose(em.p_good, [64 / 65, 1 / 65])
    np.testing.assert_allclose(em.good[0], [0.2, 0.8])
    np.testing.assert_allclose(em.bad[2], [0.8, 0.2])
    # each row: 1/2 (0.8^3 + 0.2^3)
    assert em.log_posterior == pytest.approx(2 * np.log(0.5 * (0.8**3 + 0.2**3)))


def test_pseudo_votes_by_hand_and_a_silent_verifier_is_left_out() -> None:
    # Two pseudo-votes, 0.7 of them right: P(yes | good) = (0.8 + 1.4) / 3, P(yes | bad) = (0.2 + 0.6) / 3, ratio 2.75.
    # The third verifier is silent on row one, so two verifiers speak there and three on row two.
    made = channels(table_of(np.array([[1.0, 1, NAN], [0, 0, 0]])))
    em = expectation_maximisation(made, np.array([0.8, 0.2]), DawidSkene(2.0, balance=0.5, max_iterations=1))
    assert em.p_good[0] == pytest.approx(2.75**2 / (1 + 2.75**2))
    np.testing.assert_allclose(em.good[2], [(0.2 + 0.6) / 2.2, 1.4 / 2.2])  # no: 0.2 of a vote; yes: pseudo only


def test_a_free_balance_has_one_pseudo_response_of_each_class() -> None:
    made = channels(table_of(np.array([[1.0, 1, 1], [0, 0, 0]])))
    em = expectation_maximisation(made, np.array([0.9, 0.4]), DawidSkene(0.0, max_iterations=1))
    assert em.balance == pytest.approx((1.3 + 1) / (2 + 2))


def test_no_channel_says_more_than_the_limit() -> None:
    channel = Channel(np.array([0, 1, -1]), np.array([0.0, 1.0]), (0,))
    made = [channel, channel, channel]
    em = expectation_maximisation(made, np.array([0.01, 0.99, 0.5]), DawidSkene(0.0, balance=0.5))
    said = channel_log_odds(made, em, limit=3.0)
    np.testing.assert_allclose(said, [[-3.0] * 3, [3.0] * 3, [0.0] * 3])


# ---- channels --------------------------------------------------------------------------------------------------


def test_a_family_is_one_channel_with_its_joint_votes_as_levels() -> None:
    values = np.tile([[1, 1, 0.5], [0, 1, 0.7], [1, 1, 0.9], [NAN, 0, 0.1], [NAN, NAN, 0.2]], (15, 1))
    family, score = channels(table_of(values, ("binary", "binary", "score"), ("d", "d", "")))
    assert family.columns == (0, 1) and score.columns == (2,)
    assert family.codes[4] == -1 and family.codes[0] == family.codes[2]
    assert len(set(family.codes[:4].tolist())) == 3
    np.testing.assert_allclose(family.levels[family.codes[[0, 1, 3]]], [1.0, 0.5, 0.0])


@pytest.mark.parametrize(("rows", "levels"), [(79, 3), (80, 4)])
def test_a_family_s_joint_votes_need_twenty_responses_each(rows: int, levels: int) -> None:
    votes = np.tile([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], (20, 1))[:rows]
    (family,) = channels(table_of(votes, ("binary", "binary"), ("d", "d")))
    assert len(family.levels) == levels  # else none, one or two yes: which of the two said it is forgotten
    assert (family.codes[1] == family.codes[2]) == (levels == 3)


def test_a_score_with_few_values_keeps_them_and_with_many_is_cut_by_rank() -> None:
    shares = np.repeat([0.0, 1 / 7, 1.0], [50, 30, 20])
    many = np.random.default_rng(0).permutation(400).astype(float)
    (few,) = channels(table_of(shares[:, None], ("score",)))
    assert np.bincount(few.codes).tolist() == [50, 30, 20]
    np.testing.assert_allclose(few.levels, [0.25, 0.65, 0.9])
    (cut,) = channels(table_of(many[:, None], ("score",)))
    assert np.bincount(cut.codes).tolist() == [50] * 8
    assert (np.diff(cut.codes[np.argsort(many)]) >= 0).all()


def test_a_verifier_that_never_speaks_is_no_channel() -> None:
    assert [c.columns for c in channels(table_of(np.array([[1.0, NAN], [0.0, NAN]])))] == [(0,)]


# ---- what it recovers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", [0.2, 0.5, 0.85])
def test_rates_and_balance_are_found_without_labels(balance: float) -> None:
    rng = np.random.default_rng(3)
    truth = (rng.random(6000) < balance).astype(float)
    rates = [(0.9, 0.7), (0.75, 0.9), (0.8, 0.8), (0.5, 0.5), (0.3, 0.35), (0.85, 0.75)]  # a coin and one that lies
    votes = votes_of(truth, rates, rng)
    votes[rng.random(votes.shape) < 0.1] = NAN
    fit = DawidSkene(2.0).fit(table_of(votes))
    np.testing.assert_allclose(fit.tpr, [r[0] for r in rates], atol=0.05)
    np.testing.assert_allclose(fit.tnr, [r[1] for r in rates], atol=0.05)
    assert fit.balance == pytest.approx(balance, abs=0.03)
    assert fit.diagnostics["converged"] and fit.diagnostics["residual_dependence"] < 0.1
    assert not fit.warnings
    assert accuracy(fit.p_good, truth) > 0.88


def test_scores_are_used_beyond_their_median() -> None:
    rng = np.random.default_rng(0)
    truth = (rng.random(4000) < 0.4).astype(float)
    scores = truth[:, None] * np.linspace(0.4, 1.6, 7) + rng.normal(size=(4000, 7))
    scores[:, 3] = np.exp(scores[:, 3])
    graded = DawidSkene(2.0).fit(table_of(scores, ("score",) * 7))
    halved = DawidSkene(2.0).fit(table_of((scores > np.median(scores, axis=0)).astype(float)))
    better, worse = auc(graded.p_good, truth), auc(halved.p_good, truth)
    assert better is not None and worse is not None and better > worse + 0.01
    assert graded.balance == pytest.approx(0.4, abs=0.05)


def test_row_order_scale_and_silent_columns_do_not_matter() -> None:
    rng = np.random.default_rng(1)
    truth = (rng.random(500) < 0.5).astype(float)
    votes = np.column_stack([votes_of(truth, [(0.8, 0.7)] * 4, rng), truth + rng.normal(size=500)])
    kinds = ("binary",) * 4 + ("score",)
    plain = DawidSkene(2.0).fit(table_of(votes, kinds))
    order = rng.permutation(500)
    shuffled = DawidSkene(2.0).fit(table_of(votes[order], kinds))
    np.testing.assert_allclose(shuffled.p_good, plain.p_good[order], rtol=1e-9)
    scaled = votes.copy()
    scaled[:, 4] = np.exp(3 * scaled[:, 4])
    np.testing.assert_allclose(DawidSkene(2.0).fit(table_of(scaled, kinds)).p_good, plain.p_good, rtol=1e-9)
    silent = np.column_stack([votes, np.full(500, NAN)])
    with_silent = DawidSkene(2.0).fit(table_of(silent, kinds + ("binary",)))
    np.testing.assert_allclose(with_silent.p_good, plain.p_good, rtol=1e-9)


def test_a_response_that_nobody_judged_has_no_p_good() -> None:
    rng = np.random.default_rng(1)
    votes = votes_of((rng.random(300) < 0.5).astype(float), [(0.8, 0.8)] * 4, rng)
    votes[7] = NAN
    combined = combine(table_of(votes), SETTINGS)
    assert np.isnan(combined.p_good[7]) and np.isfinite(np.delete(combined.p_good, 7)).all()
    assert combined.method == "dawid_skene"


def test_a_known_balance_is_held() -> None:
    rng = np.random.default_rng(1)
    votes = votes_of((rng.random(900) < 0.5).astype(float), [(0.8, 0.8)] * 5, rng)
    assert combine(table_of(votes), SETTINGS.model_copy(update={"class_balance": 0.3})).class_balance == 0.3


def test_a_hundred_thousand_responses_take_about_a_second() -> None:
    rng = np.random.default_rng(0)
    truth = (rng.random(100_000) < 0.5).astype(float)
    votes = votes_of(truth, [(a, a) for a in np.linspace(0.55, 0.85, 10)], rng)
    votes[rng.random(votes.shape) < 0.05] = NAN
    started = time.process_time()
    combined = combine(table_of(votes), SETTINGS)
    assert time.process_time() - started < 5.0  # 0.2 s on an idle core
    assert combined.method == "dawid_skene"


# ---- what it does not believe -----------------------------------------------------------------------------------


def sums(good: float, rng: np.random.Generator, n: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """Votes on three-digit sums of which `good` are right: nines, last digit, parity, size, noise, a liar, agreement.

    A wrong sum is off in one digit, mostly by one, or has two digits swapped, which nines cannot see.  Parity and the
    liar (the last digit's vote, turned round 7 times in 10) know nothing that the last digit does not.
    """
    truth = (rng.random(n) < good).astype(float)
    correct = rng.integers(200, 1999, n)
    off = np.where(rng.random(n) < 0.6, rng.choice([-1, 1], n), rng.choice([-9, -4, -3, -2, 2, 3, 4, 9], n))
    answer = np.where(truth == 1, correct, np.abs(correct + off * 10 ** rng.integers(0, 3, n)))
    last = (answer % 10 == correct % 10).astype(float)
    liar = np.where(rng.random(n) < 0.7, 1 - last, last)
    share = 0.3 + 0.65 * good  # right answers come from easy prompts, where the other responses are right too
    agreement = rng.binomial(7, np.where(truth == 1, rng.beta(6 * share, 6 * (1 - share), n), rng.beta(1, 3, n))) / 7
    nines, parity, size = answer % 9 == correct % 9, answer % 2 == correct % 2, np.abs(answer - correct) < 150
    columns = (nines, last, parity, size, rng.random(n) < 0.5, liar, agreement)
    return np.column_stack([np.asarray(c, dtype=float) for c in columns]), truth


SUM_KINDS = ("binary",) * 6 + ("score",)
DECLARED = ("", "last digit", "last digit", "", "", "last digit", "")


@pytest.mark.parametrize("good", [0.25, 0.4, 0.6, 0.8, 0.95])
def test_quickstart_like_verifiers_beat_the_best_of_them_and_the_mean(good: float) -> None:
    votes, truth = sums(good, np.random.default_rng(5))
    table = table_of(votes, SUM_KINDS, DECLARED)
    combined = combine(table, SETTINGS)
    assert combined.method == "dawid_skene"
    report = ensemble_report(table, combined, truth)
    assert report is not None
    others = {name: value for name, value in report["accuracy"].items() if name != "p_good"}
    assert len(others) == 9 and report["accuracy"]["p_good"] > max(others.values())
    assert report["auc"]["p_good"] > max(0.95, report["auc"]["mean"])
    assert combined.class_balance == pytest.approx(good, abs=0.1)
    liar = combined.estimates[5]
    assert liar.tpr + liar.tnr < 1.0


@pytest.mark.parametrize("good", [0.05, 0.15, 0.3, 0.5, 0.9])
def test_a_shared_error_is_never_taken_for_the_answer(good: float) -> None:
    # Undeclared kin: EM alone follows the last digit where few are good.  Joined or refused, it must not.
    votes, truth = sums(good, np.random.default_rng(6))
    combined = combine(table_of(votes, SUM_KINDS), SETTINGS)
    assert (auc(combined.p_good, truth) or 0) > 0.8
    alone = DawidSkene(2.0)._fit_once(table_of(votes, SUM_KINDS))
    if good <= 0.15:
        assert accuracy(alone.p_good, truth) < 0.5 and alone.diagnostics["support"] < MIN_SUPPORT
        assert combined.method == "mean" or any("one source" in w for w in combined.warnings)


def test_the_leader_s_family_grows_by_its_closest_kin() -> None:
    votes, _ = sums(0.3, np.random.default_rng(0))
    once = join_kin(table_of(votes, SUM_KINDS), leader=1)
    assert [j for j, f in enumerate(once.families) if f] == [1, 2]
    twice = join_kin(once, leader=1)
    assert [j for j, f in enumerate(twice.families) if f] == [1, 2, 5] and len(set(twice.families)) == 2


def test_residual_dependence_by_hand() -> None:
    # Two verifiers that always agree, half yes, said to be coins: correlation 1, of which the model explains 0.
    votes = np.array([[1.0, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0]] * 20)
    half = np.full(3, 0.5)
    worst, first, second = residual_dependence(table_of(votes), votes, 0.5, half, half)
    assert worst == pytest.approx(1.0) and {first, second} == {"v0", "v1"}
    same_family = table_of(votes, families=("f", "f", ""))
    assert residual_dependence(same_family, votes, 0.5, half, half)[0] == pytest.approx(0.0)


def test_most_verifiers_below_chance_is_said() -> None:
    said = worse_than_chance(["a", "b", "c"], np.array([0.3, 0.4, 0.9]), np.array([0.5, 0.5, 0.9]))
    assert len(said) == 1 and said[0].startswith("upside down") and "(a, b)" in said[0]
    assert worse_than_chance(["a", "b"], np.array([0.3, 0.9]), np.array([0.5, 0.9])) == ()


def test_stopping_early_is_said() -> None:
    votes, _ = sums(0.6, np.random.default_rng(0))
    fit = DawidSkene(2.0, max_iterations=2)._fit_once(table_of(votes, SUM_KINDS, DECLARED))
    assert any("after 2 iterations" in warning for warning in fit.warnings)


def test_agreement_inside_a_prompt_counts_as_one_observation() -> None:
    """A policy that has settled on a wrong answer: frequent, and caught by a check that is otherwise always right.

    100 prompts of 8 equal responses, 10 of them settled on a wrong answer.  Counted once per response, their agreement
    outvotes the check; counted as one observation it does not.
    """
    wrong = np.repeat(np.arange(100) < 10, 8)
    rng = np.random.default_rng(0)
    stray = rng.random(800) < 0.1  # odd responses, infrequent and wrong
    bad = wrong | stray
    check = np.where(bad, rng.random(800) < 0.1, 1.0)
    frequency = np.where(stray, 0.05, 0.95)
    other = np.where(bad, rng.random(800) < 0.6, 1.0)
    table = VerdictTable(
        values=np.column_stack([check, other, frequency]).astype(float),
        names=("check", "other", "frequency"),
        kinds=("binary", "binary", "score"),
        families=("", "", ""),
        prompts=np.repeat(np.arange(100), 8),
        whole_prompts=(False, False, True),
    )
    apart = channels(table)
    assert [c.weight for c in apart] == [1.0, 1.0, 0.5]
    fit = DawidSkene(2.0).fit(table)
    caught = wrong & (check == 0.0)
    assert (fit.p_good[caught] < 0.5).all()
    trusting = DawidSkene(2.0).fit(replace(table, whole_prompts=()))
    assert fit.p_good[caught].mean() < trusting.p_good[caught].mean()
