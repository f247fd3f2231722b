"""Answers that are upside down on a part only, and inputs that no ensemble can do much with."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from align.ensemble.combine import combine, to_scores
from align.ensemble.strata import _at_least, _ranking, upside_down_in_part
from align.pairs import build_pairs
from align.recipe import Ensemble, Pairs
from align.records import Sample
from tests.unit.test_ensemble_gate import labels_of, scored, table_of, votes_of

NAN = float("nan")
RATES = [(0.8, 0.8)] * 6


def hard_prompts(seed: int, hard: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Votes of seven verifiers, the truth and the prompts: right .85, but .25 on a share `hard` of 100 prompts."""
    rng = np.random.default_rng(seed)
    prompts = np.repeat(np.arange(100), 8)
    truth = (rng.random(800) < 0.5).astype(float)
    right = np.where((rng.random(100) < hard)[prompts], 0.25, 0.85)
    votes = np.where(rng.random((800, 7)) < right[:, None], truth[:, None], 1 - truth[:, None])
    return votes, truth, prompts


# ---- upside down on a part ----------------------------------------------------------------------------------------


def test_the_chance_of_so_many_reversed_prompts_by_hand() -> None:
    assert _at_least(1, 2, 0.05) == pytest.approx(1 - 0.95**2)
    assert _at_least(2, 2, 0.05) == pytest.approx(0.0025) and _at_least(0, 5, 0.05) == pytest.approx(1.0)


def test_a_ranking_counts_prompts_and_not_responses() -> None:
    p, y = np.array([0.9, 0.1, 0.8, 0.2, 0.7, 0.3, 0.6, 0.4]), np.array([0, 1, 0, 1, 0, 1, 0, 1])
    wins, error = _ranking(p, y, np.arange(8))
    assert wins == 0.0 and error == pytest.approx((9 / (12 * 16)) ** 0.5)
    assert _ranking(p, y, np.zeros(8, dtype=int)) == (0.5, np.inf)  # one prompt says nothing of the next


@pytest.mark.parametrize(("reversed_prompts", "said"), [(0, False), (2, False), (3, True), (12, True)])
def test_prompts_that_are_ranked_the_wrong_way_round_are_said(reversed_prompts: int, said: bool) -> None:
    prompts, truth = np.repeat(np.arange(12), 8), np.tile([1.0, 0.0], 48)
    p = np.where(prompts < reversed_prompts, 1 - truth, truth) * 0.8 + np.tile(np.linspace(0.0, 0.1, 8), 12)
    warned = upside_down_in_part(p, truth, prompts, np.tile(truth[:, None], 3))
    assert any(f"on {reversed_prompts} of 12 labelled prompts" in w for w in warned) == said


def test_a_part_by_how_far_the_verifiers_disagree() -> None:
    truth = np.tile([1.0, 0.0], 50)
    values = np.repeat(truth[:, None], 4, axis=1)
    values[80:, :2] = 1 - values[80:, :2]
    p = np.where(np.arange(100) < 80, truth, 1 - truth) * 0.8 + 0.1
    warned = upside_down_in_part(p, truth, np.arange(100), values)
    assert "of the 20 labelled responses with a spread of verdicts of 0.50 to 0.50" in warned[0]
    assert len(warned) == 2 and "a mean verdict on the prompt of 0.50 to 0.50" in warned[1]
    assert upside_down_in_part(p, np.full(100, NAN), np.arange(100), values) == ()
    assert upside_down_in_part(truth, truth, np.arange(100), values) == ()


@pytest.mark.parametrize("method", ["auto", "majority"])
def test_verifiers_that_fail_on_hard_prompts_are_found_by_labels_and_by_nothing_else(method: str) -> None:
    votes, truth, prompts = hard_prompts(3, hard=0.3)
    table = table_of(votes, prompts=prompts)
    alone = combine(table, Ensemble(method=method))  # type: ignore[arg-type]
    assert not any("in part" in w for w in alone.warnings)
    told = combine(table, Ensemble(method=method), labels_of(table, truth, np.flatnonzero(prompts < 30)))  # type: ignore[arg-type]
    assert any(w.startswith("upside down in part") for w in told.warnings)
    clean, truth, prompts = hard_prompts(3, hard=0.0)
    table = table_of(clean, prompts=prompts)
    told = combine(table, Ensemble(method=method), labels_of(table, truth, np.flatnonzero(prompts < 30)))  # type: ignore[arg-type]
    assert not any("in part" in w for w in told.warnings)


# ---- inputs that no ensemble can do much with: each is data with a sentence ------------------------------------------


def judged(count: int = 80) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    truth = (rng.random(count) < 0.5).astype(float)
    return votes_of(truth, RATES, rng), truth


def samples_of(count: int, per_prompt: int) -> list[Sample]:
    return [
        Sample(f"s{i}", f"p{i // per_prompt}", 0, 0, 0, (1,), (i,), (-0.1,), "", "stop", 1.0, 1.0, 0, 8)
        for i in range(count)
    ]


def test_a_prompt_on_which_all_abstain_costs_itself_only_and_is_counted() -> None:
    votes, _ = judged()
    votes[8:12] = NAN  # the third prompt of four responses
    table = table_of(votes, prompts=np.repeat(np.arange(20), 4))
    combined = combine(table, Ensemble())
    samples = samples_of(80, 4)
    scores, counts = to_scores(samples, combined, min_voters=1)
    assert counts == {"scored": 76, "too_few_voters": 4} and np.isnan(combined.p_good[8:12]).all()
    report = build_pairs(scores, {s.id: s for s in samples}, Pairs())
    assert report.counts["unscored"] == 4 and report.counts["single"] == 1
    assert "4 responses had no score" in report.explain()
    assert Counter(p.prompt_id for p in report.pairs)["p2"] == 0


@pytest.mark.parametrize("labelled", [False, True])
def test_all_abstaining_on_everything_is_said_and_only_labels_remain(labelled: bool) -> None:
    table = table_of(np.full((40, 3), NAN), prompts=np.repeat(np.arange(10), 4))
    labels = {f"s{i}": i % 2 == 0 for i in range(12)} if labelled else None
    combined = combine(table, Ensemble(), labels)
    assert all(f"v{j} gave no verdict at all" in combined.warnings for j in range(3))
    assert np.isnan(combined.p_good[12:]).all()
    if labelled:
        assert combined.p_good[:12].tolist() == [1.0, 0.0] * 6
        assert any("no rung tells good from bad" in w for w in combined.warnings)
    else:
        assert "no response has a verdict" in combined.warnings


def test_a_constant_and_a_failing_verifier_are_named_and_change_nothing() -> None:
    votes, truth = judged(400)
    plain = combine(table_of(votes), Ensemble())
    for extra, said in ((np.ones(400), "v6 said the same of 100.0%"), (np.full(400, NAN), "v6 gave no verdict at all")):
        combined = combine(table_of(np.column_stack([votes, extra])), Ensemble())
        assert any(w.startswith(said) for w in combined.warnings)
        assert np.corrcoef(combined.p_good, plain.p_good)[0, 1] > 0.99
        assert ((combined.p_good > 0.5) == (plain.p_good > 0.5)).mean() > 0.98


@pytest.mark.parametrize("width", [1, 2])
def test_one_or_two_verifiers_cannot_judge_each_other(width: int) -> None:
    votes, truth = judged()
    table = table_of(votes[:, :width])
    combined = combine(table, Ensemble())
    assert combined.method == "mean" and f"{width} verifiers or families speak" in combined.why
    told = combine(table, Ensemble(), labels_of(table, truth, np.arange(20)))
    assert (told.p_good[20:] > 0.5).tolist() == (votes[20:, 0] > 0.5).tolist() or width == 2
    assert ((told.p_good[20:] > 0.5) == truth[20:]).mean() > 0.7


@pytest.mark.parametrize("kind", [True, False])
def test_labels_of_one_class_are_believed_and_choose_nothing(kind: bool) -> None:
    votes, truth = judged()
    table = table_of(votes)
    rows = np.flatnonzero(truth == float(kind))[:15]
    told, alone = combine(table, Ensemble(), labels_of(table, truth, rows)), combine(table, Ensemble())
    assert told.method == alone.method and "labels of one class only" in told.why
    assert (told.p_good[rows] == float(kind)).all() and told.pairs.correlation == 0.0


def test_a_score_that_is_no_number_is_refused_or_a_silence() -> None:
    table, truth = scored(0)
    values = table.values.copy()
    values[3, 2] = np.inf
    with pytest.raises(ValueError, match="'v2' gave an infinite value"):
        replace(table, values=values)
    values[3, 2] = NAN
    combined = combine(replace(table, values=values), Ensemble())
    assert combined.voters[3] == 8 and np.isfinite(combined.p_good).all()
    assert np.corrcoef(combined.p_good, combine(table, Ensemble()).p_good)[0, 1] > 0.999


@pytest.mark.parametrize("balance", [0.02, 0.98])
def test_a_wrong_class_balance_is_said_and_keeps_the_order(balance: float) -> None:
    table, truth = scored(0)
    right, wrong = combine(table, Ensemble()), combine(table, Ensemble(class_balance=balance))
    assert any(w.startswith(f"class_balance is {balance:.2f}") for w in wrong.warnings)
    chosen = [c.p_good.reshape(-1, 16).argmax(axis=1) for c in (right, wrong)]
    picked = [truth.reshape(-1, 16)[np.arange(100), c].mean() for c in chosen]
    assert abs(picked[0] - picked[1]) < 0.06
