"""Every supervised loss under DeepSpeed: ranks and small batches change nothing, a resumed round is the same.

The gradient of a single step is compared in test_layout.py.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from align.catalogue import ALGORITHMS
from align.recipe import Scratch
from align.recipe_supervised import CONDITIONED
from align.training.scratch import create_model
from tests.e2e.jobs import launch_by_job

pytestmark = pytest.mark.engine

LOSSES = ALGORITHMS["sft"].losses
SETTINGS: dict[str, dict[str, Any]] = {
    "best_of_n": {"best": 2},
    "quark": {"quantiles": 2, "kl_weight": 0.3},
    "masked_thought": {"threshold": 0.2, "mask_rate": 0.5, "mask_warmup_steps": 4},
    "conditional": {"control": ["q", "c"], "control_drop_rate": 0.3},
    "reward_conditioning": {"control": ["q", "r", "c"], "control_drop_rate": 0.3},
}
BETA = {"rwr": 0.5, "awr": 0.5, "rlhf_sharpening": 0.5}
RESUMED = ("masked_thought", "conditional", "quark")


def training(loss: str, where: Path) -> dict[str, Any]:
    settings = dict(SETTINGS.get(loss, {}))
    if loss == "poft":
        settings = {"threshold": 0.3, "aligned": [str(where / "aligned")]}
    named = {"name": loss, **({"beta": BETA[loss]} if loss in BETA else {})}
    return {"loss": named, "supervised": settings, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """By job, what each rank reported."""
    where = tmp_path_factory.mktemp("supervised")
    shape = Scratch(hidden_size=32, intermediate_size=64, layers=2, heads=2, kv_heads=1, head_dim=32, context=64)
    create_model(where / "model", shape, seed=1)
    create_model(where / "aligned", shape, seed=2)
    one: dict[str, dict[str, Any]] = {loss: {"training": training(loss, where)} for loss in LOSSES}
    for loss in RESUMED:
        one[loss]["save"] = str(where / loss)
    sft = {"loss": {"name": "filter"}, "supervised": {"threshold": 0.0}}
    quark = {"loss": {"name": "quark"}, "supervised": {"quantiles": 1, "kl_weight": 0.0}}
    half = {**training("best_of_n", where), "freeze": "half"}
    one |= {
        "sft": {"training": sft},
        "quark as sft": {"training": quark},
        "nobody": {"training": {"loss": {"name": "filter"}, "supervised": {"threshold": 2.0}}, "rounds": 1},
        "half": {"training": half, "freeze": True},
        "half lora": {"training": {**training("quark", where)}, "policy": {"lora": {"r": 4}}},
    }
    again = {f"{loss} again": {**one[loss], "load": str(where / loss), "save": None} for loss in RESUMED}
    two: dict[str, dict[str, Any]] = {
        f"{loss} two": {"training": {**training(loss, where), "zero_stage": 2, "tokens_per_batch": 24}, "rounds": 1}
        for loss in LOSSES
    }
    two["half two"] = {"training": {**half, "zero_stage": 2}}
    found: dict[str, list[dict[str, Any]]] = {}
    for ranks, label, jobs in ((1, "one", one), (1, "again", again), (2, "two", two)):
        found |= launch_by_job(ranks, jobs, where, label, "supervised_job.py")
    return found


@pytest.mark.parametrize("loss", LOSSES)
def test_two_ranks_and_small_batches_change_nothing(loss: str, reports: dict[str, list[dict[str, Any]]]) -> None:
    one, two = reports[loss][0], reports[f"{loss} two"][0]
    assert one["error"] is None and two["error"] is None
    first_round = [s for s in one["steps"] if s["round"] == 0]
    assert len(first_round) == len(two["steps"]) >= 2
    for a, b in zip(first_round, two["steps"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert (a["responses"], a["good"]) == (b["responses"], b["good"])
    assert reports[f"{loss} two"][0]["weights"] == reports[f"{loss} two"][1]["weights"]


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss not in ("masked_thought", "rwr", "awr")])
def test_the_loss_falls_on_the_same_data(loss: str, reports: dict[str, list[dict[str, Any]]]) -> None:
    steps = reports[loss][0]["steps"]
    by_round = [[s["loss"] for s in steps if s["round"] == r] for r in (0, 1)]
    assert sum(by_round[1]) / len(by_round[1]) < sum(by_round[0]) / len(by_round[0])


@pytest.mark.parametrize("loss", RESUMED)
def test_a_resumed_round_is_bitwise_the_same(loss: str, reports: dict[str, list[dict[str, Any]]]) -> None:
    straight, again = reports[loss][0], reports[f"{loss} again"][0]
    assert straight["weights"] == again["weights"]
    tail = straight["steps"][-len(again["steps"]) :]
    assert [s["loss"] for s in tail] == [s["loss"] for s in again["steps"]]


def test_quark_with_one_quantile_and_no_kl_is_supervised_fine_tuning(reports: dict[str, list[dict[str, Any]]]) -> None:
    assert reports["quark as sft"][0]["weights"] == reports["sft"][0]["weights"]
    assert "divergence" not in reports["quark as sft"][0]["steps"][0]


@pytest.mark.parametrize("job", ["quark", "half lora"])
def test_quarks_kl_begins_at_zero_and_grows(job: str, reports: dict[str, list[dict[str, Any]]]) -> None:
    """Before the first step the policy is the initial one; an adapter's reference is the network without it."""
    values = [s["divergence"] for s in reports[job][0]["steps"]]
    assert abs(values[0]) < 1e-6 < values[-1]


def test_the_first_loss_is_the_mean_over_tokens(reports: dict[str, list[dict[str, Any]]]) -> None:
    """A model with random weights over 27 characters: near ln 27 a token, whatever the loss selects."""
    first = reports["sft"][0]["steps"][0]
    assert first["loss"] == pytest.approx(first["nll"]) and abs(first["loss"] - math.log(27)) < 1.5


def test_what_was_left_out_is_counted(reports: dict[str, list[dict[str, Any]]]) -> None:
    """Of 30 responses one was cut; with two kept of each of 10 prompts the rest is not among the best."""
    counts = {k: v for k, v in reports["best_of_n"][0]["counts"].items() if v}
    assert counts == {"cut at sampling.max_new_tokens": 1, "not among the best of their prompt": 9}
    assert {s["responses"] for s in reports["best_of_n"][0]["steps"]} == {8, 4}


def test_a_threshold_that_nobody_reaches_trains_nothing_and_says_why(
    reports: dict[str, list[dict[str, Any]]],
) -> None:
    report = reports["nobody"][0]
    assert report["steps"] == [] and report["error"] is None
    assert report["counts"]["below training.supervised.threshold"] == 29


def test_every_control_level_is_learned(reports: dict[str, list[dict[str, Any]]]) -> None:
    """Conditional losses learn from good and bad responses alike: nothing is filtered."""
    for loss in CONDITIONED:
        in_round = [s["responses"] for s in reports[loss][0]["steps"] if s["round"] == 0]
        assert sum(in_round) == 30


# ---- half fine-tuning -----------------------------------------------------------------------------------------------


def test_a_frozen_half_stays_bit_for_bit_and_has_no_optimizer_state(reports: dict[str, list[dict[str, Any]]]) -> None:
    """In every round exactly the frozen weights stand still, and the moments cover exactly what is trained."""
    first, second = reports["half"][0]["freezes"]
    for found in (first, second):
        assert found["frozen"] == found["same"]
        assert found["state_numbers"] == found["live_numbers"] < found["all_numbers"]
    assert first["frozen"] != second["frozen"]


def test_half_fine_tuning_on_two_ranks_is_that_on_one(reports: dict[str, list[dict[str, Any]]]) -> None:
    one, two = reports["half"][0], reports["half two"][0]
    assert [s["loss"] for s in one["steps"]] == pytest.approx([s["loss"] for s in two["steps"]], abs=1e-5)
