"""Groups and wrong answers under DeepSpeed in real processes: every loss learns, and neither ranks, stages, budgets nor
a restart change what it learns over whole rounds.  All jobs run in three launches.

The gradient of a single step is compared in test_layout.py.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from align.recipe import Scratch
from align.training.scratch import create_model
from tests.e2e.jobs import launch_by_job
from tests.e2e.scored_job import responses

OFF = {"preflight": {"mode": "off"}}


def group(name: str, **training: Any) -> dict[str, Any]:
    return {"algorithm": "group", "loss": {"name": name}, **training}


MAIN: dict[str, dict[str, Any]] = {
    "lipo": group("lipo", epochs=2),
    "kto": group("kto", epochs=2),
    "nsr": {"algorithm": "nsr", "epochs": 2, "negative": {**OFF, "entropy_bonus": 0.01, "clip": 0.5}},
    "d2o": {"algorithm": "d2o", "epochs": 2, "loss": {"beta": 0.3}, "negative": {**OFF, "self_samples": 2}},
}
"""Each runs on one rank, on two, and again from a checkpoint."""
OTHERS: dict[str, dict[str, Any]] = {
    "plackett_luce": group("plackett_luce"),
    "ranklist": group("ranklist"),
    "ranklist_skip": group("ranklist_skip"),
    "gpo": group("gpo", reference="round"),
    "reward_regression": group("reward_regression"),
    "apo_zero_unpaired": group("apo_zero_unpaired"),
    "psr": {"algorithm": "psr"},
    "w_reinforce": {"algorithm": "w_reinforce", "negative": {"form": "probability", "denominator": "trained"}},
    "unlikelihood": {"algorithm": "unlikelihood", "negative": OFF},
}
STOPPING = {**MAIN["d2o"], "epochs": 8, "negative": {**OFF, "entropy_stop": 0.98}}
GIVEN = {**MAIN["d2o"], "negative": {**OFF, "self_samples": 2, "self_from": 0.4, "dispreferred_column": "bad"}}
CAUTIOUS = {**MAIN["nsr"], "negative": {**OFF, "wrong_below": 0.0}}

pytestmark = pytest.mark.engine

Reports = dict[str, list[dict[str, Any]]]


def poison() -> int:
    """A token of some responses, whose embedding is made NaN."""
    return max(t for s in responses()[0].values() for t in s.response_ids)


def jobs_of(ranks: int, where: Path) -> dict[str, dict[str, Any]]:
    """Everything that starts from the initial model on this many ranks."""
    found: dict[str, dict[str, Any]] = {}
    for name, training in MAIN.items():
        if ranks == 1:
            files = {key: str(where / f"{name}.{key}") for key in ("save", "weights")}
            found[name] = {"training": training, **files}
            found[f"{name} poison"] = {"training": training, "poison": poison()}
        else:
            found[f"{name}2"] = {"training": {**training, "tokens_per_batch": 24, "zero_stage": 2}}
    found[f"given{ranks}"] = {"training": GIVEN}
    if ranks == 1:
        found |= {name: {"training": training, "rounds": 3} for name, training in OTHERS.items()}
        found["stop"] = {"training": STOPPING, "rounds": 3, "save": str(where / "stop.save")}
        found["alone"] = {"training": MAIN["kto"], "rounds": 1, "prompts": 1}
        found["nothing"] = {"training": CAUTIOUS, "rounds": 1}
    else:
        for name in ("nsr", "d2o"):  # one prompt a step: the other rank has nothing to compute
            plain = {**MAIN[name], "negative": OFF, "responses_per_step": 1, "tokens_per_batch": 1, "epochs": 1}
            for stage in (0, 3):
                found[f"{name} idle{stage}"] = {"training": {**plain, "zero_stage": stage}, "rounds": 1}
        found["nsr poison2"] = {"training": {**MAIN["nsr"], "zero_stage": 2}, "poison": poison()}
    return found


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scored")


@pytest.fixture(scope="module")
def reports(where: Path) -> Reports:
    """By job, what each rank reported; a resumed job is called `NAME again`."""
    shape = Scratch(hidden_size=32, intermediate_size=64, layers=2, heads=2, kv_heads=1, head_dim=32, context=64)
    create_model(where / "model", shape, seed=1)
    first, two = jobs_of(1, where), jobs_of(2, where)
    again = {
        f"{name} again": {
            "training": first[name]["training"],
            "load": first[name]["save"],
            "weights": f"{first[name]['weights']} again",
        }
        for name in MAIN
    }
    again["stop again"] = {"training": STOPPING, "rounds": 3, "load": first["stop"]["save"]}
    launches = [(1, first, "one"), (2, two, "two"), (1, again, "again")]
    found: Reports = {}
    for ranks, jobs, label in launches:
        found |= launch_by_job(ranks, jobs, where, label, "scored_job.py")
    return found


def column(report: dict[str, Any], name: str) -> list[float]:
    return [row[name] for row in report["steps"]]


@pytest.mark.parametrize("name", MAIN)
def test_neither_ranks_nor_budgets_change_a_loss(reports: Reports, name: str) -> None:
    """One rank, or two with uneven shares, smaller micro-batches and a sharded optimizer."""
    (one,) = reports[name]
    for other in reports[f"{name}2"]:
        assert column(other, "loss") == pytest.approx(column(one, "loss"), abs=1e-5)
        for key in ("grad_norm", *(k for k in ("z_ref", "entropy", "best_ratio") if k in one["steps"][0])):
            assert column(other, key) == pytest.approx(column(one, key), abs=1e-4, rel=1e-4), key
        assert other["weights"] == pytest.approx(one["weights"], abs=1e-3)
    assert reports[f"{name}2"][0]["weights"] == reports[f"{name}2"][1]["weights"]


@pytest.mark.parametrize("name", ["nsr", "d2o"])
def test_a_rank_without_work_goes_back_the_same_way(reports: Reports, name: str) -> None:
    """ZeRO-3 counts on it, and these losses look at entropies without following them."""
    plain, sharded = reports[f"{name} idle0"][0], reports[f"{name} idle3"][0]
    assert len(plain["steps"]) > 2
    assert column(sharded, "loss") == pytest.approx(column(plain, "loss"), rel=1e-5)


@pytest.mark.parametrize("name", MAIN)
def test_saved_and_resumed_equals_uninterrupted_bitwise(reports: Reports, where: Path, name: str) -> None:
    (straight,), (again,) = reports[name], reports[f"{name} again"]
    tail = straight["steps"][-len(again["steps"]) :]
    assert 0 < len(tail) < len(straight["steps"])
    for key in ("step", "loss", "grad_norm", "learning_rate"):
        assert column(again, key) == [row[key] for row in tail], key
    expected, found = torch.load(where / f"{name}.weights"), torch.load(where / f"{name}.weights again")
    assert expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)
    assert again["state"] == straight["state"]


@pytest.mark.parametrize("name", [*MAIN, *OTHERS])
def test_every_loss_comes_to_prefer_the_better_responses(reports: Reports, name: str) -> None:
    (report,) = reports[name]
    assert report["error"] is None and all(math.isfinite(loss) for loss in column(report, "loss"))
    if name == "unlikelihood":  # hardly acts on what a model this unsure finds unlikely: it is the loss that falls
        steps = len(report["steps"]) // 3
        assert sum(column(report, "loss")[-steps:]) < 0.8 * sum(column(report, "loss")[:steps])
    else:
        assert report["gain"] > 0.05


def test_the_first_losses_are_known(reports: Reports) -> None:
    """With the policy at its reference: KTO costs 1/2 a response, D2O ln 2 a prompt, NSR's ratios are 1."""
    assert column(reports["kto"][0], "loss")[0] == pytest.approx(0.5, abs=1e-6)
    assert column(reports["d2o"][0], "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    first = reports["nsr"][0]["steps"][0]
    assert first["moved"] == 0.0 and first["right"] == 0.0 and first["wrong"] > 0


def test_given_answers_stand_in_for_the_worst_responses(reports: Reports) -> None:
    """Every prompt with an own sample over `self_from` has its answer unlearned, on one rank as on two."""
    (one,), two = reports["given1"], reports["given2"]
    for other in two:
        assert column(other, "loss") == pytest.approx(column(one, "loss"), abs=1e-5)
    assert column(one, "loss")[0] == pytest.approx(
        math.log(2), abs=1e-6
    )  # their reference is computed with the others'
    usable = {s.prompt_id for s in responses()[1] if s.p_good >= 0.4}
    assert sum(row["groups"] for row in one["steps"]) == 2 * 2 * len(usable)  # two rounds of two epochs
    assert one["steps"][-1]["wrong_ratio"] < -0.1 < 0.0 < one["steps"][-1]["own_ratio"]


def test_what_is_left_out_is_counted(reports: Reports) -> None:
    assert reports["lipo"][0]["counts"] == {
        "alone under their prompt": 1,
        "of equal P(good) throughout a prompt": 4,
        "without a score or a token": 3,
    }
    right = sum(s.p_good >= 0.5 for s in responses()[1])
    nothing = {"steps with nothing to act on": 1}  # the one prompt of the last step has right responses only
    assert reports["nsr"][0]["counts"] == {"without a score or a token": 3, "right": right, **nothing}
    assert reports["d2o"][0]["counts"]["of a prompt without a wrong response"] >= 8  # the equal and the right ones


def test_a_round_without_a_wrong_response_takes_no_step(reports: Reports) -> None:
    (report,) = reports["nothing"]
    assert report["steps"] == [] and report["step"] == 0
    assert report["counts"]["steps with nothing to act on"] > 0


def test_kto_of_one_prompt_is_counted_and_warned_of(reports: Reports) -> None:
    """Its z cannot be estimated and is 0, in every step of both epochs."""
    (alone,), (plain,) = reports["alone"], reports["kto"]
    assert alone["steps"] and set(column(alone, "z_ref")) == {0.0} and max(column(plain, "z_ref")) > 0.0
    assert alone["counts"]["of a round with one prompt, learned from with KTO's z at 0"] == 4
    assert len(alone["warnings"]) == 1 and "apo_zero_unpaired" in alone["warnings"][0] and plain["warnings"] == []


def test_the_entropy_stop_is_recorded_and_survives_a_restart(reports: Reports) -> None:
    """It ends training in the first round, and a run that goes on from that checkpoint does not begin again."""
    (straight,), (again,) = reports["stop"], reports["stop again"]
    assert 0 < len(straight["steps"]) < 3 * 8
    assert "below 0.98 of the" in straight["stopped"] and straight["counts"]["responses after the stop"] > 0
    assert again["steps"] == [] and again["stopped"] == straight["stopped"] and again["weights"] == straight["weights"]


@pytest.mark.parametrize("job", [*(f"{name} poison" for name in MAIN), "nsr poison2"])
def test_a_loss_that_is_not_finite_names_the_samples(reports: Reports, job: str) -> None:
    hit = {i for i, s in responses()[0].items() if poison() in s.prompt_ids + s.response_ids}
    for report in reports[job]:
        assert report["error"] is not None and "not finite" in report["error"]
        assert report["steps"] == [] and report["step"] == 0
        assert any(sample_id in report["error"] for sample_id in hit)
