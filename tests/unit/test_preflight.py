"""The look before negative-only training: the curve, the decision, and what training follows afterwards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from align.preflight import PassCurve, has_chance, pass_curve, report, settled, sizes
from align.recipe import Recipe
from align.recipe_negative import Preflight


def recipe(algorithm: str, sampling: dict[str, Any] | None = None, **training: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "policy": {"model": "some/model"},
            "sampling": sampling or {},
            "verifiers": [{"kind": "noise", "name": "coin"}],
            "training": {"algorithm": algorithm, **training},
        }
    )


def test_the_curve_by_hand() -> None:
    """Of four responses one prompt has one right, one has none and one has all: 1 - C(3, k) / C(4, k), 0 and 1."""
    judged, right = np.array([4.0, 4.0, 4.0]), np.array([1.0, 0.0, 4.0])
    curve = pass_curve(judged, right, [1, 2, 4, 8])
    assert curve.values == pytest.approx({1: 1.25 / 3, 2: 1.5 / 3, 4: 2 / 3})  # nobody has eight
    assert (curve.prompts, curve.left_out) == (3, 0)
    assert pass_curve(np.zeros(2), np.zeros(2), [1]) == PassCurve({}, 0, 2)
    assert pass_curve(np.zeros(0), np.zeros(0), [1]) == PassCurve({}, 0, 0)


def test_every_k_is_of_the_same_prompts() -> None:
    """Nineteen prompts have one right of four; the twentieth has one judged response, a right one.

    In pass@1 alone it would raise the mean from 1/4 to 1/4 + (1 - 1/4) / 20 and so take from the rise.
    """
    judged, right = np.array([4.0] * 19 + [1.0]), np.ones(20)
    curve = pass_curve(judged, right, [1, 2, 4])
    assert curve.values == pytest.approx({1: 0.25, 2: 0.5, 4: 1.0})
    assert (curve.prompts, curve.left_out) == (19, 1)


def test_a_k_that_few_prompts_reach_is_no_part_of_the_curve() -> None:
    """Eight of ten have four judged responses, below nine tenths; all have two, so all count, up to k=2."""
    judged, right = np.array([4.0] * 8 + [2.0] * 2), np.array([1.0] * 8 + [0.0] * 2)
    curve = pass_curve(judged, right, [1, 2, 4])
    assert curve.values == pytest.approx({1: 0.8 * 0.25, 2: 0.8 * 0.5})
    assert (curve.prompts, curve.left_out) == (10, 0)
    nine = pass_curve(np.array([4.0] * 9 + [2.0]), np.zeros(10), [1, 2, 4])
    assert list(nine.values) == [1, 2, 4] and nine.left_out == 1


def test_the_sizes_hold_powers_of_two_and_both_ends() -> None:
    assert sizes(Preflight()) == [1, 2, 4, 8, 16, 32, 64]
    assert sizes(Preflight(samples_per_prompt=12, rise_from=6)) == [1, 2, 4, 6, 8, 12]


@pytest.mark.parametrize(
    ("at_8", "at_64", "chance", "why"),
    [
        (0.80, 0.95, True, "has a chance"),
        (0.60, 0.85, False, "pass@64 is below 0.9"),
        (0.93, 0.93, False, "rises by 0.000 only"),
        (0.995, 0.995, True, "has a chance"),  # nothing is left to rise to
    ],
)
def test_the_decision(at_8: float, at_64: float, chance: bool, why: str) -> None:
    found, told = has_chance({1: 0.3, 8: at_8, 64: at_64}, Preflight())
    assert found is chance and why in told


def test_too_few_judged_responses_are_no_chance() -> None:
    assert has_chance({}, Preflight()) == (False, "too few responses were judged to say anything")
    assert not has_chance({1: 1.0, 4: 1.0}, Preflight())[0]  # never as many as 8 judged


def test_the_report_says_what_is_done() -> None:
    low, high = {1: 0.1, 8: 0.3, 64: 0.5}, {1: 0.5, 8: 0.9, 64: 0.97}
    for curve, mode, decision, trains in (
        (low, "refuse", "refuse", None),
        (low, "fallback", "fallback", "w_reinforce"),
        (high, "fallback", "go", "nsr"),
    ):
        told = report("nsr", "gold", PassCurve(curve, 200, 0), Preflight(mode=mode))  # type: ignore[arg-type]
        assert (told["decision"], told["trains_with"]) == (decision, trains)
        assert f"pass@64 {curve[64]:.3f} on 200 held-out prompts by gold" in told["explain"]


def test_the_report_says_what_the_curve_leaves_out() -> None:
    told = report("nsr", "gold", PassCurve({1: 0.5, 8: 0.9, 32: 0.97}, 190, 10), Preflight())
    assert (told["prompts"], told["prompts_left_out"], told["chance"]) == (190, 10, True)
    assert "pass@32 0.970 on 190 held-out prompts (10 of 200 have fewer than 32 judged responses)" in told["explain"]
    assert "no further than k=32 for want of judged responses" in told["explain"]
    none = report("nsr", "gold", PassCurve({}, 0, 200), Preflight())
    assert none["explain"].startswith("fewer than 90% of 200 held-out prompts have a judged response by gold; too few")


def test_the_fallback_trains_with_w_reinforce_and_its_settings() -> None:
    given = recipe(
        "d2o", loss={"beta": 0.5}, negative={"positive_weight": 0.2, "preflight": {"mode": "fallback"}, "form": "ratio"}
    )
    found = settled(given, {"decision": "fallback"})
    assert found.training.algorithm == "w_reinforce" and found.training.loss_facts.name == "w_reinforce"
    assert found.training.negative.positive_weight == 0.2
    assert found.training.learning_rate == given.training.learning_rate
    for other in (None, {"decision": "go"}):
        assert settled(given, other) is given


# ---- what the recipe refuses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "settings", "key"),
    [
        ("nsr", {"negative": {"self_samples": 3}}, "training.negative.self_samples"),
        ("nsr", {"negative": {"positive_weight": 0.3}}, "training.negative.positive_weight"),
        ("psr", {"negative": {"preflight": {"mode": "off"}}}, "training.negative.preflight"),
        ("d2o", {"negative": {"entropy_bonus": 0.1}}, "training.negative.entropy_bonus"),
        ("unlikelihood", {"negative": {"form": "probability"}}, "training.negative.form"),
        ("nsr", {"negative": {"wrong_below": 0.7}}, "training.negative.wrong_below"),
        ("nsr", {"negative": {"form": "probability", "clip": 0.1}}, "training.negative.clip"),
        ("nsr", {"reference": "round"}, "training.reference"),
        ("nsr", {"loss": {"beta": 0.3}}, "training.loss.beta"),
        ("nsr", {"loss": {"name": "psr"}}, "training.loss.name"),
        ("nsr", {"negative": {"preflight": {"mode": "off", "prompts": 9}}}, "training.negative.preflight.prompts"),
        ("nsr", {"negative": {"preflight": {"judge": "gold"}}}, "training.negative.preflight.judge"),
        ("nsr", {"negative": {"preflight": {"samples_per_prompt": 8}}}, "training.negative.preflight.rise_from"),
        (
            "nsr",
            {"negative": {"positive_weight": 0.0, "preflight": {"mode": "fallback"}}},
            "training.negative.positive_weight",
        ),
        ("dpo", {"negative": {"clip": 0.1}}, "training.negative"),
        ("group", {"loss": {"name": "gpo"}}, "training.reference"),
        ("group", {"loss": {"name": "kto"}, "responses_per_step": 8}, "training.responses_per_step"),
        ("group", {"loss": {"name": "lipo", "rank_skip": 2}}, "training.loss.rank_skip"),
        ("group", {"loss": {"name": "kto", "rank_margin": 1.0}}, "training.loss.rank_margin"),
        (
            "group",
            {"loss": {"name": "kto", "desirable_weight": 0, "undesirable_weight": 0}},
            "training.loss.desirable_weight",
        ),
        ("group", {"loss": {"name": "kto"}, "reference": "none"}, "training.reference"),
        ("group", {"pairs_per_step": 8}, "training.pairs_per_step"),
    ],
)
def test_what_would_not_be_read_or_cannot_be_is_refused_by_key(
    algorithm: str, settings: dict[str, Any], key: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        recipe(algorithm, **settings)
    lines = refused.value.errors()[0]["msg"].removeprefix("Value error, ").splitlines()
    assert [line.split(": ")[0] for line in lines] == [key]


def test_kto_of_one_prompt_a_round_is_refused() -> None:
    given = recipe("group", loss={"name": "kto"}).model_dump()
    given["rounds"]["prompts_per_round"] = 1
    with pytest.raises(ValidationError, match="rounds.prompts_per_round: kto compares .* apo_zero_unpaired"):
        Recipe.model_validate(given)
    given["training"]["loss"]["name"] = "apo_zero_unpaired"
    assert Recipe.model_validate(given).rounds.prompts_per_round == 1


@pytest.mark.parametrize("algorithm", ["nsr", "psr", "w_reinforce"])
def test_samples_of_another_distribution_are_refused(algorithm: str) -> None:
    with pytest.raises(ValidationError, match="sampling.top_p: "):
        recipe(algorithm, sampling={"top_p": 0.9})


def test_a_fallback_may_have_its_own_settings_and_needs_own_samples() -> None:
    fallback = {"positive_weight": 0.3, "preflight": {"mode": "fallback"}}
    assert recipe("nsr", negative=fallback).training.negative.positive_weight == 0.3
    assert recipe("d2o", sampling={"top_p": 0.9}).sampling.top_p == 0.9
    with pytest.raises(ValidationError, match="sampling.top_p: "):
        recipe("d2o", sampling={"top_p": 0.9}, negative=fallback)


def test_a_gold_verifier_that_gives_scores_cannot_count_right_answers() -> None:
    given = recipe("nsr", negative={"preflight": {"judge": "ensemble"}}).model_dump()
    given["training"]["negative"]["preflight"]["judge"] = "gold"
    given["evaluation"]["gold"] = {"kind": "repetition", "name": "loops"}
    with pytest.raises(ValidationError, match="preflight.judge: pass@k counts right answers, and loops gives scores"):
        Recipe.model_validate(given)
