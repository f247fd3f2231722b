"""The sampler with the real vLLM: repeatable to the bit, honest about ends, and a good neighbour in its process."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.distributed import Ranks
from align.errors import InputError
from align.records import Prompt, Sample, content_id
from align.sampling.engine import Sampler, stop_ids
from align.sampling.environment import check_engine_settings, context_length, kv_bytes_per_token
from align.training.scratch import create_model
from tests.e2e.engines import SHAPE, Policy, prompt_of, recipe_for

STORIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "stories260K" / "hf-hd32"
PROMPTS = ("12+34=", "7+8=", "901+2=", "5+5=", "777+111=")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    create_model(path, SHAPE, seed=5)
    return path


@pytest.fixture(scope="module")
def sampler(model_dir: Path) -> Iterator[Sampler]:
    made = Sampler(model_dir, recipe_for(model_dir), Ranks())
    yield made
    made.close()


@pytest.fixture(scope="module")
def prompts(model_dir: Path) -> list[Prompt]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return [prompt_of(text, tokenizer) for text in PROMPTS]


def draw(sampler: Sampler, prompts: list[Prompt], **changed: Any) -> list[Sample]:
    settings = {"policy_version": 1, "n": 3, "temperature": 0.7, "purpose": "train", "seed": 9}
    return sampler.sample(prompts, **(settings | changed))


def digest(samples: list[Sample]) -> str:
    """Depends on every bit of every field."""
    return hashlib.sha256(repr(samples).encode()).hexdigest()


@pytest.mark.engine
def test_order_ids_and_seeds(sampler: Sampler, prompts: list[Prompt]) -> None:
    samples = draw(sampler, prompts)
    assert [(s.prompt_id, s.index) for s in samples] == [(p.id, i) for p in prompts for i in range(3)]
    first = samples[4]
    assert first.seed == int(content_id(9, "train", prompts[1].id, 1, 1), 16) % 2**31
    assert first.id == content_id(prompts[1].id, 1, first.seed, 1)
    assert len({s.id for s in samples}) == len(samples)
    assert {s.temperature for s in samples} == {0.7}
    assert len({s.response_ids for s in samples}) > 5


@pytest.mark.engine
def test_a_greedy_response_comes_behind_the_others(sampler: Sampler, prompts: list[Prompt], model_dir: Path) -> None:
    """It changes none of them, says that it was greedy, and takes the most likely token at every step."""
    samples = draw(sampler, prompts, greedy=1)
    assert [(s.prompt_id, s.index) for s in samples] == [(p.id, i) for p in prompts for i in range(4)]
    greedy = [s for s in samples if s.temperature == 0.0]
    assert [s.index for s in greedy] == [3] * len(prompts)
    assert digest([s for s in samples if s.temperature]) == digest(draw(sampler, prompts))
    model = Policy(model_dir, "float32").model
    for sample in greedy:
        with torch.no_grad():
            logits = model(torch.tensor([[*sample.prompt_ids, *sample.response_ids]])).logits[0]
        best = logits[len(sample.prompt_ids) - 1 : -1].argmax(-1)
        assert best.tolist() == list(sample.response_ids)


@pytest.mark.engine
def test_logprobs_are_the_models_own_before_temperature(
    sampler: Sampler, prompts: list[Prompt], model_dir: Path
) -> None:
    samples = draw(sampler, prompts)
    expected = Policy(model_dir, "float32").token_logprobs([(s.prompt_ids, s.response_ids) for s in samples]).logprobs
    for sample, values in zip(samples, expected, strict=True):
        assert np.abs(np.asarray(sample.logprobs) - values).max() < 2e-5


@pytest.mark.engine
def test_prompt_logprobs_match_transformers(sampler: Sampler, model_dir: Path) -> None:
    sequence = [3, 9, 4, 12, 7, 1, 5]
    expected = Policy(model_dir, "float32").token_logprobs([(sequence[:1], sequence[1:])]).logprobs[0]
    (found,) = sampler.prompt_logprobs([sequence])
    assert len(found) == 6
    assert np.abs(np.asarray(found) - expected).max() < 2e-5


@pytest.mark.engine
def test_a_call_depends_on_its_arguments_only(sampler: Sampler, prompts: list[Prompt]) -> None:
    first = digest(draw(sampler, prompts))
    draw(sampler, prompts[2:], n=7, temperature=1.3, seed=1)  # other requests in between
    sampler.prompt_logprobs([[3, 4, 5]])
    assert digest(draw(sampler, prompts)) == first
    for changed in ({"seed": 10}, {"purpose": "eval"}, {"policy_version": 2}):
        again = draw(sampler, prompts, **changed)
        assert [s.response_ids for s in again] != [s.response_ids for s in draw(sampler, prompts)], changed


SCRIPT = """
import sys
from pathlib import Path
from transformers import AutoTokenizer
from align import distributed
from align.sampling.engine import Sampler
from tests.e2e.engines import prompt_of, recipe_for
from tests.e2e.test_sampler import PROMPTS, digest, draw
folder = Path(sys.argv[1])
ranks = distributed.connect()
sampler = Sampler(folder, recipe_for(folder), ranks)
tokenizer = AutoTokenizer.from_pretrained(folder)
prompts = [prompt_of(text, tokenizer) for text in PROMPTS]
if ranks.rank == 1:
    draw(sampler, prompts[:2], n=2)  # what a rank did before does not matter, and ranks need not keep step
found = ranks.gather(digest(draw(sampler, prompts)))
sampler.close()
assert len(set(ranks.gather("alive"))) == 1
if ranks.rank == 0:
    print("DIGESTS", *found)
distributed.close(ranks)
"""


@pytest.mark.engine
def test_another_process_draws_the_same_bits(sampler: Sampler, prompts: list[Prompt], model_dir: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(model_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("DIGESTS")[1].split() == [digest(draw(sampler, prompts))]


@pytest.mark.engine
def test_two_ranks_have_an_engine_each(model_dir: Path, tmp_path: Path) -> None:
    """One gloo group of two ranks, one independent engine per rank, the same draws on both."""
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    arguments = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script), str(model_dir)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    one, two = done.stdout.split("DIGESTS")[1].split()
    assert one == two


@pytest.mark.engine
def test_an_engine_leaves_the_trainers_state_alone(sampler: Sampler, model_dir: Path) -> None:
    """A second engine starts beside the first: random state, thread count and the first engine are as before."""
    torch.manual_seed(4)
    random.seed(4)
    expected = torch.rand(3).tolist(), random.random()
    torch.manual_seed(4)
    random.seed(4)
    threads, setter = torch.get_num_threads(), torch.set_num_threads
    before = sampler.prompt_logprobs([[3, 4, 5, 6]])
    second = Sampler(model_dir, recipe_for(model_dir), Ranks())
    assert (torch.rand(3).tolist(), random.random()) == expected
    assert torch.get_num_threads() == threads
    assert torch.set_num_threads is setter
    assert second.prompt_logprobs([[3, 4, 5, 6]]) == before
    second.close()
    assert sampler.prompt_logprobs([[3, 4, 5, 6]]) == before
    assert torch.distributed.is_initialized()


@pytest.mark.engine
def test_a_prompt_that_does_not_fit_is_named(sampler: Sampler, prompts: list[Prompt]) -> None:
    long = Prompt(id="toolong", text="1" * 90, token_ids=(4,) * 90, answer=None, split="train")
    with pytest.raises(InputError, match=r"prompt toolong has 90 tokens.*max_new_tokens is 12.*context of 96"):
        draw(sampler, [*prompts, long])
    exact = Prompt(id="fits", text="1" * 84, token_ids=(4,) * 84, answer=None, split="train")
    assert len(draw(sampler, [exact])) == 3
    assert draw(sampler, []) == []


@pytest.mark.engine
def test_stories_end_with_their_own_stop_token() -> None:
    """The pretrained model ends a story with <s> (id 1), as only generation_config.json says; a cut story has none."""
    from transformers import AutoTokenizer

    if not STORIES.is_dir():
        pytest.skip("the stories model is not on this machine")
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    prompts = [prompt_of(t, tokenizer) for t in ("Once upon a time, there was a", "Tom and Lily went to the")]
    sampler = Sampler(STORIES, recipe_for(STORIES, max_new_tokens=300), Ranks())
    samples = draw(sampler, prompts, n=8, temperature=1.0)
    sampler.close()
    stopped = [s for s in samples if s.finish_reason == "stop"]
    assert sampler.stop_ids == [1, 2]
    assert stopped and all(s.response_ids[-1] == 1 and 1 not in s.response_ids[:-1] for s in stopped)
    cut = [s for s in samples if s.finish_reason == "length"]
    assert all(len(s.response_ids) == 300 and not {1, 2} & set(s.response_ids) for s in cut)
    text_of = {p.id: p.text for p in prompts}
    for sample in samples:
        whole = tokenizer.decode([*sample.prompt_ids, *sample.response_ids], skip_special_tokens=True)
        assert text_of[sample.prompt_id] + sample.text == whole
        assert "<s>" not in sample.text


@pytest.mark.engine
def test_settings_go_through_and_bad_ones_are_named(model_dir: Path) -> None:
    made = Sampler(model_dir, recipe_for(model_dir, engine={"max_model_len": 40, "max_num_seqs": 2}), Ranks())
    assert made.context == 40
    assert made.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs == 2
    made.close()
    with pytest.raises(InputError, match=r"sampling\.engine\.max_num_seq: .*did you mean max_num_seqs\?"):
        Sampler(model_dir, recipe_for(model_dir, engine={"max_num_seq": 2}), Ranks())
    with pytest.raises(InputError, match=r"sampling\.engine: vLLM refuses .*max_model_len"):
        Sampler(model_dir, recipe_for(model_dir, engine={"max_model_len": 4000}), Ranks())


@pytest.mark.parametrize("name", ["trust_remote_code", "load_format", "dtype", "tensor_parallel_size", "worker_cls"])
def test_settings_that_would_break_the_loop_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"sampling\.engine\.{name}: cannot be set"):
        check_engine_settings({name: 1}, "sampling.engine")
    check_engine_settings({"max_num_seqs": 64, "gpu_memory_utilization": 0.4}, "sampling.engine")


def test_memory_of_a_token_by_hand() -> None:
    """Two tensors (keys, values) x 5 layers x 4 heads x 32 numbers: 1280 numbers."""
    config = {"num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    assert kv_bytes_per_token(config, "float32") == 1280 * 4
    assert kv_bytes_per_token({"text_config": config}, "bfloat16") == 1280 * 2
    assert context_length({"text_config": {"max_position_embeddings": 77}}) == 77


def test_stop_ids_join_tokenizer_and_generation_config(tmp_path: Path) -> None:
    assert stop_ids(tmp_path, None) == []
    assert stop_ids(tmp_path, 7) == [7]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 2]}')
    assert stop_ids(tmp_path, 7) == [2, 7, 9]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert stop_ids(tmp_path, None) == [0]
