"""The export is the trained policy, or there is no export."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from align import export as export_module
from align.distributed import Ranks
from align.errors import RunError
from align.export import export
from align.recipe import Recipe
from align.training.engine import PolicyEngine
from align.training.scratch import create_model
from tests.e2e.engines import SHAPE, probes, recipe_for

VOCABULARY = 3 + len(SHAPE.characters)
pytestmark = pytest.mark.engine


class Store:
    """As much of the store as an export needs: a directory that is renamed at the end, or is gone."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @contextmanager
    def commit_directory(self, name: str) -> Iterator[Path]:
        temporary = self.root / f"tmp-{name}"
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(self.root / name)


def trained(folder: Path, dtype: str, lora: dict[str, Any] | None, mode: str) -> tuple[PolicyEngine, Recipe]:
    """A policy whose trained parameters were moved by hand, under the real trainer."""
    create_model(folder, SHAPE, seed=6)
    raw = recipe_for(folder, dtype=dtype).model_dump()
    raw["policy"]["lora"], raw["export"]["lora"] = lora, mode
    recipe = Recipe.model_validate(raw)
    policy = PolicyEngine(folder, recipe, Ranks(), total_steps=1)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return policy, recipe


@pytest.mark.parametrize(
    ("dtype", "lora", "mode", "bound"),
    [
        ("float32", None, "merge", 1e-5),
        ("bfloat16", None, "merge", 0.05),
        ("float32", {"r": 4}, "merge", 1e-5),
        ("float32", {"r": 4, "target_modules": ["q_proj", "down_proj"]}, "keep", 1e-5),
    ],
)
def test_reloaded_copies_give_the_trained_log_probs(
    tmp_path: Path, dtype: str, lora: dict[str, Any] | None, mode: str, bound: float
) -> None:
    policy, recipe = trained(tmp_path / "start", dtype, lora, mode)
    report = export(policy, Store(tmp_path), recipe, card="# A model\n", probes=probes(VOCABULARY))  # type: ignore[arg-type]
    policy.close()
    assert report["transformers"]["mean_abs_difference"] < bound
    assert report["vllm"]["mean_abs_difference"] < bound
    assert report["probe_tokens"] == 37 + 19
    assert set(report["seconds"]) == {"write", "transformers", "vllm"}
    directory = tmp_path / "export"
    assert report["bytes"] == sum(f.stat().st_size for f in directory.iterdir())
    assert (directory / "README.md").read_text() == "# A model\n"
    assert not list(directory.glob("*.bin"))
    if mode == "keep":
        assert (directory / "adapter_model.safetensors").is_file()
        assert json.loads((directory / "adapter_config.json").read_text())["r"] == 4
    else:
        assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == 1
        assert (directory / "model.safetensors").is_file()


@pytest.mark.parametrize("reader", ["transformers", "vLLM"])
def test_files_that_are_not_the_policy_are_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    """Behind the exporter's back the files are replaced by the model from before training."""
    policy, recipe = trained(tmp_path / "start", "float32", None, "merge")
    written = policy.save_pretrained

    def old_weights(directory: Path, lora: str) -> None:
        written(directory, lora)
        (directory / "model.safetensors").write_bytes((tmp_path / "start" / "model.safetensors").read_bytes())

    monkeypatch.setattr(policy, "save_pretrained", old_weights)
    if reader == "vLLM":  # let the first check pass, to see that the second one looks for itself
        asked = iter([True])
        compare = export_module._compare
        monkeypatch.setattr(export_module, "_compare", lambda *a: {} if next(asked, False) else compare(*a))
    with pytest.raises(
        RunError, match=rf"export: reloaded in {reader}, the model's log-probs differ.*tolerance 0.0001"
    ):
        export(policy, Store(tmp_path), recipe, card="", probes=probes(VOCABULARY))  # type: ignore[arg-type]
    policy.close()
    assert not (tmp_path / "export").exists()


def test_another_tokenizer_or_stop_token_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, recipe = trained(tmp_path / "start", "float32", None, "merge")
    written = policy.save_pretrained

    def changed(file: str, old: str, new: str) -> None:
        def save(directory: Path, lora: str) -> None:
            written(directory, lora)
            text = (directory / file).read_text()
            assert old in text
            (directory / file).write_text(text.replace(old, new))

        monkeypatch.setattr(policy, "save_pretrained", save)

    changed("tokenizer.json", '"+"', '"#"')
    with pytest.raises(RunError, match="the tokenizer read back from its files is not the policy's"):
        export(policy, Store(tmp_path / "one"), recipe, card="", probes=probes(VOCABULARY))  # type: ignore[arg-type]
    changed("generation_config.json", '"eos_token_id": 1', '"eos_token_id": 5')
    with pytest.raises(RunError, match=r"responses end at tokens \[1\], and with the exported files at \[1, 5\]"):
        export(policy, Store(tmp_path / "two"), recipe, card="", probes=probes(VOCABULARY))  # type: ignore[arg-type]
    policy.close()
