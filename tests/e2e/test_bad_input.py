"""Bad input through the whole command: one clear message that names file, row and key, and nothing started."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pyarrow.parquet import read_table

from align.errors import InputError
from align.loop import run_verb
from align.recipe_file import load_recipe
from tests.conftest import Finished


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A small model with an alphabet of digits, as a directory of its own."""
    from align.recipe import Scratch
    from align.training.scratch import create_model

    shape = Scratch(hidden_size=64, intermediate_size=128, layers=1, heads=2, kv_heads=1, head_dim=32, context=32)
    create_model(tmp_path / "model", shape, seed=0)
    return tmp_path / "model"


def recipe_for(folder: Path, model: Path, prompts: Path, *more: str) -> Path:
    """A recipe on a local model and a local prompt file."""
    text = f"""
name: bad
output_dir: {folder / "runs"}
policy: {{model: {model}, dtype: float32}}
prompts: {{source: {prompts}, prompt_column: question}}
sampling: {{samples_per_prompt: 2, max_new_tokens: 4}}
verifiers: [{{kind: noise, name: coin}}]
rounds: {{count: 1, prompts_per_round: 2}}
evaluation: {{prompts: 2, samples_per_prompt: 1, k: [1]}}
"""
    file = folder / "bad.yaml"
    file.write_text(text + "\n".join(more))
    return file


def rows(count: int = 20) -> str:
    return "".join(json.dumps({"question": f"{i}+{i}="}) + "\n" for i in range(count))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("absent.jsonl", None, "absent.jsonl"),
        ("empty.jsonl", b"", "empty.jsonl"),
        ("cut.jsonl.gz", gzip.compress(rows().encode())[:-9], "cut.jsonl.gz"),
        ("latin.jsonl", b'{"question": "1+1="}\n{"question": "caf\xe9"}\n', "latin.jsonl"),
        ("column.jsonl", b'{"question": "1+1="}\n{"prompt": "2+2="}\n', "column.jsonl:2"),
        ("torn.jsonl", b'{"question": "1+1="}\n{"question": "2+', "torn.jsonl:2"),
        ("letters.jsonl", (rows() + '{"question": "x\\u00e9y"}\n').encode(), "letters.jsonl:21"),
    ],
)
def test_prompt_files(tmp_path: Path, model_dir: Path, name: str, content: bytes | None, expected: str) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        run_verb(load_recipe(recipe_for(tmp_path, model_dir, file)), "run")
    assert expected in str(caught.value)


def test_prompt_longer_than_the_context_is_counted_and_refused(tmp_path: Path, model_dir: Path) -> None:
    file = tmp_path / "long.jsonl"
    file.write_text(rows() + json.dumps({"question": "1+" * 30}) + "\n")
    with pytest.raises(InputError) as caught:
        run_verb(load_recipe(recipe_for(tmp_path, model_dir, file)), "run")
    for named in ("long.jsonl:21", "max_dropped_fraction", "1 of 21"):
        assert named in str(caught.value)


@pytest.mark.parametrize("damage", ["no weights", "pickle", "remote code", "cut weights"])
def test_model_directories(tmp_path: Path, model_dir: Path, damage: str) -> None:
    weights = model_dir / "model.safetensors"
    if damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "remote code":
        config = json.loads((model_dir / "config.json").read_text())
        (model_dir / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}))
    else:
        weights.unlink()
        if damage == "pickle":
            (model_dir / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(rows())
    with pytest.raises(InputError, match="policy.model") as caught:
        run_verb(load_recipe(recipe_for(tmp_path, model_dir, prompts)), "run")
    assert str(model_dir) in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_verifier_file_that_is_not_there_is_named_before_anything_starts(tmp_path: Path, tiny_recipe: Path) -> None:
    recipe = load_recipe(
        tiny_recipe, ["evaluation.gold={kind: lexicon, name: mood, file: nowhere.txt}", "evaluation.k=[1]"]
    )
    with pytest.raises(InputError, match=r"evaluation\.gold.*nowhere\.txt"):
        run_verb(recipe, "run")


@pytest.mark.engine
def test_a_round_without_a_pair_stops_or_goes_on_as_the_recipe_says(
    tiny_recipe: Path, align: Callable[..., Finished]
) -> None:
    """With one token to choose from a prompt's responses are all the same, so no pair can be made of them."""
    frozen = ["sampling.top_k=1", "rounds.count=1"]
    stopped = align("run", tiny_recipe, *frozen)
    assert stopped.status == 1
    assert "not one usable pair" in stopped.err and "identical" in stopped.err
    went_on = align("run", tiny_recipe, *frozen, "rounds.on_empty=continue", "name=on")
    assert went_on.status == 0, went_on.err
    summary = json.loads((tiny_recipe.parent / "runs" / "on" / "summary.json").read_text())
    assert summary["status"] == "done" and summary["tokens"]["trained"] == 0


@pytest.mark.engine
def test_a_share_of_cut_responses_over_the_recipes_limit_stops_the_run(
    tiny_recipe: Path, align: Callable[..., Finished]
) -> None:
    short = ["sampling.max_new_tokens=3", "sampling.max_cut_fraction=0", "cold_start.steps=1"]
    stopped = align("run", tiny_recipe, *short)
    assert stopped.status == 1
    assert "sampling.max_new_tokens" in stopped.err and "max_cut_fraction" in stopped.err
    again = align("run", tiny_recipe, *short)
    assert (again.status, again.err) == (1, stopped.err), "the same command again must not pass over it"


@pytest.mark.engine
def test_a_full_disk_is_named_and_the_run_goes_on_later(tiny_recipe: Path, align: Callable[..., Finished]) -> None:
    full = align("run", tiny_recipe, "rounds.count=1", fault="store.shard.mid_write:2=ENOSPC")
    assert full.status == 1
    assert "No space left" in full.err and "free" in full.err and "Traceback" not in full.err
    again = align("run", tiny_recipe, "rounds.count=1")
    assert again.status == 0, again.err


def test_out_of_order_verbs_say_what_comes_first(tiny_recipe: Path) -> None:
    recipe = load_recipe(tiny_recipe)
    with pytest.raises(InputError, match="align sample"):
        run_verb(recipe, "score")
    with pytest.raises(InputError, match="round 0"):
        run_verb(recipe, "sample", 1)


@pytest.mark.engine
def test_a_step_that_is_not_finite_leaves_the_names_of_all_its_samples(
    tiny_recipe: Path, align: Callable[..., Finished]
) -> None:
    """A learning rate that throws the weights out of range shows in the second step, before that changes anything."""
    stopped = align("run", tiny_recipe, "training.learning_rate=1e30", "training.pairs_per_step=12")
    run_dir = tiny_recipe.parent / "runs" / "tiny"
    found = json.loads((run_dir / "not_finite.json").read_text())
    assert stopped.status == 1 and "training step 2: the gradient is not finite" in stopped.err
    assert (found["round"], found["step"], found["what"], len(found["samples"])) == (0, 2, "gradient", 12)
    drawn = {r["id"] for f in run_dir.glob("rounds/00000/samples-*.parquet") for r in read_table(f).to_pylist()}
    assert all(set(pair.split("/")) <= drawn for pair in found["samples"])
    assert not any(run_dir.glob("checkpoints/[0-9]*"))
