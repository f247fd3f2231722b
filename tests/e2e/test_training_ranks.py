"""Training under DeepSpeed in real processes: the same mathematics whatever the ranks, the stage and the budget.

All jobs run in four launches: one rank and two ranks, each once from the start and once more to resume.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from align.recipe import Scratch
from align.training.scratch import create_model
from tests.e2e.jobs import launch, launch_by_job
from tests.e2e.training_job import preferences

NLL = {"loss": {"nll_weight": 0.3}}
MOVING = {"reference_sync": {"every_steps": 1, "mix": 0.5}}
LORA = {"lora": {"r": 4, "dropout": 0.1}}

SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""Without this DeepSpeed keeps every parameter of a model this small whole, and nothing is gathered in a forward."""


RESUMED: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {  # name: (ranks, training, policy)
    "plain": (1, {}, {}),
    "bfloat16": (1, {"zero_stage": 2, "schedule": "cosine", "warmup_steps": 2}, {"dtype": "bfloat16"}),
    "offload": (1, {"zero_stage": 3, "offload": "all"}, {"lora": {"r": 4}}),
    "moving": (1, MOVING, {}),
    "stage2": (2, {"zero_stage": 2}, {}),
    "stage3": (2, {"zero_stage": 3, "deepspeed": SHARDED}, {}),
    "half": (1, {"freeze": "half", "zero_stage": 2}, {"dtype": "bfloat16"}),
    "half3": (2, {"freeze": "half", "zero_stage": 3, "deepspeed": SHARDED}, {}),
    "moving3": (2, {**MOVING, "zero_stage": 3, "deepspeed": SHARDED}, {}),
    "lora2": (2, {"zero_stage": 2}, LORA),
    "lora3": (2, {"zero_stage": 3, "gradient_checkpointing": True, "deepspeed": SHARDED}, {"lora": {"r": 4}}),
}
KNOBS: dict[str, dict[str, Any]] = {
    "tokens_per_batch": {"tokens_per_batch": 1},
    "logit_chunk_tokens": {"logit_chunk_tokens": 1},
    "gradient_checkpointing": {"gradient_checkpointing": True},
}

pytestmark = pytest.mark.engine


def poison() -> int:
    """A token of some responses, whose embedding is made NaN."""
    return max(t for s in preferences()[1].values() for t in s.response_ids)


def first_jobs(ranks: int, where: Path) -> dict[str, dict[str, Any]]:
    """Everything that starts from the initial model on this many ranks."""
    jobs: dict[str, dict[str, Any]] = {}
    for name, (wanted, training, policy) in RESUMED.items():
        if wanted == ranks:
            files = {key: str(where / f"{name}.{key}") for key in ("save", "weights", "export")}
            jobs[name] = {"training": training, "policy": policy, **files}
    if ranks == 1:
        jobs["whole"] = {"training": {"pairs_per_step": 100}, "rounds": 3}
        jobs["one"] = {"training": {**NLL, "tokens_per_batch": 4096}}
        jobs |= {name: {"training": {**NLL, **knob}} for name, knob in KNOBS.items()}
    else:
        small = {**NLL, "tokens_per_batch": 24}
        jobs |= {f"two{stage}": {"training": {**small, "zero_stage": stage}} for stage in range(4)}
        jobs["two3"]["training"]["deepspeed"] = SHARDED
    jobs["poison"] = {"poison": poison(), "training": {"pairs_per_step": 100, "zero_stage": 2 * (ranks > 1)}}
    return jobs


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def reports(where: Path) -> dict[str, list[dict[str, Any]]]:
    """By job, what each rank reported; a resumed job is called `NAME again`."""
    shape = Scratch(hidden_size=32, intermediate_size=64, layers=2, heads=2, kv_heads=1, head_dim=32, context=64)
    create_model(where / "model", shape, seed=1)
    found: dict[str, list[dict[str, Any]]] = {}
    for ranks in (1, 2):
        first = first_jobs(ranks, where)
        again = {
            f"{name} again": {
                **job,
                "load": job["save"],
                "save": None,
                "export": None,
                "weights": f"{job['weights']} again",
            }
            for name, job in first.items()
            if name in RESUMED
        }
        for label, jobs in (("first", first), ("again", again)):
            told = launch_by_job(ranks, jobs, where, f"{label}{ranks}", "training_job.py")
            found |= {f"{name}{ranks}" if name == "poison" else name: reports for name, reports in told.items()}
    return found


def column(report: dict[str, Any], name: str) -> list[float]:
    return [row[name] for row in report["steps"]]


Reports = dict[str, list[dict[str, Any]]]


def test_first_loss_is_ln_2_times_the_weights_and_falls(reports: Reports) -> None:
    """With the policy equal to the reference every pair costs ln 2, so a step costs ln 2 times its mean weight."""
    (report,) = reports["whole"]
    pairs, _ = preferences()
    assert column(report, "loss")[0] == pytest.approx(math.log(2) * sum(p.weight for p in pairs) / len(pairs), abs=1e-6)
    assert column(report, "loss") == sorted(column(report, "loss"), reverse=True)
    assert column(report, "pairs") == [15, 15, 15] and column(report, "accuracy")[-1] > 0.9


@pytest.mark.parametrize("knob", KNOBS)
def test_memory_knobs_do_not_change_the_losses(reports: Reports, knob: str) -> None:
    (plain,), (other,) = reports["one"], reports[knob]
    assert column(other, "loss") == pytest.approx(column(plain, "loss"), abs=1e-5)
    for name in ("grad_norm", "margin", "chosen_logprob"):
        assert column(other, name) == pytest.approx(column(plain, name), abs=1e-4, rel=1e-4), name


@pytest.mark.parametrize("stage", range(4))
def test_two_ranks_give_the_losses_of_one(reports: Reports, stage: int) -> None:
    """Ranks, stages and unequal numbers of micro-batches (15 pairs in steps of 8, a small budget) change nothing."""
    (one,), two = reports["one"], reports[f"two{stage}"]
    for report in two:
        for name in ("loss", "grad_norm", "margin"):
            assert column(report, name) == pytest.approx(column(one, name), abs=1e-4, rel=1e-4), name
        assert report["weights"] == pytest.approx(one["weights"], abs=1e-3)
    assert two[0]["weights"] == two[1]["weights"]


@pytest.mark.parametrize("name", RESUMED)
def test_saved_and_resumed_equals_uninterrupted_bitwise(reports: Reports, where: Path, name: str) -> None:
    for straight, again in zip(reports[name], reports[f"{name} again"], strict=True):
        tail = straight["steps"][-len(again["steps"]) :]
        assert 0 < len(tail) < len(straight["steps"])
        for key in ("step", "loss", "grad_norm", "learning_rate"):
            assert column(again, key) == [row[key] for row in tail], key
    expected, found = torch.load(where / f"{name}.weights"), torch.load(where / f"{name}.weights again")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_reference_that_moves_is_the_same_on_any_ranks_and_keeps_the_loss_up(reports: Reports) -> None:
    """The first step is before the first move; afterwards the policy is never far from its reference."""
    (plain,), (one,), two = reports["plain"], reports["moving"], reports["moving3"][0]
    assert column(two, "loss") == pytest.approx(column(one, "loss"), abs=1e-4, rel=1e-4)
    # the reference has not moved yet; asked step by step, its sums come from other batches: float32's last bits
    assert column(one, "loss")[0] == pytest.approx(column(plain, "loss")[0], rel=1e-6)
    assert column(one, "loss")[-1] > column(plain, "loss")[-1] + 0.01


@pytest.mark.parametrize("name", RESUMED)
def test_the_exported_directory_holds_the_trained_weights(reports: Reports, where: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert reports[name][0]["error"] is None
    trained = torch.load(where / f"{name}.weights")
    assert torch.equal(trained["lm_head.weight"], trained["model.embed_tokens.weight"])  # tied, and sent explicitly
    loaded = AutoModelForCausalLM.from_pretrained(where / f"{name}.export", dtype="auto")
    assert loaded.dtype == getattr(torch, RESUMED[name][2].get("dtype", "float32"))
    state = loaded.state_dict()
    assert state.keys() == trained.keys()
    assert all(torch.equal(state[key], trained[key]) for key in trained)
    assert AutoTokenizer.from_pretrained(where / f"{name}.export").pad_token_id == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_that_is_not_finite_stops_every_rank_before_the_step(reports: Reports, ranks: int) -> None:
    hit = {i for i, s in preferences()[1].items() if poison() in s.prompt_ids + s.response_ids}
    for report in reports[f"poison{ranks}"]:
        assert report["error"] is not None and "not finite" in report["error"]
        assert report["steps"] == [] and report["step"] == 0
        assert any(sample_id in report["error"] for sample_id in hit)


def test_a_checkpoint_of_other_ranks_is_refused(reports: Reports, where: Path) -> None:
    """One rank cannot go on from two ranks' shards, and says how to go on."""
    job = {"model": str(where / "model"), "load": str(where / "stage2.save"), "training": {"zero_stage": 2}}
    with pytest.raises(AssertionError, match="written by 2 ranks and this run has 1; go on with --ranks 2"):
        launch(1, {"refused": job}, where, "refused", "training_job.py")
