"""Mean, majority, and the choice between the label models."""

from __future__ import annotations

import numpy as np
import pytest

from align.ensemble.base import match_balance, shrink, weighted_rates
from align.ensemble.combine import BY_AGREEMENT, METHODS, combine, to_scores
from align.ensemble.prepare import pooled
from align.ensemble.table import VerdictTable
from align.recipe import Ensemble
from align.records import Sample

NAN = float("nan")


def table_of(
    values: object, kinds: tuple[str, ...] | None = None, families: tuple[str, ...] | None = None
) -> VerdictTable:
    array = np.array(values, dtype=float)
    m = array.shape[1]
    names = tuple(f"v{j}" for j in range(m))
    return VerdictTable(array, names, kinds or ("binary",) * m, families or ("",) * m, np.zeros(len(array), int))


def test_the_mean_is_shrunk_by_voters_that_say_one_half() -> None:
    combined = combine(table_of([[1, 1, 0], [1, NAN, NAN], [NAN, NAN, NAN]]), Ensemble(method="mean"))
    np.testing.assert_allclose(combined.p_good, [(2 + 1) / 5, (1 + 1) / 3, NAN])
    np.testing.assert_array_equal(combined.reward, combined.p_good)
    np.testing.assert_allclose(combined.spread, [np.sqrt(2) / 3, 0, NAN])
    assert combined.voters.tolist() == [3, 1, 0]


def test_few_voters_are_less_sure_than_many() -> None:
    np.testing.assert_allclose(shrink(np.array([1.0, 1.0, 0.0]), np.array([1, 8, 8]), 2.0), [2 / 3, 0.9, 0.1])


def test_majority_counts_votes_and_a_tie_is_one_half() -> None:
    settings = Ensemble(method="majority", prior_strength=0.0)
    combined = combine(table_of([[1, 1, 0, 1], [1, 0, NAN, NAN], [0, 0, 1, 0]]), settings)
    np.testing.assert_allclose(combined.p_good, [0.75, 0.5, 0.25])


def test_a_score_votes_in_the_majority_by_its_median() -> None:
    table = table_of([[1, 9.0], [1, 1.0], [0, 5.0], [0, 7.0]], ("binary", "score"))
    combined = combine(table, Ensemble(method="majority", prior_strength=0.0))
    np.testing.assert_allclose(combined.p_good, [1, 0.5, 0, 0.5])


@pytest.mark.parametrize("balance", [0.1, 0.5, 0.9])
def test_a_known_class_balance_is_the_mean_of_p_good_and_keeps_the_order(balance: float) -> None:
    p = np.array([0.2, 0.4, 0.41, 0.9, NAN])
    moved = match_balance(p, balance)
    assert np.nanmean(moved) == pytest.approx(balance, abs=1e-9)
    assert (np.diff(moved[:4]) > 0).all() and np.isnan(moved[4])
    log_odds = np.log(moved[:4] / (1 - moved[:4])) - np.log(p[:4] / (1 - p[:4]))
    np.testing.assert_allclose(log_odds, log_odds[0])


def test_the_recipe_s_class_balance_reaches_mean_and_majority() -> None:
    rng = np.random.default_rng(0)
    table = table_of(rng.integers(0, 2, (200, 4)))
    for method in ("mean", "majority"):
        combined = combine(table, Ensemble(method=method, class_balance=0.2))
        assert combined.p_good.mean() == pytest.approx(0.2, abs=1e-6)
        assert combined.class_balance == pytest.approx(0.2, abs=1e-6)


def test_rates_weigh_each_response_by_how_good_it_is() -> None:
    votes = np.array([[1.0], [0.0], [1.0], [NAN]])
    tpr, tnr = weighted_rates(votes, np.array([0.9, 0.5, 0.1, 0.5]), pseudo=0.0, tilt=0.5)
    assert tpr == pytest.approx([(0.9 + 0.1) / 1.5]) and tnr == pytest.approx([0.5 / 1.5])


def test_a_silent_verifier_is_thought_a_little_better_than_chance() -> None:
    tpr, tnr = weighted_rates(np.array([[NAN]]), np.array([0.5]), pseudo=2.0, tilt=0.7)
    assert tpr == pytest.approx([0.7]) and tnr == pytest.approx([0.7])


def test_estimates_say_coverage_positive_rate_and_why_a_verdict_is_missing() -> None:
    table = VerdictTable(
        np.array([[1, 1], [1, NAN], [0, 0], [NAN, NAN]], dtype=float),
        ("a", "b"), ("binary", "binary"), ("", ""), np.zeros(4, int), ({"timed out": 1}, {"no number": 2}),
    )  # fmt: skip
    first, second = combine(table, Ensemble(method="mean")).estimates
    assert (first.name, first.coverage, first.failures) == ("a", 0.75, {"timed out": 1})
    assert first.positive_rate == pytest.approx(2 / 3) and second.positive_rate == pytest.approx(0.5)
    assert first.accuracy == pytest.approx(first.tpr * 0.5 + first.tnr * 0.5, abs=0.1)


def test_auto_is_the_mean_and_says_why() -> None:
    table = table_of([[1, 0], [1, 1]])
    auto, mean = combine(table, Ensemble()), combine(table, Ensemble(method="mean"))
    np.testing.assert_array_equal(auto.p_good, mean.p_good)
    assert auto.method == "mean" and "auto" in auto.why


# ---- families ------------------------------------------------------------------------------------------------------


def test_a_family_is_one_voter_of_the_mean_and_the_majority_counts_heads() -> None:
    table = table_of([[1, 0, 0, 0], [1, 0, 0, 1], [NAN, NAN, NAN, 1]], families=("", "f", "f", "f"))
    mean = combine(table, Ensemble(method="mean"))
    np.testing.assert_allclose(mean.p_good, [2 / 4, (1 + 1 / 3 + 1) / 4, 2 / 3])
    assert len(mean.estimates) == 4
    majority = combine(table, Ensemble(method="majority", prior_strength=0.0))
    np.testing.assert_allclose(majority.p_good, [1 / 4, 2 / 4, 1])


def test_a_pooled_family_of_votes_says_what_most_of_it_says_and_one_of_scores_its_mean() -> None:
    values = [[1, 1, 0, 1, 2.0, 8.0], [0, 1, 0, NAN, 4.0, NAN], [NAN, 0, 1, NAN, NAN, NAN]]
    table = table_of(values, ("binary",) * 4 + ("score",) * 2, ("", "f", "f", "f", "g", "g"))
    found = pooled(table)
    assert found.names == ("v0", "v1", "v4") and found.kinds == ("binary", "binary", "score")
    np.testing.assert_allclose(found.values, [[1, 1, 3 / 8], [0, NAN, 3 / 4], [NAN, NAN, NAN]])
    assert pooled(found) is found


@pytest.mark.parametrize("method", ["auto", "mean", "moments", "matched_moments", "triplets", "gaussian"])
@pytest.mark.parametrize("kind", ["binary", "score"])
def test_one_judge_under_five_prompts_does_not_outvote_the_rest(method: str, kind: str) -> None:
    rng = np.random.default_rng(1)
    good = rng.random(600) < 0.5
    opinions = [good * 2.0, good * 1.8, good * 1.6, *[2.0 * rng.normal(size=600)] * 5]
    spread = [1.0] * 3 + [0.3] * 5
    said = np.column_stack([o - o.mean() + s * rng.normal(size=600) for o, s in zip(opinions, spread, strict=True)])
    said = (said > 0).astype(float) if kind == "binary" else said
    apart = table_of(said, (kind,) * 8)
    one = table_of(said, (kind,) * 8, ("", "", "", *["judge"] * 5))
    right = [((combine(t, Ensemble(method=method)).p_good > 0.5) == good).mean() for t in (apart, one)]
    assert right[0] < 0.66 and right[1] > 0.78
    assert len(combine(one, Ensemble(method=method)).estimates) == 8


# ---- too few verifiers, no labels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", BY_AGREEMENT)
def test_two_verifiers_cannot_judge_each_other(method: str) -> None:
    votes = np.random.default_rng(0).integers(0, 2, (50, 2)).astype(float)
    combined = combine(table_of(votes), Ensemble(method=method))
    assert combined.method == "mean" and "2 did: the mean is used" in combined.why
    assert combined.why in combined.warnings


@pytest.mark.parametrize("method", ["naive_bayes", "logistic", "best_single"])
def test_what_learns_from_labels_says_that_there_are_none(method: str) -> None:
    votes = np.random.default_rng(0).integers(0, 2, (50, 3)).astype(float)
    combined = combine(table_of(votes), Ensemble(method=method))
    assert any("needs labels of both classes" in warning for warning in combined.warnings)
    assert ((combined.p_good > 0.5) == (votes.mean(axis=1) > 0.5)).all()  # nobody leads


def test_two_verifiers_are_too_few_for_dawid_skene() -> None:
    rng = np.random.default_rng(0)
    votes = rng.integers(0, 2, (50, 4)).astype(float)
    votes[:, 3] = NAN
    combined = combine(table_of(votes, families=("f", "f", "", "")), Ensemble(method="dawid_skene"))
    assert combined.method == "mean" and "2 did" in combined.why
    assert combined.why in combined.warnings
    assert any("v3 gave no verdict" in warning for warning in combined.warnings)


def test_a_constant_verifier_is_named() -> None:
    votes = np.random.default_rng(0).integers(0, 2, (300, 2)).astype(float)
    votes[:, 1] = 1.0
    warnings = combine(table_of(votes), Ensemble(method="mean")).warnings
    assert len(warnings) == 1 and warnings[0].startswith("v1 said the same of 100.0%")


def test_every_method_of_the_recipe_has_a_model() -> None:
    named = Ensemble.model_json_schema()["properties"]["method"]["enum"]
    assert set(METHODS) == set(named) - {"auto"}


def test_responses_with_too_few_voters_get_no_score() -> None:
    combined = combine(table_of([[1, 1], [1, NAN], [NAN, NAN]]), Ensemble(method="mean"))
    samples = [
        Sample(f"s{i}", "p", i, 0, 0, (1,), (2,), (-0.1,), "", "stop", 1.0, 1.0, 0, 8) for i in range(3)
    ]  # fmt: skip
    scores, counts = to_scores(samples, combined, min_voters=1)
    assert [s.sample_id for s in scores] == ["s0", "s1"] and counts == {"scored": 2, "too_few_voters": 1}
    assert scores[0].p_good == 0.75 and scores[0].voters == 2
    assert to_scores(samples, combined, min_voters=2)[1] == {"scored": 1, "too_few_voters": 2}
    with pytest.raises(ValueError, match="2 samples but 3"):
        to_scores(samples[:2], combined, 1)
