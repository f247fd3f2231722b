"""Training under DeepSpeed in real processes: the same mathematics whatever the ranks, the stage and the budget."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from align.recipe import Scratch
from align.training.scratch import create_model
from tests.e2e.training_job import preferences

ROOT = Path(__file__).parents[2]
JOB = Path(__file__).with_name("training_job.py")

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    shape = Scratch(hidden_size=32, intermediate_size=64, layers=2, heads=2, kv_heads=1, head_dim=32, context=64)
    create_model(directory, shape, seed=1)
    return str(directory)


@pytest.fixture
def train(model_dir: str, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Run a job on `ranks` processes and return every rank's report."""

    def start(ranks: int = 1, **job: Any) -> list[dict[str, Any]]:
        out = tmp_path / f"report{len(list(tmp_path.iterdir()))}"
        out.touch()
        text = json.dumps({"model": model_dir, "out": str(out), **job})
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        processes = []
        for rank in range(ranks):
            place = {
                "RANK": rank,
                "WORLD_SIZE": ranks,
                "LOCAL_RANK": rank,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            places = {k: str(v) for k, v in place.items()} if ranks > 1 else {}
            environment = {
                **os.environ,
                **places,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu",
            }
            processes.append(
                subprocess.Popen([sys.executable, str(JOB), text], env=environment, stderr=subprocess.PIPE)
            )
        errors = [p.communicate(timeout=300)[1].decode() for p in processes]
        assert [p.returncode for p in processes] == [0] * ranks, "\n".join(errors)[-3000:]
        return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(ranks)]

    return start


def column(report: dict[str, Any], name: str) -> list[float]:
    return [row[name] for row in report["steps"]]


def test_first_loss_is_ln_2_over_the_weights_and_falls(train: Callable[..., list[dict[str, Any]]]) -> None:
    """With the policy equal to the reference every pair costs ln 2, so a step costs ln 2 times its mean weight."""

    (report,) = train(rounds=3, training={"pairs_per_step": 100})
    pairs, _ = preferences()
    expected = torch.log(torch.tensor(2.0)).item() * sum(p.weight for p in pairs) / len(pairs)
    assert column(report, "loss")[0] == pytest.approx(expected, abs=1e-6)
    assert column(report, "loss") == sorted(column(report, "loss"), reverse=True)
    assert column(report, "pairs") == [15, 15, 15] and column(report, "accuracy")[-1] > 0.9


@pytest.mark.parametrize("training", [{"tokens_per_batch": 1}, {"tokens_per_batch": 4096}, {"logit_chunk_tokens": 1}])
def test_memory_knobs_do_not_change_the_losses(
    train: Callable[..., list[dict[str, Any]]], training: dict[str, Any]
) -> None:
    extra = {"loss": {"nll_weight": 0.3}}
    (plain,), (other,) = train(rounds=2, training=extra), train(rounds=2, training={**training, **extra})
    for name in ("loss", "grad_norm", "margin", "chosen_logprob"):
        assert column(other, name) == pytest.approx(column(plain, name), abs=1e-4, rel=1e-4), name
    assert column(other, "loss") == pytest.approx(column(plain, "loss"), abs=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_give_the_losses_of_one(train: Callable[..., list[dict[str, Any]]], stage: int) -> None:
    """Ranks, stages and unequal numbers of micro-batches (15 pairs in steps of 8, a small budget) change nothing."""
    training = {"tokens_per_batch": 24, "loss": {"nll_weight": 0.3}}
    (one,) = train(rounds=2, training=training)
    two = train(ranks=2, rounds=2, training={**training, "zero_stage": stage})
    for report in two:
        for name in ("loss", "grad_norm", "margin"):
            assert column(report, name) == pytest.approx(column(one, name), abs=1e-4, rel=1e-4), name
        assert report["weights"].keys() == one["weights"].keys()
        for name, total in one["weights"].items():
            assert report["weights"][name] == pytest.approx(total, abs=1e-3), name
    assert two[0]["weights"] == two[1]["weights"]


@pytest.mark.parametrize(
    ("ranks", "training", "policy"),
    [
        (1, {}, {}),
        (1, {"zero_stage": 2, "schedule": "cosine", "warmup_steps": 2}, {"dtype": "bfloat16"}),
        (2, {"zero_stage": 2}, {}),
        (2, {"zero_stage": 3}, {}),
        (2, {"zero_stage": 2}, {"lora": {"r": 4, "dropout": 0.1}}),
        (1, {"zero_stage": 3, "offload": "all"}, {"lora": {"r": 4}}),
    ],
)
def test_saved_and_resumed_equals_uninterrupted_bitwise(
    train: Callable[..., list[dict[str, Any]]],
    tmp_path: Path,
    ranks: int,
    training: dict[str, Any],
    policy: dict[str, Any],
) -> None:
    setting = {"ranks": ranks, "training": training, "policy": policy}
    whole, checkpoint = tmp_path / "whole.pt", tmp_path / "checkpoint"
    checkpoint.mkdir()
    straight = train(rounds=2, weights=str(whole), **setting)
    train(rounds=1, save=str(checkpoint), **setting)
    resumed = train(rounds=1, load=str(checkpoint), weights=str(tmp_path / "resumed.pt"), **setting)
    for uninterrupted, again in zip(straight, resumed, strict=True):
        tail = uninterrupted["steps"][-len(again["steps"]) :]
        for name in ("step", "loss", "grad_norm", "learning_rate"):
            assert [row[name] for row in again["steps"]] == [row[name] for row in tail], name
    expected, found = torch.load(whole), torch.load(tmp_path / "resumed.pt")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 2), (2, 3)])
def test_a_loss_that_is_not_finite_stops_every_rank_before_the_step(
    train: Callable[..., list[dict[str, Any]]], ranks: int, stage: int
) -> None:
    if stage == 3:
        pytest.skip("weights cannot be poisoned in place where they are sharded")

    pairs, samples = preferences()
    poison = max({t for s in samples.values() for t in s.response_ids})
    hit = {i for i, s in samples.items() if poison in (s.prompt_ids + s.response_ids)[:-1] or poison in s.response_ids}
    reports = train(ranks=ranks, poison=poison, training={"zero_stage": stage, "pairs_per_step": 100})
    for report in reports:
        assert report["error"] is not None and "not finite" in report["error"]
        assert report["steps"] == [] and report["step"] == 0
        assert any(sample_id in report["error"] for sample_id in hit)


@pytest.mark.parametrize("policy", [{}, {"lora": {"r": 4}}])
@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 3)])
def test_the_exported_directory_holds_the_trained_weights(
    train: Callable[..., list[dict[str, Any]]], tmp_path: Path, ranks: int, stage: int, policy: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = tmp_path / "weights.pt"
    train(ranks=ranks, policy=policy, training={"zero_stage": stage}, weights=str(weights), export=str(tmp_path / "hf"))
    trained = torch.load(weights)
    assert torch.equal(trained["lm_head.weight"], trained["model.embed_tokens.weight"])  # tied, and sent explicitly
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert loaded.dtype == torch.float32
    state = loaded.state_dict()
    assert state.keys() == trained.keys()
    assert all(torch.equal(state[name], trained[name]) for name in trained)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").pad_token_id == 0


def test_a_checkpoint_of_other_ranks_is_refused(train: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    train(ranks=2, save=str(checkpoint), training={"zero_stage": 2})
    with pytest.raises(AssertionError, match="written by 2 ranks and this run has 1; go on with --ranks 2"):
        train(load=str(checkpoint), training={"zero_stage": 2})
