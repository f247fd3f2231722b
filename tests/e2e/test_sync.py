"""Weights from trainer to sampler: delivered, proven, and refused where one tensor is not what it should be."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from align.distributed import Ranks
from align.errors import RunError
from align.recipe import Scratch
from align.sampling.engine import Sampler
from align.sampling.spotcheck import COLUMNS, Sent, columns
from align.sampling.weights import TOLERANCES, sync
from align.training.scratch import create_model
from tests.e2e.engines import SHAPE, Policy, probes, prompt_of, recipe_for


def start(folder: Path, shape: Scratch, dtype: str) -> tuple[Sampler, Policy]:
    create_model(folder, shape, seed=1)
    return Sampler(folder, recipe_for(folder, dtype=dtype), Ranks()), Policy(folder, dtype)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Sampler, Policy]]:
    """A tied model in the sampler and in the stub trainer."""
    sampler, policy = start(tmp_path_factory.mktemp("tied"), SHAPE, request.param)
    yield sampler, policy
    sampler.close()


@pytest.fixture
def tied(pair: tuple[Sampler, Policy]) -> Iterator[tuple[Sampler, Policy]]:
    """The same pair, in agreement at the start of each test."""
    sampler, policy = pair
    policy.withheld, sampler.tied = set(), True
    sync(sampler, policy, probes(SHAPE_VOCABULARY), None)
    yield sampler, policy


SHAPE_VOCABULARY = 3 + len(SHAPE.characters)


@pytest.mark.engine
def test_every_tensor_arrives_exactly(tied: tuple[Sampler, Policy]) -> None:
    sampler, policy = tied
    prompt = prompt_of("12+3=", _tokenizer(sampler))
    before = [s.response_ids for s in sampler.sample([prompt], n=8, **FIXED)]
    policy.nudge(0.05, seed=1)
    stale = np.mean(_differences(sampler, policy))
    report = sync(sampler, policy, probes(SHAPE_VOCABULARY), None)
    assert report.tensors == report.tensors_compared == 25  # 2 x 11 in the layers, embedding, last norm, head
    assert stale > 10 * report.mean_abs_difference
    assert report.mean_abs_difference < (2e-6 if sampler.dtype == "float32" else 0.03)
    assert report.probe_tokens == 37 + 19
    assert [s.response_ids for s in sampler.sample([prompt], n=8, **FIXED)] != before


FIXED = {"policy_version": 0, "temperature": 1.0, "purpose": "train", "seed": 0}


def _tokenizer(sampler: Sampler) -> object:
    return sampler._tokenizer


def _differences(sampler: Sampler, policy: Policy) -> np.ndarray:
    from align.sampling.weights import logprob_differences

    return logprob_differences(sampler, policy, probes(SHAPE_VOCABULARY))


@pytest.mark.engine
def test_a_stale_tied_head_is_caught_and_named(tied: tuple[Sampler, Policy]) -> None:
    """vLLM's reload updates the embedding and leaves its packed copy of the head; here the first check is switched
    off, and the log-probs still tell."""
    sampler, policy = tied
    policy.withheld = {"lm_head.weight"}
    with pytest.raises(RunError, match=r"embeddings are tied, and lm_head\.weight was not sent"):
        sync(sampler, policy, probes(SHAPE_VOCABULARY), None)
    sampler.tied = False
    policy.nudge(0.1, seed=2)
    with pytest.raises(RunError, match="mean .log-prob difference. between trainer and sampler is 0"):
        sync(sampler, policy, probes(SHAPE_VOCABULARY), None)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("withheld", "message"),
    [
        ("model.layers.1.mlp.down_proj.weight", "sent nothing for model.layers.1.mlp.down_proj.weight"),
        ("model.layers.0.self_attn.q_norm.weight", "sent nothing for model.layers.0.self_attn.q_norm.weight"),
        ("model.layers.1.mlp.up_proj.weight", "sent nothing for model.layers.1.mlp.up_proj.weight, so its layer"),
        ("model.layers.0.self_attn.k_proj.weight", "sent nothing for model.layers.0.self_attn.k_proj.weight, so"),
    ],
)
def test_a_tensor_that_is_not_sent_is_named(tied: tuple[Sampler, Policy], withheld: str, message: str) -> None:
    sampler, policy = tied
    policy.withheld = {withheld}
    with pytest.raises(RunError, match=message.replace(".", r"\.")):
        sync(sampler, policy, probes(SHAPE_VOCABULARY), None)


@pytest.mark.engine
def test_one_changed_tensor_is_named_even_below_the_tolerance(tied: tuple[Sampler, Policy]) -> None:
    """The head is delivered, then spoilt behind the engine's back by far less than bfloat16's rounding of log-probs."""
    sampler, policy = tied
    original = sampler.load_weights

    def spoil(weights: Iterator[tuple[str, torch.Tensor]]) -> set[str]:
        return original((n, t * 1.01 if n.endswith("layers.1.self_attn.v_proj.weight") else t) for n, t in weights)

    sampler.load_weights = spoil  # type: ignore[method-assign]
    try:
        with pytest.raises(RunError, match=r"does not hold what was sent for model\.layers\.1\.self_attn\.v_proj"):
            sync(sampler, policy, probes(SHAPE_VOCABULARY), tolerance=1.0)
    finally:
        del sampler.load_weights  # type: ignore[method-assign]


@pytest.mark.engine
def test_nan_weights_never_pass(tmp_path: Path) -> None:
    """NaN is no equal of itself, so the exact comparison names the tensor; infinity is, and the log-probs tell."""
    sampler, policy = start(tmp_path, SHAPE, "float32")
    prompt = prompt_of("1+1=", _tokenizer(sampler))
    norm = policy.model.model.norm.weight
    for value, message in (
        (float("nan"), r"hold what was sent for model\.norm\.weight"),
        (float("inf"), "is nan nats"),
    ):
        with torch.no_grad():
            norm[0] = value
        with pytest.raises(RunError, match=message):
            sync(sampler, policy, probes(SHAPE_VOCABULARY), tolerance=100.0)
        with pytest.raises(RunError, match="no usable response to prompt"):
            sampler.sample([prompt], n=2, **FIXED)
    sampler.close()


@pytest.mark.engine
def test_an_untied_model_and_one_with_biases(tmp_path: Path) -> None:
    """Two more architectures: an untied head, and Qwen2 with its query, key and value biases."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from align.training.scratch import build_tokenizer

    sampler, policy = start(tmp_path / "untied", SHAPE.model_copy(update={"tie_word_embeddings": False}), "float32")
    policy.nudge(0.05, seed=3)
    report = sync(sampler, policy, probes(SHAPE_VOCABULARY), None)
    assert report.tensors == report.tensors_compared == 25
    sampler.close()

    config = Qwen2Config(
        vocab_size=SHAPE_VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=96, tie_word_embeddings=True, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "qwen2")
    build_tokenizer(SHAPE).save_pretrained(tmp_path / "qwen2")
    sampler = Sampler(tmp_path / "qwen2", recipe_for(tmp_path / "qwen2"), Ranks())
    policy = Policy(tmp_path / "qwen2", "float32")
    policy.nudge(0.05, seed=4)
    report = sync(sampler, policy, probes(SHAPE_VOCABULARY), None)
    assert report.tensors == report.tensors_compared == 2 * (3 * 2 + 1 + 3 + 2) + 3
    sampler.close()


SCRIPT = """
import sys
from pathlib import Path
from align import distributed
from align.errors import RunError
from align.sampling.engine import Sampler
from align.sampling.weights import sync
from tests.e2e.engines import Policy, probes, recipe_for
folder = Path(sys.argv[1])
ranks = distributed.connect()
sampler, policy = Sampler(folder, recipe_for(folder), ranks), Policy(folder, "float32")
policy.nudge(0.05, seed=8)
good = sync(sampler, policy, probes(24), None).mean_abs_difference < 1e-5
sys.stdout.write(f"GOOD {good}\\n")  # one write a line: two ranks share the pipe
if ranks.rank == 1:
    policy.withheld = {"model.norm.weight"}
try:
    sync(sampler, policy, probes(24), None)
except RunError as error:
    sys.stdout.write(f"STOPPED {ranks.rank} {'model.norm.weight' in str(error)}\\n")
sampler.close()
distributed.close(ranks)
"""


@pytest.mark.engine
def test_both_ranks_stop_where_one_is_wrong(tmp_path: Path) -> None:
    create_model(tmp_path / "model", SHAPE, seed=1)
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    arguments = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments, str(tmp_path / "model")],
        capture_output=True, text=True, timeout=300, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("GOOD True") == 2
    assert "STOPPED 0 True" in done.stdout and "STOPPED 1 True" in done.stdout


def test_columns_by_hand() -> None:
    assert columns(8, 0) == [0, 2, 4, 6]
    assert columns(8, 1) == [1, 3, 5, 7]
    assert columns(3, 5) == [0, 1, 2]
    for width in (5, 64, 129):
        seen = {c for turn in range(width) for c in columns(width, turn)}
        assert seen == set(range(width)), "every column comes round"
        assert all(len(columns(width, turn)) == min(COLUMNS, width) for turn in range(width))


def test_what_was_sent_is_noted_and_passed_on() -> None:
    matrix, vector = torch.arange(16.0).reshape(2, 8), torch.tensor([1.0, 1.001])
    sent = Sent("bfloat16", turn=1)
    passed = dict(sent.watch([("a.weight", matrix), ("b.weight", vector)]))
    assert passed["a.weight"] is matrix
    assert sent.pieces["a.weight"].tolist() == [[1.0, 3.0, 5.0, 7.0], [9.0, 11.0, 13.0, 15.0]]
    assert sent.pieces["b.weight"].tolist() == [1.0, 1.0]  # as the engine will round it
    assert set(TOLERANCES) == {"float32", "float16", "bfloat16"}
