"""The gate: what it licenses without labels, what labels make it pick, and what it warns of."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from align.ensemble.channels import Channel, channels
from align.ensemble.combine import combine
from align.ensemble.dawid_skene import DawidSkene
from align.ensemble.diagnostics import collapsed, effective_number, two_camps
from align.ensemble.gaussian import GaussianEM
from align.ensemble.jury import ballot, correlations, juror_weights, weighted_median
from align.ensemble.ladder import SURE_LOSS, Rung, _gains, pick
from align.ensemble.mean import Mean
from align.ensemble.prepare import determined, explained_variance, learning_sets, within_prompts, without
from align.ensemble.table import VerdictTable
from align.evaluation.report import accuracy, auc
from align.recipe import Ensemble

NAN = float("nan")


def table_of(values: object, kinds: tuple[str, ...] | None = None, prompts: np.ndarray | None = None) -> VerdictTable:
    array = np.array(values, dtype=float)
    n, m = array.shape
    ids = tuple(f"s{i}" for i in range(n))
    where = np.arange(n) if prompts is None else prompts
    return VerdictTable(array, tuple(f"v{j}" for j in range(m)), kinds or ("binary",) * m, ("",) * m, where, ids=ids)


def votes_of(truth: np.ndarray, rates: list[tuple[float, float]], rng: np.random.Generator) -> np.ndarray:
    yes = np.where(truth[:, None] == 1, [r[0] for r in rates], [1 - r[1] for r in rates])
    return (rng.random(yes.shape) < yes).astype(float)


def labels_of(table: VerdictTable, truth: np.ndarray, rows: np.ndarray) -> dict[str, bool]:
    return {table.ids[i]: bool(truth[i]) for i in rows.tolist()}


def scored(seed: int, block: int = 0, hostile: int = 0, prompts: int = 100) -> tuple[VerdictTable, np.ndarray]:
    """Sixteen responses a prompt, nine scores of which `block` share a factor and `hostile` are turned round."""
    rng = np.random.default_rng(seed)
    n = prompts * 16
    truth = (rng.random(n) < np.repeat(rng.beta(0.6, 0.8, prompts), 16)).astype(float)
    noise = rng.normal(size=(n, 9))
    noise[:, :block] = np.sqrt(0.4) * noise[:, :block] + np.sqrt(0.6) * rng.normal(size=(n, 1))
    scores = truth[:, None] * np.linspace(0.3, 1.6, 9) + noise
    scores[:, 9 - hostile :] *= -1
    return table_of(scores, ("score",) * 9, np.repeat(np.arange(prompts), 16)), truth


# ---- what is done to the table first ------------------------------------------------------------------------------


def test_a_count_of_the_votes_is_left_out_and_the_votes_stay() -> None:
    rng = np.random.default_rng(0)
    votes = (rng.random((400, 4)) < 0.4).astype(float)
    votes[rng.random(votes.shape) < 0.2] = NAN
    table = table_of(np.column_stack([votes, np.nansum(votes, axis=1)]), ("binary",) * 4 + ("score",))
    assert determined(table) == [4]
    assert without(table, [4]).names == ("v0", "v1", "v2", "v3")
    assert determined(table_of(votes)) == []
    combined = combine(table, Ensemble())
    assert any("v4 is determined by the other verifiers" in w for w in combined.warnings)
    assert len(combined.estimates) == 5


def test_two_good_voters_who_agree_are_not_determined() -> None:
    rng = np.random.default_rng(1)
    truth = (rng.random(600) < 0.5).astype(float)
    assert determined(table_of(votes_of(truth, [(0.98, 0.98)] * 4, rng))) == []


def test_rules_that_nearly_always_agree_are_not_what_the_classes_are_made_of() -> None:
    rng = np.random.default_rng(0)
    truth = (rng.random(1600) < 0.4).astype(float)
    slip = rng.random(1600) < 0.04
    rules = np.column_stack([(~slip | (rng.random(1600) < 0.3)) for _ in range(7)]).astype(float)
    table = table_of(np.hstack([votes_of(truth, [(0.8, 0.9), (0.7, 0.92), (0.5, 0.9)], rng), rules]))
    everything, balanced = learning_sets(channels(table), table.kinds)
    assert everything.all() and balanced.tolist() == [True] * 3 + [False] * 7
    plain = DawidSkene(2.0)._fit_once(table)
    careful = DawidSkene(2.0, careful=True)._fit_once(table)
    assert accuracy(plain.p_good, truth) < 0.5 < 0.85 < accuracy(careful.p_good, truth)


def test_explained_variance_by_hand() -> None:
    # D = 0.8 - 0.2 on levels 0 and 1, pi = 1/2: 1/4 x 0.36.
    channel = Channel(np.array([0, 1]), np.array([0.0, 1.0]), (0,))
    assert explained_variance([channel], [np.array([0.2, 0.8])], [np.array([0.8, 0.2])], 0.5) == pytest.approx(0.09)


def test_a_score_that_knows_only_the_prompt_is_not_listened_to() -> None:
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(200), 4)
    hard = rng.normal(size=200)[prompts]
    truth = (rng.random(800) < 1 / (1 + np.exp(2 * hard))).astype(float)
    length, check = -hard + 0.1 * rng.normal(size=800), truth + rng.normal(size=800)
    assert within_prompts(length, truth, prompts) == 0.0
    assert within_prompts(check, truth, prompts) > 0.8
    assert within_prompts(length[:40], truth[:40], prompts[:40]) == 1.0  # too few prompts to tell


def test_a_voter_that_only_says_one_thing_speaks_by_keeping_silent() -> None:
    votes = np.array([[1.0, 0.0], [NAN, 1.0], [1.0, NAN], [NAN, 0.0]])
    one_sided, other = channels(table_of(votes), silence=True)
    assert one_sided.codes.tolist() == [1, 0, 1, 0] and one_sided.levels.tolist() == [0.5, 1.0]
    assert other.codes.tolist() == [0, 1, -1, 0]
    assert channels(table_of(votes))[0].codes.tolist() == [1, -1, 1, -1]


# ---- the jury -----------------------------------------------------------------------------------------------------


def test_independent_verifiers_prefer_the_better_opinion_and_copies_have_one_voice() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=2000)
    outside = truth[:, None] + 2.0 * rng.normal(size=(2000, 3))
    copied = 0.2 * truth + rng.normal(size=2000)
    values = np.column_stack([outside, *[copied + 0.1 * rng.normal(size=2000) for _ in range(5)]])
    better, worse = truth + 0.5 * rng.normal(size=2000), copied
    np.testing.assert_allclose(juror_weights(values), [1, 1, 1, 0.2, 0.2, 0.2, 0.2, 0.2])
    vote = ballot(values, lambda j: worse, lambda j: better)
    assert vote.share == pytest.approx(0.75) and vote.gain > 0 and vote.jurors == pytest.approx(4.0)


def test_correlations_use_what_both_judged() -> None:
    values = np.array([[0.0, 0.0, 1.0], [1.0, 1.0, NAN]] * 10)
    assert correlations(values)[0, 1] == pytest.approx(1.0)
    assert correlations(values)[0, 2] == 0.0  # constant where both speak
    assert weighted_median(np.array([3.0, 1.0, 2.0]), np.array([1.0, 1.0, 5.0])) == 2.0


def test_effective_number_by_hand() -> None:
    assert effective_number(np.zeros((4, 4)), 1000) == pytest.approx(4.0)
    same = np.ones((4, 4))
    assert effective_number(same, 10**9) == pytest.approx(1.0)
    block = np.zeros((4, 4))
    block[:2, :2] = 1.0
    assert effective_number(block, 10**9) == pytest.approx(16 / 6)


# ---- without labels -----------------------------------------------------------------------------------------------


def test_votes_are_fitted_where_the_verifiers_bear_it_out() -> None:
    rng = np.random.default_rng(3)
    truth = (rng.random(150) < 0.45).astype(float)
    experts, novices = [(0.9, 0.92)] * 8, [(0.9, 0.35), (0.55, 0.5), (0.95, 0.2)] * 6
    table = table_of(votes_of(truth, experts + novices, rng))
    combined = combine(table, Ensemble())
    mean = combine(table, Ensemble(method="mean"))
    assert combined.method == "dawid_skene" and "borne out" in combined.why
    assert accuracy(combined.p_good, truth) > accuracy(mean.p_good, truth) + 0.1
    assert combined.diagnostics["balance_low"] < truth.mean() < combined.diagnostics["balance_high"]


def test_copies_of_one_verifier_do_not_outvote_the_rest() -> None:
    rng = np.random.default_rng(1)
    truth = (rng.random(500) < 0.5).astype(float)
    votes = votes_of(truth, [(0.72, 0.7), (0.75, 0.75), (0.8, 0.75), (0.78, 0.7), (0.7, 0.72), (0.74, 0.78)], rng)
    copies = [np.where(rng.random(500) < 0.08, 1 - votes[:, 0], votes[:, 0]) for _ in range(5)]
    combined = combine(table_of(np.column_stack([*copies, votes[:, 1:]])), Ensemble())
    assert combined.method == "mean" and "bear the mean out better" in combined.why


def test_scores_are_fitted_when_independent_and_averaged_when_they_share_a_factor() -> None:
    table, truth = scored(0)
    free = combine(table, Ensemble())
    assert free.method == "gaussian"
    ours, plain = auc(free.p_good, truth), auc(combine(table, Ensemble(method="mean")).p_good, truth)
    assert ours is not None and plain is not None and ours > plain
    shared, _ = scored(0, block=4)
    bound = combine(shared, Ensemble())
    assert bound.method == "mean" and bound.diagnostics["residual_dependence"] > 0.2
    np.testing.assert_array_equal(bound.p_good, combine(shared, Ensemble(method="mean")).p_good)


def test_without_labels_p_good_is_held_back_and_its_order_and_side_kept() -> None:
    table, _ = scored(1)
    combined = combine(table, Ensemble())
    from align.ensemble.gaussian import GaussianEM

    raw = GaussianEM().fit(table).p_good
    assert combined.method == "gaussian" and combined.p_good.max() < 1 / (1 + np.exp(-4.0)) + 1e-9
    assert ((raw > 0.5) == (combined.p_good > 0.5)).all()
    order = np.argsort(raw)
    assert (np.diff(combined.p_good[order]) >= -1e-12).all()


# ---- with labels --------------------------------------------------------------------------------------------------


def test_a_rung_must_surely_lead_the_standing_one() -> None:
    scores, even = {"corrected": 0.8, "logistic": 0.9, "mean": 0.7}, {"corrected": 0.0, "logistic": 1.4}
    assert pick(scores, {"corrected": 0.0, "logistic": 0.06, "mean": 0.01}, even) == "logistic"
    assert pick(scores, {"corrected": 0.0, "logistic": 0.07, "mean": 0.01}, even) == "corrected"
    assert pick(scores, {"corrected": 0.0, "logistic": 0.07, "mean": 0.01}, even, sure=1.0) == "logistic"


def test_probabilities_decide_where_ranks_do_not() -> None:
    scores = {"corrected": 0.97, "gaussian": 0.98, "naive_bayes": 0.96}
    errors = dict.fromkeys(scores, 0.01)
    assert pick(scores, errors, {"corrected": 0.0, "gaussian": 2.6, "naive_bayes": 3.0}) == "gaussian"  # ranks no worse
    assert pick(scores, errors, {"corrected": 0.0, "gaussian": 2.4, "naive_bayes": 3.0}) == "corrected"


def test_a_gain_in_log_loss_is_counted_in_prompts_and_only_of_likelihoods() -> None:
    ladder = {
        "corrected": Rung(Mean(2.0), learns=True, shrunk=True),
        "gaussian": Rung(GaussianEM(), learns=False),
        "mean": Rung(Mean(2.0), learns=False, likelihood=False),
    }
    labels, prompts = np.tile([0.0, 1.0], 30), np.repeat(np.arange(10), 6)
    unsure, sure = np.where(labels == 1, 0.6, 0.4), np.where(labels == 1, 0.95, 0.05)
    gains = _gains({"corrected": unsure, "gaussian": sure, "mean": sure}, ladder, labels, prompts)
    assert set(gains) == {"corrected", "gaussian"} and gains["corrected"] == 0.0 and gains["gaussian"] > 10
    one = np.where(prompts == 0, sure, unsure)  # all that is gained is gained on one prompt
    ladder["as_it_is"] = Rung(GaussianEM(), learns=False, shrunk=True)
    assert 0.0 < _gains({"corrected": unsure, "as_it_is": one}, ladder, labels, prompts)["as_it_is"] < SURE_LOSS
    assert _gains({"corrected": sure, "gaussian": unsure}, ladder, labels, prompts)["gaussian"] < 0


def test_a_few_labelled_prompts_mend_a_shared_error() -> None:
    table, truth = scored(0, block=4)
    rows = np.flatnonzero(table.prompts < 6)
    told = combine(table, Ensemble(), labels_of(table, truth, rows))
    assert told.method in ("anchored_gaussian", "logistic") and "held-out ranking" in told.why
    rest = np.setdiff1d(np.arange(len(truth)), rows)
    better, before = (auc(c.p_good[rest], truth[rest]) for c in (told, combine(table, Ensemble())))
    assert better is not None and before is not None and better > before + 0.01
    np.testing.assert_array_equal(told.p_good[rows], truth[rows])


def test_a_hostile_majority_is_said_without_labels_and_mended_with_them() -> None:
    table, truth = scored(2, hostile=6)
    alone = combine(table, Ensemble())
    assert (auc(alone.p_good, truth) or 1.0) < 0.5
    assert any(w.startswith(("two camps", "upside down")) for w in alone.warnings)
    rows = np.flatnonzero(table.prompts < 6)
    told = combine(table, Ensemble(), labels_of(table, truth, rows))
    assert (auc(told.p_good, truth) or 0.0) > 0.9
    assert any("upside down: without labels" in w for w in told.warnings)


def test_a_named_method_that_the_labels_contradict_is_warned_of() -> None:
    rng = np.random.default_rng(0)
    truth = (rng.random(200) < 0.5).astype(float)
    table = table_of(1 - votes_of(truth, [(0.9, 0.9)] * 5, rng))
    combined = combine(table, Ensemble(method="mean"), labels_of(table, truth, np.arange(30)))
    assert any("upside down: on the labels" in w for w in combined.warnings)


def test_labels_that_cannot_choose_are_said_and_still_believed() -> None:
    table, truth = scored(0)
    good = np.flatnonzero(truth == 1)[:12]
    one_class = combine(table, Ensemble(), labels_of(table, truth, good))
    assert "one class only" in one_class.why and (one_class.p_good[good] == 1.0).all()
    one = combine(table, Ensemble(), labels_of(table, truth, good[:1]))
    assert "cannot choose" in one.why and one.p_good[good[0]] == 1.0
    assert combine(table, Ensemble(), {"elsewhere": True}).why == combine(table, Ensemble()).why
    with pytest.raises(ValueError, match="no ids"):
        combine(replace(table, ids=()), Ensemble(), {"s0": True})


# ---- warnings -----------------------------------------------------------------------------------------------------


def test_a_collapse_is_said_unless_the_balance_explains_it() -> None:
    p = np.full(100, 0.9)
    assert collapsed(p, None)[0].startswith("collapse: 100.0% of the responses come out good")
    assert collapsed(p, 0.97) == () and collapsed(np.linspace(0, 1, 100), None) == ()
    assert collapsed(np.full(3, NAN), None) == ("no response has a verdict",)


def test_an_answer_against_the_mean_and_a_large_camp_are_said() -> None:
    mean = np.linspace(0.1, 0.9, 50)
    assert two_camps(["a"], 1 - mean[:, None], 1 - mean, mean)[0].startswith("upside down")
    one_against = np.column_stack([-mean, mean, mean, mean])
    assert two_camps(list("abcd"), one_against, mean, mean)[0].startswith("two camps: a contradict")
    assert two_camps(list("abcd"), np.abs(one_against), mean, mean) == ()


def test_a_class_balance_far_from_the_verdicts_is_said() -> None:
    table, _ = scored(0)
    assert any("class_balance is 0.95" in w for w in combine(table, Ensemble(class_balance=0.95)).warnings)
    assert not any("class_balance" in w for w in combine(table, Ensemble(class_balance=0.45)).warnings)
