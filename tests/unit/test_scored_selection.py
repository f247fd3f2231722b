"""What the trainers of groups and of wrong answers learn from in a round, and what they leave out and count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from align.recipe import Recipe
from align.recipe_negative import Negative
from align.records import Given, Sample, Score
from align.training.group import WITHOUT_Z, mismatches, usable, with_company, without_z
from align.training.losses.negative import d2o
from align.training.negative import Step, _look_at_entropy, _signed, _steps, against_given, against_worst, signs
from align.training.scored import ScoredRow, split_units
from align.training.trainers import RoundData

BLANK = Sample("", "", 0, 0, 0, (4, 5), (7, 1), (-0.1, -0.2), "", "stop", 1.0, 1.0, 0, 8)


def rows(prompt: str, chances: Sequence[float]) -> list[ScoredRow]:
    """Responses `a`, `b` … of a prompt with these P(good); the n-th has n tokens."""
    found = []
    for i, p in enumerate(chances):
        name = f"{prompt}{chr(97 + i)}"
        sample = replace(BLANK, id=name, prompt_id=prompt, prompt_ids=(ord(prompt[0]),), response_ids=(7,) * (i + 1))
        found.append(ScoredRow(sample, Score(name, prompt, p, p, 0.0, 3)))
    return found


def recipe(algorithm: str, **negative: Any) -> Recipe:
    block = {"preflight": {"mode": "off"}, **negative} if algorithm in ("nsr", "d2o", "unlikelihood") else negative
    return Recipe.model_validate(
        {
            "name": "test",
            "policy": {"model": "some/model"},
            "sampling": {"samples_per_prompt": 4},
            "prompts": {"source": "asked.jsonl"},
            "verifiers": [{"kind": "noise", "name": "coin"}],
            "training": {"algorithm": algorithm, "responses_per_step": 8, "negative": block},
        }
    )


# ---- groups ----------------------------------------------------------------------------------------------------------


def test_a_group_of_one_and_equal_groups_are_left_out_and_counted() -> None:
    groups = {"p": rows("p", [0.9, 0.2]), "q": rows("q", [0.5]), "r": rows("r", [0.4, 0.4, 0.4])}
    counts: Counter[str] = Counter()
    assert list(usable(groups, "lipo", counts)) == ["p"]
    assert counts == {"alone under their prompt": 1, "of equal P(good) throughout a prompt": 3}
    counts.clear()
    assert list(usable(groups, "gpo", counts)) == ["p", "r"] and counts == {"alone under their prompt": 1}
    assert list(usable(groups, "kto", Counter())) == ["p", "q", "r"]


def test_kto_s_mismatches_put_every_response_behind_another_prompt() -> None:
    """In a circle of prompts, by name; how a prompt's responses are cut into units changes nothing."""
    everything = [*rows("p", [0.9, 0.2]), *rows("q", [0.5]), *rows("r", [0.4, 0.1])]
    by_prompt = {p: [r for r in everything if r.sample.prompt_id == p] for p in "pqr"}
    units = [u for members in by_prompt.values() for u in split_units(members, lambda r: r.sample, 100)]
    cut = [u for members in by_prompt.values() for u in split_units(members, lambda r: r.sample, 1)]
    found = mismatches(units)
    assert list(found) == [("q", "pa"), ("q", "pb"), ("r", "qa"), ("p", "ra"), ("p", "rb")]
    assert found["q", "pb"] == ((ord("q"),), (7, 7))
    assert mismatches(list(reversed(cut))) == found
    assert mismatches(split_units(by_prompt["p"], lambda r: r.sample, 100)) == {}  # nobody else's prompt is there


def test_kto_s_last_prompt_is_not_left_alone() -> None:
    """Alone in a step it has no mismatched responses, and z would be 0 whatever the policy has become."""
    p, q, r = (split_units(rows(name, [0.9, 0.2]), lambda row: row.sample, 100) for name in "pqr")
    assert with_company([p + q, r]) == [p + q + r]
    assert with_company([p, q + r]) == [p, q + r]
    assert with_company([p]) == [p] and with_company([]) == []


def test_a_round_of_one_prompt_is_counted_as_having_no_z() -> None:
    p, q = (split_units(rows(name, [0.9, 0.2, 0.4]), lambda row: row.sample, 4) for name in "pq")
    assert len(p) > 1 and without_z(with_company([p])) == {WITHOUT_Z: 3}
    assert without_z(with_company([p + q])) == {} == without_z([])


# ---- wrong answers ---------------------------------------------------------------------------------------------------


def test_soft_rewards_become_signs_and_the_dead_zone_is_counted() -> None:
    groups = {"p": rows("p", [0.9, 0.6, 0.59, 0.3, 0.29]), "q": rows("q", [0.4])}
    counts: Counter[str] = Counter()
    found = signs(groups, Negative(right_from=0.6, wrong_below=0.3), counts)
    assert [(r.sample.id, r.sign) for r in found["p"]] == [("pa", 1), ("pb", 1), ("pe", -1)]
    assert "q" not in found and counts == {"between wrong_below and right_from": 3}
    middle = signs({"p": rows("p", [0.5])}, Negative(), counts)  # one half is right by default: nothing is undecided
    assert [r.sign for r in middle["p"]] == [1]


def test_d2o_sets_the_good_ones_against_the_worst() -> None:
    groups = {"p": rows("p", [0.9, 0.1, 0.7, 0.3, 0.8]), "q": rows("q", [0.9, 0.6]), "r": rows("r", [0.1, 0.2])}
    counts: Counter[str] = Counter()
    found = against_worst(groups, Negative(self_samples=2), counts)
    assert [(r.sample.id, r.sign) for r in found["p"]] == [("pa", 1), ("pc", 1), ("pb", -1)]
    assert list(found) == ["p"]
    assert counts == {
        "own samples below self_from": 2,  # pd and rb
        "own samples beyond self_samples": 1,  # pe
        "of a prompt without a wrong response": 2,
        "wrong responses without an own sample to stand against": 1,
    }
    unfiltered = against_worst({"r": groups["r"]}, Negative(self_from=0.0), Counter())
    assert [(r.sample.id, r.sign) for r in unfiltered["r"]] == [("rb", 1), ("ra", -1)]


def test_d2o_sets_the_good_ones_against_a_given_answer() -> None:
    """Of the given answer's copies none stands against it; the worst response has no part in it any more."""
    p = rows("p", [0.9, 0.1, 0.7, 0.8, 0.6])
    p[4] = replace(p[4], sample=replace(p[4].sample, text=" 580\n"))  # pe
    groups = {"p": p, "q": rows("q", [0.9, 0.6]), "r": rows("r", [0.1, 0.2])}
    given = {name: Given("580", (3, 4, 1)) for name in "pqr"}
    counts: Counter[str] = Counter()
    found = against_given(groups, given, Negative(self_samples=2), counts)
    names = {prompt: [(r.sample.id, r.sign) for r in members] for prompt, members in found.items()}
    assert names == {
        "p": [("pa", 1), ("pc", 1), ("dispreferred:p", -1)],
        "q": [("qa", 1), ("qb", 1), ("dispreferred:q", -1)],  # no response of q is wrong, and D2O learns all the same
    }
    wrong = found["p"][-1].sample
    assert (wrong.prompt_id, wrong.prompt_ids, wrong.response_ids) == ("p", (ord("p"),), (3, 4, 1))
    assert counts == {
        "own samples with the text of the dispreferred answer": 1,  # pe
        "own samples below self_from": 3,  # pb, ra and rb
        "own samples beyond self_samples": 1,  # pd
        "wrong responses without an own sample to stand against": 1,
    }


def test_the_recipe_decides_what_d2o_stands_against() -> None:
    """The column's name is what is read: without it the worst response, with it the given answers."""
    samples = {r.sample.id: r.sample for r in rows("p", [0.9, 0.1])}
    data = RoundData(0, samples=samples, dispreferred={"p": Given("580", (3, 1))})
    groups = {"p": rows("p", [0.9, 0.1])}
    for made, ids in (
        (recipe("d2o"), ["pa", "pb"]),
        (recipe("d2o", dispreferred_column="bad"), ["pa", "dispreferred:p"]),
        (recipe("nsr"), ["pa", "pb"]),
    ):
        assert [r.sample.id for r in _signed(groups, data, made, Counter())["p"]] == ids


def test_d2o_s_loss_against_a_given_answer_by_hand() -> None:
    """Log-ratios .5 and .3 of own samples and -1 of the answer, β .2 and α .1: -log σ(.08 + .1) = log(1 + e^-.18)."""
    found = against_given({"p": rows("p", [0.9, 0.8])}, {"p": Given("580", (3, 1))}, Negative(), Counter())["p"]
    ratios = {"pa": 0.5, "pb": 0.3, "dispreferred:p": -1.0}
    own = torch.tensor([sum(ratios[r.sample.id] for r in found if r.sign > 0) / 2])
    wrong = torch.tensor([sum(ratios[r.sample.id] for r in found if r.sign < 0)])
    assert d2o(own, wrong, beta=0.2, d2o_alpha=0.1).item() == pytest.approx(0.607192, abs=1e-6)


def plan(algorithm: str, **negative: Any) -> tuple[list[Step], Counter[str]]:
    """Two steps of two prompts: one prompt mixed, three all right."""
    groups = {"p": rows("p", [0.9, 0.1, 0.2]), **{name: rows(name, [0.9, 0.8]) for name in "qrs"}}
    counts: Counter[str] = Counter()
    made = recipe(algorithm, **negative)
    signed = signs(groups, made.training.negative, counts)
    return list(_steps(signed, made, "seed", counts)), counts


def test_only_wrong_responses_are_computed_and_a_step_without_one_is_passed_over() -> None:
    (step,), counts = plan("nsr")
    assert [row.sample.id for unit in step.units for row in unit.rows] == ["pb", "pc"]
    assert step.judged_tokens == 1 + 2 + 3 + 1 + 2  # the whole of p and of the prompt it shares the step with
    assert counts == {"right": 7, "steps with nothing to act on": 1}


def test_an_all_right_round_has_no_steps() -> None:
    made, counts = recipe("nsr"), Counter[str]()
    signed = signs({"q": rows("q", [0.9, 0.8])}, made.training.negative, counts)
    assert list(_steps(signed, made, "seed", counts)) == []
    assert counts == {"right": 2, "steps with nothing to act on": 1}


def test_the_other_losses_act_on_the_other_side_or_on_both() -> None:
    for algorithm, ids, options in (
        ("psr", 7, {}),
        ("w_reinforce", 9, {}),
        ("w_reinforce", 2, {"positive_weight": 0.0}),
        ("unlikelihood", 2, {}),
    ):
        steps, _ = plan(algorithm, **options)
        assert sum(len(unit.rows) for step in steps for unit in step.units) == ids, algorithm


def test_the_entropy_stop_compares_with_the_first_step_and_stays() -> None:
    made, state = recipe("nsr", entropy_stop=0.5), {}
    for step, entropy in enumerate((2.0, 1.5, 1.01)):
        _look_at_entropy(state, {"step": step + 1, "entropy": entropy}, made)
    assert state == {"first_entropy": 2.0}
    _look_at_entropy(state, {"step": 4, "entropy": 0.99}, made)
    assert state["stopped"].startswith("step 4: the entropy of a token is 0.9900 nats, below 0.5 of the 2.0000")
    never: dict[str, Any] = {"first_entropy": 2.0}
    _look_at_entropy(never, {"step": 4, "entropy": 0.0}, recipe("nsr"))  # no stop but where the recipe or d2o has one
    assert "stopped" not in never
    _look_at_entropy(never, {"step": 4, "entropy": 0.49}, recipe("d2o"))
    assert "below 0.25" in never["stopped"]
