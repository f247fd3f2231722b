"""The model made on the spot, and its tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.errors import InputError
from align.recipe import Scratch
from align.training.scratch import create_model

SMALL = Scratch(hidden_size=64, intermediate_size=96, layers=2, heads=4, kv_heads=2, head_dim=32, context=48)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("scratch") / "model"
    create_model(directory, SMALL, seed=5)
    return directory


def test_same_seed_same_bytes_other_seed_other_weights(made: Path, tmp_path: Path) -> None:
    create_model(tmp_path / "again", SMALL, seed=5)
    create_model(tmp_path / "other", SMALL, seed=6)
    names = sorted(file.name for file in made.iterdir())
    assert names == sorted(file.name for file in (tmp_path / "again").iterdir())
    for name in names:
        assert (made / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    assert (made / "model.safetensors").read_bytes() != (tmp_path / "other" / "model.safetensors").read_bytes()


def test_the_caller_s_random_state_is_not_touched(tmp_path: Path) -> None:
    import torch

    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    create_model(tmp_path / "m", SMALL, seed=5)
    assert torch.equal(torch.rand(3), expected)


def test_the_model_has_the_shape_and_dtype_asked_for(made: Path) -> None:
    """Parameters by hand: embedding 27*64; per layer q 64*128, k and v 64*64 each, o 128*64, feed-forward 3*64*96,
    norms 64+64+32+32; one last norm of 64.  The output head is the embedding."""
    model = AutoModelForCausalLM.from_pretrained(made)
    layer = 64 * 128 + 2 * 64 * 64 + 128 * 64 + 3 * 64 * 96 + 64 + 64 + 32 + 32
    assert sum(p.numel() for p in model.parameters()) == 27 * 64 + 2 * layer + 64
    assert model.dtype.is_floating_point and model.dtype.itemsize == 4
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.generation_config.eos_token_id == 1 and model.generation_config.pad_token_id == 0
    assert model.config.max_position_embeddings == 48
    spread = model.get_input_embeddings().weight.std().item()
    assert spread == pytest.approx(64**-0.5, rel=0.1)


def test_one_token_per_character_and_nothing_added(made: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made)
    ids = tokenizer("12 + 3=")["input_ids"]
    assert ids == [4, 5, 20, 13, 20, 6, 16]  # <pad> <eos> <unk> 0 1 2 … with "+" at 13, "=" at 16, " " at 20
    assert tokenizer.decode(ids) == "12 + 3="
    assert tokenizer.decode([*ids, 1, 0], skip_special_tokens=True) == "12 + 3="
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.bos_token_id is None
    assert tokenizer("1\nx")["input_ids"] == [4, 2, 2]


def test_untied_head_is_a_tensor_of_its_own(tmp_path: Path) -> None:
    create_model(tmp_path, SMALL.model_copy(update={"tie_word_embeddings": False}), seed=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"characters": "0123456789+=1"}, "characters: '1' stands there more than once"),
        ({"characters": ""}, "characters: is empty"),
        ({"kv_heads": 3}, "kv_heads: 3 does not divide heads"),
        ({"head_dim": 33}, "head_dim: 33 is odd"),
    ],
)
def test_impossible_shapes_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_model(tmp_path / "m", SMALL.model_copy(update=change), seed=0)
    assert not (tmp_path / "m").exists()
