"""The label models one by one: small tables by hand, what they recover, and what they do with bad tables."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from align.ensemble.base import Fit, sigmoid
from align.ensemble.combine import METHODS, combine
from align.ensemble.correct import Corrected
from align.ensemble.gaussian import GaussianEM
from align.ensemble.labelled import BestSingle, NaiveBayes, agreement
from align.ensemble.logistic import logistic_regression, shrunk_logistic
from align.ensemble.moments import MatchedMoments, Moments, Triplets, from_loadings, pairwise, rank_one
from align.ensemble.normalise import gaussian_scores, probit
from align.ensemble.table import VerdictTable
from align.ensemble.weaver import Weaver, distinct_answers, keep, percentiles
from align.evaluation.report import accuracy, auc
from align.recipe import Ensemble

NAN = float("nan")


def table_of(values: object, kinds: tuple[str, ...] | None = None, prompts: np.ndarray | None = None) -> VerdictTable:
    array = np.array(values, dtype=float)
    n, m = array.shape
    ids = tuple(f"s{i}" for i in range(n))
    where = np.arange(n) if prompts is None else prompts
    return VerdictTable(array, tuple(f"v{j}" for j in range(m)), kinds or ("binary",) * m, ("",) * m, where, ids=ids)


def votes_of(n: int, rates: list[tuple[float, float]], balance: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Independent votes with these (TPR, TNR), and the truth."""
    rng = np.random.default_rng(seed)
    truth = (rng.random(n) < balance).astype(float)
    yes = np.where(truth[:, None] == 1, [r[0] for r in rates], [1 - r[1] for r in rates])
    return (rng.random(yes.shape) < yes).astype(float), truth


RATES = [(0.9, 0.7), (0.75, 0.85), (0.8, 0.8), (0.65, 0.7), (0.85, 0.6), (0.7, 0.9)]


# ---- moments ----------------------------------------------------------------------------------------------------


def test_a_rank_one_matrix_is_found_from_its_off_diagonal() -> None:
    a = np.array([0.3, 0.2, -0.1, 0.25])
    matrix = np.outer(a, a)
    np.fill_diagonal(matrix, 0.25)
    np.testing.assert_allclose(rank_one(matrix, np.full((4, 4), 9.0)), a, atol=1e-6)


def test_rates_follow_from_the_loadings_by_hand() -> None:
    # Half say yes, pi = 1/2, loading 0.2: D = 0.2 / 0.5 = 0.4, TPR = 0.5 + 0.2 = 0.7, FPR = 0.3; odds of one yes 7/3.
    fit = from_loadings(np.array([[1.0], [0.0], [NAN]]), 0.5, np.array([0.2]))
    assert fit.tpr == pytest.approx([0.7]) and fit.tnr == pytest.approx([0.7])
    np.testing.assert_allclose(fit.p_good, [0.7, 0.3, NAN])


@pytest.mark.parametrize("model", [Moments, Triplets, MatchedMoments])
@pytest.mark.parametrize("balance", [0.3, 0.5])
def test_moment_methods_recover_rates_given_the_balance(model: type, balance: float) -> None:
    votes, truth = votes_of(60_000, RATES, balance, seed=1)
    fit = model(balance).fit(table_of(votes))
    error = np.abs(fit.tpr - [r[0] for r in RATES]).mean() + np.abs(fit.tnr - [r[1] for r in RATES]).mean()
    assert error / 2 <= 0.012
    assert accuracy(fit.p_good, truth) > 0.88


def test_moments_triplets_and_em_agree_where_verifiers_are_independent() -> None:
    votes, truth = votes_of(40_000, RATES, 0.45, seed=2)
    found = [
        auc(combine(table_of(votes), Ensemble(method=m, class_balance=0.45)).p_good, truth)
        for m in ("moments", "matched_moments", "triplets", "dawid_skene")
    ]
    assert max(found) - min(found) < 0.005  # type: ignore[type-var, operator]


def test_covariance_counts_what_both_judged() -> None:
    covariance, count = pairwise(np.array([[1.0, 1.0], [0.0, 0.0], [1.0, NAN], [NAN, NAN]]))
    assert covariance[0, 1] == pytest.approx(0.25) and count.tolist() == [[3, 2], [2, 2]]


def test_one_coin_collapses_on_a_bloc_of_rules_and_says_so() -> None:
    rng = np.random.default_rng(0)
    votes, _ = votes_of(1500, [(0.8, 0.9), (0.7, 0.9), (0.75, 0.85)], 0.4, seed=0)
    rules = (rng.random((1500, 9)) < 0.985).astype(float)
    combined = combine(table_of(np.hstack([votes, rules])), Ensemble(method="one_coin"))
    assert any(w.startswith("collapse") for w in combined.warnings)
    assert (combined.p_good > 0.5).mean() > 0.95


def test_one_coin_is_right_with_one_probability_by_hand() -> None:
    # Balance 1/2 known, three verifiers that always agree: P(right) = (0.8 + 0.8) / 2 after one M step, odds 4^3.
    from align.ensemble.channels import channels
    from align.ensemble.dawid_skene import DawidSkene, expectation_maximisation

    made = channels(table_of([[1.0, 1, 1], [0, 0, 0]]))
    model = DawidSkene(0.0, balance=0.5, max_iterations=1, one_coin=True)
    em = expectation_maximisation(made, np.array([0.9, 0.3]), model)
    np.testing.assert_allclose(em.good[0], [0.2, 0.8])  # (0.9 + 0.7) / 2
    np.testing.assert_allclose(em.bad[0], [0.8, 0.2])
    np.testing.assert_allclose(em.p_good, [64 / 65, 1 / 65])


# ---- scores -----------------------------------------------------------------------------------------------------


def test_the_normal_quantile() -> None:
    np.testing.assert_allclose(probit(np.array([0.5, 0.8413447, 0.0227501])), [0.0, 1.0, -2.0], atol=1e-3)


def scores_of(n: int, seed: int, shared: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = (rng.random(n) < 0.45).astype(float)
    noise = rng.normal(size=(n, 7))
    noise[:, :3] = np.sqrt(1 - shared) * noise[:, :3] + np.sqrt(shared) * rng.normal(size=(n, 1))
    scores = truth[:, None] * np.linspace(0.4, 1.6, 7) + noise
    scores[:, 1] = np.exp(scores[:, 1])
    return scores, truth


def test_gaussian_em_beats_the_mean_on_independent_scores_and_ignores_their_scale() -> None:
    scores, truth = scores_of(4000, seed=0)
    table = table_of(scores, ("score",) * 7)
    fit = GaussianEM().fit(table)
    mean = combine(table, Ensemble(method="mean"))
    ours, plain = auc(fit.p_good, truth), auc(mean.p_good, truth)
    assert ours is not None and plain is not None and ours > plain + 0.005
    assert fit.balance == pytest.approx(0.45, abs=0.04)
    again = GaussianEM().fit(table_of(np.exp(scores / 2), ("score",) * 7))
    np.testing.assert_allclose(again.p_good, fit.p_good, atol=1e-9)


def test_a_few_labels_tell_the_answer_from_a_shared_error() -> None:
    scores, truth = scores_of(4000, seed=3, shared=0.8)
    scores[:, :3] += 0.3 * truth[:, None]
    table = table_of(scores, ("score",) * 7)
    labels = np.full(4000, NAN)
    labels[:120] = truth[:120]
    anchored = auc(GaussianEM(full=0.1).fit(table, labels).p_good, truth)
    alone = auc(GaussianEM().fit(table).p_good, truth)
    assert anchored is not None and alone is not None and anchored > alone + 0.01
    np.testing.assert_array_equal(GaussianEM(full=0.1).fit(table, labels).p_good[:120], labels[:120])


def test_a_silent_score_speaks_for_neither_class() -> None:
    values = np.array([[1.0, 5.0], [2.0, NAN], [3.0, 7.0], [4.0, 4.0]])
    z = gaussian_scores(table_of(values, ("score", "score")))
    assert z[1, 1] == 0.0 and z[:, 0].sum() == pytest.approx(0.0, abs=1e-9)
    assert (z[:, 0] ** 2).mean() == pytest.approx(1.0)


# ---- labels -----------------------------------------------------------------------------------------------------


def test_logistic_regression_meets_its_first_order_condition_on_either_side() -> None:
    rng = np.random.default_rng(0)
    for count, width in ((30, 4), (12, 40)):  # more labels than features, and the other way round
        x = rng.normal(size=(count, width))
        y = (x[:, 0] + rng.normal(size=count) > 0).astype(float)
        w, b = logistic_regression(x, y, ridge=2.0)
        p = 1 / (1 + np.exp(-(x @ w + b)))
        np.testing.assert_allclose(x.T @ (p - y) + 2.0 * w, 0.0, atol=1e-6)


def test_naive_bayes_counts_rates_on_the_labels_by_hand() -> None:
    # Labels 1, 1, 0, 0; the vote is 1, 0, 0, 0. With two pseudo-votes: TPR = (1 + 1.4) / 4, TNR = (2 + 1.4) / 4.
    table = table_of([[1], [0], [0], [0], [1], [NAN]])
    labels = np.array([1, 1, 0, 0, NAN, NAN])
    fit = NaiveBayes(2.0).fit(table, labels)
    odds = (2.4 / 4) / (1 - 3.4 / 4)
    assert fit.tpr[0] == pytest.approx(0.6) and fit.tnr[0] == pytest.approx(0.85)
    assert fit.p_good[4] == pytest.approx(odds / (1 + odds)) and np.isnan(fit.p_good[5])


def test_the_best_single_verifier_is_found_even_if_it_is_best_at_being_wrong() -> None:
    votes, truth = votes_of(400, [(0.6, 0.6), (0.05, 0.05), (0.7, 0.7)], 0.5, seed=0)
    labels = np.where(np.arange(400) < 60, truth, NAN)
    fit = BestSingle().fit(table_of(votes), labels)
    assert fit.diagnostics["best"] == 1 and accuracy(fit.p_good, truth) > 0.9
    assert agreement(np.full(400, NAN), labels) == 0.0


# ---- Weaver -----------------------------------------------------------------------------------------------------


def test_percentiles_cut_at_the_fifth_and_ninety_fifth() -> None:
    ramp = np.arange(101.0)[:, None]
    scaled = percentiles(table_of(ramp, ("score",)))
    np.testing.assert_allclose(scaled[[0, 5, 50, 95, 100], 0], [0, 0, 0.5, 1, 1])


@pytest.mark.parametrize(
    ("balance", "kept"), [(0.5, [False, True, False]), (0.1, [True, True, False]), (0.9, [False, True, True])]
)
def test_the_filter_goes_by_how_often_a_verifier_says_yes(balance: float, kept: list[bool]) -> None:
    votes = np.zeros((100, 3))
    votes[:10, 0] = votes[:50, 1] = votes[:90, 2] = 1.0  # yes to 10%, 50%, 90%
    assert keep(votes, balance, None).tolist() == kept
    labels = np.full(100, NAN)
    labels[[0, 60]] = 0.0, 1.0  # the second verifier is wrong on both
    assert not keep(votes, 0.5, labels)[1]


def test_weaver_finds_the_good_ones_and_says_what_it_dropped() -> None:
    votes, truth = votes_of(5000, [*RATES, (1.0, 0.0)], 0.5, seed=4)
    combined = combine(table_of(votes), Ensemble(method="weaver", class_balance=0.5))
    assert combined.diagnostics["dropped"] == 1 and accuracy(combined.p_good, truth) > 0.88
    scarce = Weaver(0.5).fit(table_of(np.ones((40, 2))))
    assert any("filter leaves 0" in w for w in scarce.warnings)


def test_prompts_are_clustered_by_distinct_answers() -> None:
    prompts = np.repeat(np.arange(4), 3)
    answers = ("1", "1", "1", "2", "3", "2", "4", "5", "6", "7", "7", "")
    table = table_of(np.ones((12, 1)), prompts=prompts)
    import dataclasses

    with_answers = dataclasses.replace(table, answers=answers)
    clusters = distinct_answers(with_answers, 2)
    assert clusters.reshape(4, 3)[:, 0].tolist() == [0, 1, 1, 0]  # 1, 2, 3 and 1 distinct answers
    assert set(distinct_answers(table, 2)) == {0}
    votes, _ = votes_of(90, RATES, 0.5, seed=0)
    answers = tuple(str(i % 3 if i < 45 else 0) for i in range(90))
    big = dataclasses.replace(table_of(votes, prompts=np.repeat(np.arange(30), 3)), answers=answers)
    assert combine(big, Ensemble(method="weaver", clusters=2)).diagnostics["clusters"] == 2


def test_shrunk_logistic_regression_is_at_its_optimum_and_settles_on_sure_answers() -> None:
    rng = np.random.default_rng(0)
    for rows, width in ((30, 4), (6, 20)):
        design = rng.normal(size=(rows, width)) * 30.0  # whole Newton steps would jump to and fro
        targets = (rng.random(rows) < 0.5).astype(float)
        pull, start = rng.uniform(0.5, 4.0, width), rng.normal(size=width)
        found = shrunk_logistic(design, targets, pull, start)
        slope = design.T @ (sigmoid(design @ found) - targets) + pull * (found - start)
        assert np.abs(slope).max() < 1e-5


@dataclass(frozen=True)
class Standing:
    """An opinion that is what it is."""

    p_good: np.ndarray

    def fit(self, table: VerdictTable, labels: np.ndarray | None = None) -> Fit:
        assert labels is None, "the standing answer sees no label"
        return Fit(self.p_good, 0.5, np.full(2, 0.7), np.full(2, 0.7))


def test_the_standing_answer_is_kept_without_labels_and_mended_by_them() -> None:
    rng = np.random.default_rng(0)
    truth = (rng.random(2000) < 0.5).astype(float)
    votes = np.column_stack([np.where(rng.random(2000) < r, truth, 1 - truth) for r in (0.9, 0.6)])
    table, wrong = table_of(votes), np.where(votes[:, 1] == 1, 0.8, 0.2)  # follows the worse of the two
    model = Corrected(Standing(wrong))
    np.testing.assert_array_equal(model.fit(table).p_good, wrong)
    one_class = np.where(np.arange(2000) < 30, 1.0, NAN)
    np.testing.assert_array_equal(model.fit(table, one_class).p_good, wrong)
    right = []
    for count in (4, 40, 1000):
        p_good = model.fit(table, np.where(np.arange(2000) < count, truth, NAN)).p_good
        right.append(float(((p_good[1000:] > 0.5) == truth[1000:]).mean()))
    assert right[0] < 0.85 and right[2] == pytest.approx(0.9, abs=0.02) and right[0] <= right[1] <= right[2] + 0.01
    silent = replace(table, values=np.vstack([[NAN, NAN], votes[1:]]))
    assert np.isnan(Corrected(Standing(np.r_[NAN, wrong[1:]])).fit(silent, truth).p_good[0])


def test_a_correction_by_hand() -> None:
    # One verifier that says nothing new: slope s and offset o solve sum (q - y) x + 4 (s - 1) = 0 = sum (q - y) + 2 o.
    p, y = np.array([0.9, 0.9, 0.1, 0.1]), np.array([1.0, 0.0, 0.0, 0.0])
    found = Corrected(Standing(p)).fit(table_of(np.ones((4, 1))), y).p_good
    x = np.log(9.0) / (1 + (np.log(9.0) / 8) ** 4) ** 0.25 * np.array([1, 1, -1, -1])
    z = np.log(found / (1 - found))
    s, o = (z[0] - z[2]) / (x[0] - x[2]), (z[0] + z[2]) / 2
    assert abs((found - y) @ x + 4 * (s - 1)) < 0.01 and abs((found - y).sum() + 2 * o) < 0.01


# ---- every method on every bad table -------------------------------------------------------------------------------


def bad_tables() -> dict[str, VerdictTable]:
    rng = np.random.default_rng(0)
    votes, _ = votes_of(40, RATES[:4], 0.5, seed=0)
    silent = votes.copy()
    silent[5] = NAN
    constant, failing = votes.copy(), votes.copy()
    constant[:, 1], failing[:, 1] = 1.0, NAN
    mixed = np.column_stack([votes, rng.normal(size=(40, 2))])
    return {
        "all agree": table_of(np.repeat(votes[:, :1], 4, axis=1)),
        "all abstain on one": table_of(silent),
        "a constant verifier": table_of(constant),
        "a verifier that always fails": table_of(failing),
        "two verifiers": table_of(votes[:, :2]),
        "one verifier": table_of(votes[:, :1]),
        "one always wrong": table_of(np.column_stack([votes[:, :3], 1 - votes[:, 0]])),
        "votes and scores": table_of(mixed, ("binary",) * 4 + ("score",) * 2),
        "a constant score": table_of(np.column_stack([votes, np.ones(40)]), ("binary",) * 4 + ("score",)),
        "nobody speaks": table_of(np.full((6, 3), NAN)),
        "one response": table_of(votes[:1]),
        "all say yes": table_of(np.ones((20, 4))),
    }


@pytest.mark.parametrize("case", list(bad_tables()))
@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_every_method_answers_every_table_or_says_why_not(method: str, case: str) -> None:
    table = bad_tables()[case]
    for labels in (None, {"s0": True}, {f"s{i}": i % 2 == 0 for i in range(10)}):
        combined = combine(table, Ensemble(method=method), labels)  # type: ignore[arg-type]
        told = np.array([labels is not None and i in labels for i in table.ids])
        silent = np.isnan(table.values).all(axis=1)
        known = combined.p_good[~(silent & ~told)]
        assert np.isfinite(known).all() and ((known >= 0) & (known <= 1)).all()
        assert np.isnan(combined.p_good[silent & ~told]).all()
        assert combined.why and len(combined.estimates) == len(table.names)
        if labels is not None:
            assert all(combined.p_good[table.ids.index(i)] == float(v) for i, v in labels.items() if i in table.ids)
