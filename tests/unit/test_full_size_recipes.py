"""The recipes of full size load, and `align plan` finds room for them on the GPUs that they name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3Config

from align import model_shape, plan
from align.errors import InputError
from align.machine import imagined
from align.plan import make_plan
from align.recipe_file import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
FULL_SIZE = sorted(RECIPES.glob("qwen3_*.yaml"))
SHAPES: dict[str, dict[str, Any]] = {  # hidden, feed-forward, layers, heads, tied head: from the published config.json
    "1.7B": dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16),
    "4B": dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32),
    "8B": dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32),
}
COMMAND = re.compile(r"align plan recipes/\S+?(?: --ranks (\d+))? --gpu-gib (\d+)")


def published(model: str, revision: str | None, *, key: str) -> Qwen3Config:
    """The configuration of a Qwen3 model by the size in its name, as the hub has it."""
    size = next(size for size in SHAPES if f"Qwen3-{size}" in model)
    return Qwen3Config(
        **SHAPES[size],
        vocab_size=151_936,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        tie_word_embeddings=size != "8B",
    )


@pytest.fixture(autouse=True)
def _hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "load_config", published)
    monkeypatch.setattr(model_shape, "load_config", published)


def test_every_family_of_trainers_has_one() -> None:
    assert {load_recipe(path).training.trainer.family for path in FULL_SIZE} == {
        "preference",
        "group",
        "negative",
        "policy_gradient",
        "supervised",
    }


@pytest.mark.parametrize("path", FULL_SIZE, ids=lambda p: p.stem)
def test_it_fits_on_the_gpus_that_its_first_lines_name(path: Path) -> None:
    asked = COMMAND.search(path.read_text())
    assert asked, "the recipe says how to look at it"
    ranks, gib = int(asked[1] or 1), float(asked[2])
    found = make_plan(load_recipe(path), ranks, machine=imagined(ranks, gib, 2048))
    assert 0.2 < found.device_bytes() / found.machine.device_bytes < 0.95


def test_half_the_memory_is_refused_with_the_part_to_make_smaller() -> None:
    with pytest.raises(InputError, match=r"memory: the run needs .*Largest part with a knob"):
        make_plan(load_recipe(RECIPES / "qwen3_8b_grpo.yaml"), 8, machine=imagined(8, 24, 2048))
