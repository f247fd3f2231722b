"""Pairs: worked numbers, every stage that drops one, and what holds for any scores."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.ensemble.calibrate import PairProbability
from align.pairs import DROPPED, PairReport, build_pairs, make_pair
from align.recipe import Pairs
from align.records import Sample, Score


def sample(identity: str, prompt: str = "p", tokens: tuple[int, ...] | None = None) -> Sample:
    ids = tokens if tokens is not None else tuple(identity.encode())
    return Sample(identity, prompt, 0, 0, 0, (1,), ids, (-0.1,) * len(ids), "", "stop", 1.0, 1.0, 0, 8)


def score(identity: str, reward: float, prompt: str = "p") -> Score:
    return Score(identity, prompt, reward, reward, 0.0, 3)


def build(scores: list[Score], **settings: object) -> PairReport:
    return build_pairs(scores, {s.sample_id: sample(s.sample_id, s.prompt_id) for s in scores}, Pairs(**settings))


def names(report: PairReport) -> list[tuple[str, str]]:
    return [(p.chosen_id, p.rejected_id) for p in report.pairs]


def test_soft_labels_by_hand() -> None:
    # q = 0.9 against 0.2: win 0.9 * 0.8, loss 0.2 * 0.1, and the rest (both good 0.18, both bad 0.08) is a tie.
    pair = make_pair(score("a", 0.9), score("b", 0.2), Pairs())
    assert (pair.p_win, pair.p_tie, pair.weight) == pytest.approx((0.72, 0.26, 0.74))
    assert pair.label == pytest.approx(0.72 / 0.74) and pair.margin == pytest.approx(0.7)


def test_hard_labels_are_certain() -> None:
    pair = make_pair(score("a", 0.9), score("b", 0.2), Pairs(labels="hard"))
    assert (pair.p_win, pair.p_tie, pair.weight, pair.label) == (1.0, 0.0, 1.0, 1.0)


def test_calibrated_chances_by_hand() -> None:
    # Correlation 1/4: the covariance 0.25 sqrt(0.6 0.4 0.4 0.6) = 0.06 leaves win 0.36 and loss 0.16 and goes to ties.
    chances = PairProbability(0.25)
    pair = make_pair(score("a", 0.6), score("b", 0.4), Pairs(), chances)
    assert (pair.p_win, pair.p_tie, pair.weight) == pytest.approx((0.30, 0.60, 0.40))
    assert pair.label == pytest.approx(0.75) and pair.margin == pytest.approx(0.2)
    hard = make_pair(score("a", 0.6), score("b", 0.4), Pairs(labels="hard"), chances)
    assert (hard.p_win, hard.p_tie, hard.weight) == (1.0, 0.0, 1.0)
    scores = [score("a", 0.6), score("b", 0.4)]
    samples = {s.sample_id: sample(s.sample_id, s.prompt_id) for s in scores}
    kept = [build_pairs(scores, samples, Pairs(max_tie=0.55), c).counts["pairs"] for c in (PairProbability(), chances)]
    assert kept == [1, 0]  # a tie with 0.48 by the product rule, with 0.6 by what the labels say


def test_chances_without_labels_are_the_product_rule_to_the_last_bit() -> None:
    for better, worse in np.random.default_rng(0).random((1000, 2)).tolist():
        win, loss = better * (1.0 - worse), worse * (1.0 - better)
        assert PairProbability()(better, worse) == (win, max(0.0, 1.0 - win - loss), loss)


def test_best_against_worst_of_each_prompt() -> None:
    scores = [score("a", 0.5), score("b", 0.9), score("c", 0.1), score("x", 0.3, "q"), score("y", 0.6, "q")]
    assert names(build(scores)) == [("b", "c"), ("y", "x")]


def test_all_pairs_over_the_margin() -> None:
    scores = [score("a", 0.9), score("b", 0.5), score("c", 0.25)]
    report = build(scores, builder="all_margin", min_margin=0.25)
    assert names(report) == [("a", "c"), ("a", "b")]  # widest first; b against c is exactly at the margin
    assert report.counts["below_margin"] == 1 and report.counts["candidates"] == 3


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (1, {("a", "e")}),
        (2, {("a", "d"), ("a", "e"), ("b", "d"), ("b", "e")}),
        (9, {("a", "d"), ("a", "e"), ("b", "d"), ("b", "e")}),  # five responses: halves of two, the middle one sits out
    ],
)
def test_top_against_bottom_never_uses_a_response_on_both_sides(k: int, expected: set[tuple[str, str]]) -> None:
    scores = [score(name, reward) for name, reward in zip("abcde", (0.9, 0.8, 0.5, 0.2, 0.1), strict=True)]
    assert set(names(build(scores, builder="top_bottom", k=k))) == expected


def test_a_limit_keeps_the_widest() -> None:
    scores = [score("a", 0.9), score("b", 0.5), score("c", 0.1)]
    report = build(scores, builder="all_margin", max_per_prompt=2)
    assert names(report)[0] == ("a", "c") and len(report.pairs) == 2 and report.counts["over_limit"] == 1


def test_likely_ties_are_dropped() -> None:
    scores = [score("a", 0.99), score("b", 0.9)]  # tie 1 - 0.99 * 0.1 - 0.9 * 0.01 = 0.892
    assert build(scores, max_tie=0.85).counts["too_likely_tie"] == 1
    assert len(build(scores, max_tie=0.9).pairs) == 1
    assert build(scores, max_tie=0.85, labels="hard").counts["too_likely_tie"] == 1


def test_a_certain_tie_is_dropped_because_its_label_would_be_rounding_error() -> None:
    scores = [score("a", 1.0 - 1e-15), score("b", 1.0 - 3e-15)]
    assert build(scores).counts["too_likely_tie"] == 1
    assert len(build(scores, labels="hard").pairs) == 1


def test_equal_rewards_identical_responses_lone_and_unscored_ones_are_counted() -> None:
    samples = {
        "a": sample("a", "tie"), "b": sample("b", "tie"),
        "c": sample("c", "same", (5, 6)), "d": sample("d", "same", (5, 6)),
        "e": sample("e", "alone"), "f": sample("f", "alone"),
        "g": sample("g", "silent"), "h": sample("h", "silent"),
    }  # fmt: skip
    scores = [score("a", 0.5, "tie"), score("b", 0.5, "tie"), score("c", 0.9, "same"), score("d", 0.1, "same")]
    report = build_pairs([*scores, score("e", 0.5, "alone")], samples, Pairs())
    assert report.pairs == () and report.length_gap_tokens == 0.0
    assert report.counts == {
        "samples": 8, "unscored": 3, "prompts": 4, "single": 2, "candidates": 2, "ties": 1, "identical": 1,
        "below_margin": 0, "too_likely_tie": 0, "over_limit": 0, "pairs": 0,
    }  # fmt: skip
    said = report.explain()
    for part in (
        "0 pairs from 8 responses to 4 prompts",
        "3 responses had no score (too few verdicts, see ensemble.min_voters)",
        "2 prompts had fewer than two scored responses",
        "1 of 2 candidates had equal rewards",
        "1 of 2 candidates were two identical responses",
    ):
        assert part in said
    assert "margin" not in said


def test_the_length_gap_is_chosen_minus_rejected() -> None:
    samples = {"a": sample("a", tokens=(1,) * 9), "b": sample("b", tokens=(1,) * 4)}
    assert build_pairs([score("a", 0.2), score("b", 0.8)], samples, Pairs()).length_gap_tokens == -5.0


def test_ties_at_the_top_go_by_sample_id_and_not_by_position() -> None:
    scores = [score("n", 0.9), score("m", 0.9), score("z", 0.1), score("y", 0.1)]
    assert names(build(scores)) == names(build(scores[::-1])) == [("m", "z")]


@pytest.mark.parametrize(
    ("scores", "message"), [([score("x", 0.5)], "'x' belongs to no sample"), ([score("a", 0.5)] * 2, "two scores")]
)
def test_scores_that_fit_no_sample_are_refused(scores: list[Score], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_pairs(scores, {"a": sample("a")}, Pairs())


rewards = st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.8, 1.0]), min_size=0, max_size=7)
all_settings = st.fixed_dictionaries(
    {
        "builder": st.sampled_from(["best_worst", "all_margin", "top_bottom"]),
        "min_margin": st.sampled_from([0.0, 0.2]),
        "k": st.integers(1, 4),
        "max_per_prompt": st.sampled_from([None, 1, 3]),
        "max_tie": st.sampled_from([1.0, 0.5]),
        "labels": st.sampled_from(["soft", "hard"]),
    }
)


@given(st.lists(rewards, max_size=3), all_settings, st.randoms(use_true_random=False))
def test_whatever_the_scores(prompts: list[list[float]], settings: dict, shuffler: object) -> None:
    scores = [score(f"s{i}-{j}", r, f"p{i}") for i, group in enumerate(prompts) for j, r in enumerate(group)]
    report = build(scores, **settings)
    dropped = sum(report.counts[stage] for stage in DROPPED)
    assert report.counts["candidates"] == dropped + len(report.pairs) and report.counts["pairs"] == len(report.pairs)
    assert len({p.id for p in report.pairs}) == len(report.pairs)
    by_id = {s.sample_id: s for s in scores}
    for pair in report.pairs:
        chosen, rejected = by_id[pair.chosen_id], by_id[pair.rejected_id]
        assert chosen.prompt_id == rejected.prompt_id == pair.prompt_id
        assert chosen.reward > rejected.reward and pair.margin > settings["min_margin"]
        assert 0.5 <= pair.label <= 1.0 + 1e-12 and 0.0 < pair.weight <= 1.0
        assert pair.weight == pytest.approx(1.0 - pair.p_tie) and 0.0 <= pair.p_tie <= 1.0
    shuffler.shuffle(scores)  # type: ignore[attr-defined]
    assert build(scores, **settings).pairs == report.pairs


def test_best_against_worst_is_hardly_ever_reversed_but_often_a_tie() -> None:
    # With calibrated P(good), the labels are what happens: among 20000 drawn prompts the shares agree to a percent.
    rng = np.random.default_rng(0)
    q = rng.beta(0.5, 0.5, (20000, 4))
    good = rng.random(q.shape) < q
    best, worst = q.argmax(axis=1), q.argmin(axis=1)
    rows = np.arange(len(q))
    pairs = [
        make_pair(score("a", float(b)), score("b", float(w)), Pairs())
        for b, w in zip(q[rows, best], q[rows, worst], strict=True)
    ]
    win = (good[rows, best] & ~good[rows, worst]).mean()
    loss = (~good[rows, best] & good[rows, worst]).mean()
    assert np.mean([p.p_win for p in pairs]) == pytest.approx(win, abs=0.01)
    assert np.mean([p.p_tie for p in pairs]) == pytest.approx(1 - win - loss, abs=0.01)
    assert loss < 0.02 < 0.1 < 1 - win - loss
