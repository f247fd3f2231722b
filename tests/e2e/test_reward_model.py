"""A reward model through vLLM pooling: the logits of transformers, beside a sampler, on one rank and on two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from align.distributed import Ranks
from align.errors import InputError
from align.sampling.engine import Sampler
from align.training.scratch import build_tokenizer, create_model
from align.verifiers.base import Abstain, Item
from align.verifiers.reward_model import RewardModel, check, label_count
from align.verifiers.spec import RewardModelSpec
from tests.e2e.engines import SHAPE, recipe_for

TEMPLATE = "{% for m in messages %}{{ m['role'][0] ~ ':' ~ m['content'] ~ ';' }}{% endfor %}"
ITEMS = (("12+3=", "15"), ("12+3=", "16?"), ("7*8=", "56"), ("9-", "4=5"), ("12+3=", "15"))


def make_reward_model(folder: Path, labels: int = 1, **config: Any) -> Path:
    """A two-layer Qwen3 classifier with a head large enough that scores differ."""
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    tokenizer = build_tokenizer(SHAPE)
    tokenizer.chat_template = TEMPLATE
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 40,
        "num_labels": labels, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(2)
    Qwen3ForSequenceClassification(Qwen3Config(**(settings | config))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reward_model(tmp_path_factory.mktemp("reward"))


def spec(folder: Path, **changed: Any) -> RewardModelSpec:
    return RewardModelSpec.model_validate({"kind": "reward_model", "name": "rm", "model": str(folder), **changed})


def items(pairs: Any = ITEMS) -> list[Item]:
    return [Item(f"s{i}", "p", p, r, None, len(r), "stop") for i, (p, r) in enumerate(pairs)]


def by_transformers(folder: Path, sequences: list[list[int]]) -> list[float]:
    """Right-padded, all in one batch: transformers' own pooling of the last real token."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    width = max(map(len, sequences))
    ids = torch.tensor([[*s, *[0] * (width - len(s))] for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[RewardModel]:
    made = RewardModel(spec(folder), dtype="float32")
    yield made
    made.close()


@pytest.mark.engine
def test_raw_logits_equal_transformers(model: RewardModel, folder: Path) -> None:
    batch = items()
    found = model.verify(batch)
    tokenizer = build_tokenizer(SHAPE)
    expected = by_transformers(folder, [tokenizer(i.prompt + i.response)["input_ids"] for i in batch])
    assert found == pytest.approx(expected, abs=1e-4)
    assert found[0] == found[4]
    assert max(found) - min(found) > 0.5, "a test of equal numbers would prove little"
    assert not all(0.0 < value < 1.0 for value in found), "no sigmoid"


@pytest.mark.engine
def test_a_score_does_not_depend_on_what_else_is_asked(model: RewardModel) -> None:
    together = model.verify(items())
    assert model.verify(items()) == together  # to the bit, for the same batch
    alone = [model.verify([item])[0] for item in items()]
    assert alone == pytest.approx(together, abs=1e-5)
    assert model.verify([]) == []


@pytest.mark.engine
def test_too_long_or_empty_is_an_abstention(model: RewardModel) -> None:
    verdicts = model.verify(items((("1" * 20, "2" * 20), ("1" * 20, "2" * 21), ("", ""), ("1+1=", "2"))))
    assert isinstance(verdicts[0], float) and isinstance(verdicts[3], float)
    assert isinstance(verdicts[1], Abstain) and str(verdicts[1]) == "41 tokens, and the reward model takes 1 to 40"
    assert isinstance(verdicts[2], Abstain)


@pytest.mark.engine
def test_chat_template_eos_and_a_lower_limit_beside_a_sampler(folder: Path, tmp_path: Path) -> None:
    """Three engines in one process: a sampler, a templated reward model, one that ends inputs with <eos>."""
    create_model(tmp_path / "policy", SHAPE, seed=1)
    sampler = Sampler(tmp_path / "policy", recipe_for(tmp_path / "policy"), Ranks())
    before = sampler.prompt_logprobs([[3, 4, 5, 6]])
    chat = RewardModel(spec(folder, chat_template=True, max_tokens=14), dtype="float32")
    ended = RewardModel(spec(folder, append_eos=True), dtype="float32")
    (item,) = items((("1+1=", "2"),))
    tokenizer = build_tokenizer(SHAPE)
    rendered = tokenizer("u:1+1=;a:2;")["input_ids"]
    assert chat.input_ids(item) == rendered
    assert chat.input_ids(replace(item, prompt="u:1+1=;", turns=(("user", "1+1="),))) == rendered  # wrapped once
    assert chat.account() == {}
    joined = [*tokenizer("1+1=2")["input_ids"], 1]
    assert ended.input_ids(item) == joined
    assert chat.verify([item]) == pytest.approx(by_transformers(folder, [rendered]), abs=1e-4)
    assert ended.verify([item]) == pytest.approx(by_transformers(folder, [joined]), abs=1e-4)
    assert isinstance(chat.verify(items((("1" * 9, "2"),)))[0], Abstain)
    assert chat.account() == {"requests": 1, "tokens_read": len(rendered)}
    end = tokenizer.eos_token
    assert tokenizer.eos_token_id not in chat.input_ids(replace(item, response=f"2{end}3"))
    assert tokenizer.eos_token_id not in ended.input_ids(replace(item, response=f"2{end}3"))[:-1]
    chat.close()
    ended.close()
    assert sampler.prompt_logprobs([[3, 4, 5, 6]]) == before
    sampler.close()


SCRIPT = """
import sys
from pathlib import Path
from align import distributed
from align.sampling.engine import Sampler
from align.verifiers.reward_model import RewardModel
from tests.e2e.engines import recipe_for
from tests.e2e.test_reward_model import items, spec
ranks = distributed.connect()
sampler = Sampler(Path(sys.argv[1]), recipe_for(Path(sys.argv[1])), ranks)
model = RewardModel(spec(Path(sys.argv[2])), dtype="float32")
scores = ranks.gather(model.verify(items()) if ranks.rank else model.verify(items())[:5])
model.close()
sampler.prompt_logprobs([[3, 4, 5]])
sampler.close()
if ranks.rank == 0:
    print("SCORES", scores[0] == scores[1], scores[0])
distributed.close(ranks)
"""


@pytest.mark.engine
def test_two_ranks_score_alike(model: RewardModel, folder: Path, tmp_path: Path) -> None:
    create_model(tmp_path / "policy", SHAPE, seed=1)
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path / "policy"), str(folder)],
        capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    same, scores = done.stdout.split("SCORES ")[1].splitlines()[0].split(" ", 1)
    assert same == "True"
    assert json.loads(scores) == pytest.approx(model.verify(items()), abs=1e-5)


def test_checkpoints_that_cannot_score_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"verifiers\.rm\.model: .* has 3 labels; a reward model has one"):
        check(spec(make_reward_model(tmp_path / "three", labels=3)))
    create_model(tmp_path / "causal", SHAPE, seed=1)
    with pytest.raises(InputError, match="Qwen3ForCausalLM; a reward model is a sequence classifier"):
        check(spec(tmp_path / "causal"))
    pickled = make_reward_model(tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(InputError, match=r"verifiers\.rm\.model: .*pickle only \(pytorch_model\.bin\)"):
        check(spec(pickled))
    with pytest.raises(InputError, match=r"verifiers\.rm\.model: .*no such directory"):
        check(spec(tmp_path / "absent"))
    with pytest.raises(InputError, match=r"verifiers\.rm\.engine\.runner: cannot be set"):
        check(spec(folder, engine={"runner": "generate"}))
    assert check(spec(folder))[0] == folder.resolve()


def test_settings_that_do_not_go_with_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rm\.append_eos: a chat template ends its turns itself"):
        RewardModel(spec(folder, append_eos=True, chat_template=True))
    padded = make_reward_model(tmp_path / "padded", pad_token_id=1)
    with pytest.raises(InputError, match=r"rm\.append_eos: .*pads with its end-of-sequence token \(1\)"):
        RewardModel(spec(padded, append_eos=True))


def test_labels_by_hand() -> None:
    assert label_count({"id2label": {"0": "good"}}) == 1
    assert label_count({"num_labels": 5}) == 5
    assert label_count({}) == 2
