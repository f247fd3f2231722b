"""Per-step pairs on column-by-column sums with the real vLLM: killed, resumed, on one rank and on two."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.engine

COLUMNS = """
name: columns
seed: 3
output_dir: {output}
policy:
  from_scratch: {{hidden_size: 64, intermediate_size: 128, layers: 2, heads: 2, kv_heads: 1, head_dim: 32, context: 40}}
  dtype: float32
cold_start: {{steps: 100, batch_size: 32, examples: 2000, error_rate: 0.4, learning_rate: 5e-3}}
prompts: {{arithmetic: {{digits: 1, count: 60, solution: columns}}, eval_fraction: 0.3}}
sampling: {{samples_per_prompt: 6, max_new_tokens: 24, prompts_per_shard: 8}}
verifiers:
  - {{kind: arithmetic, name: nines, check: nines}}
  - {{kind: arithmetic, name: last_digit, check: last_digit}}
  - {{kind: self_consistency, name: frequency}}
pairs:
  builder: per_step
  steps: {{separator: ",", rollouts: 4, best_of: 3, shared_prefix: true, prompts_per_shard: 4}}
training: {{learning_rate: 1e-3, pairs_per_step: 8, tokens_per_batch: 256, zero_stage: 2}}
rounds: {{count: 1, prompts_per_round: 16}}
evaluation: {{prompts: 4, samples_per_prompt: 2, k: [1], bootstrap: 10}}
"""
MADE = ("rollouts", "prefix_values", "step_samples", "pairs")


def write(folder: Path) -> Path:
    folder.mkdir()
    recipe = folder / "columns.yaml"
    recipe.write_text(COLUMNS.format(output=folder / "runs"))
    return recipe


def made(recipe: Path) -> dict[str, bytes]:
    folder = recipe.parent / "runs" / "columns" / "rounds" / "00000"
    return {f.name: f.read_bytes() for stage in MADE for f in sorted(folder.glob(f"{stage}-*.parquet"))}


def table(recipe: Path, stage: str) -> list[dict]:
    folder = recipe.parent / "runs" / "columns" / "rounds" / "00000"
    return [row for file in sorted(folder.glob(f"{stage}-*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_two_killed_ranks_make_the_pairs_of_one_that_was_not(tmp_path: Path, align: Callable) -> None:
    """Killed inside the rollouts, and again between rollouts and pairs; then one rank makes them anew in one go.

    Both go on from the same cold start: two ranks train another one than one rank does, in the last bits.
    """
    recipe = write(tmp_path / "columns")
    killed = align("run", recipe, "--ranks", "2", fault="pair.rollouts.shard:2@0")
    assert killed.status not in (0, 2), killed.out
    before = made(recipe)
    assert before and not table(recipe, "pairs")
    shutil.copytree(recipe.parent / "runs", tmp_path / "saved")
    killed = align("pair", recipe, "--ranks", "2", fault="pair.rollouts.after@0")
    assert killed.status not in (0, 2) and table(recipe, "prefix_values") and not table(recipe, "pairs")
    done = align("pair", recipe, "--ranks", "2")
    assert done.status == 0, done.err
    two = made(recipe)
    assert before.items() <= two.items()

    shutil.rmtree(recipe.parent / "runs")
    shutil.move(tmp_path / "saved", recipe.parent / "runs")
    for file in (recipe.parent / "runs" / "columns" / "rounds" / "00000").iterdir():
        if file.name.startswith(MADE):
            file.unlink()
    done = align("run", recipe)
    assert done.status == 0, done.err
    assert made(recipe) == two and len(two) > len(MADE)

    samples = {row["id"]: row for stage in ("samples", "step_samples") for row in table(recipe, stage)}
    pairs = table(recipe, "pairs")
    assert pairs
    for pair in pairs:
        chosen, rejected = samples[pair["chosen_id"]], samples[pair["rejected_id"]]
        assert chosen["prompt_ids"] == rejected["prompt_ids"] and chosen["prompt_id"] == pair["prompt_id"]
        assert len(chosen["logprobs"]) == len(chosen["response_ids"])
    run_dir = recipe.parent / "runs" / "columns"
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert sum(step["pairs"] for step in steps) == len(pairs) and all(step["grad_norm"] > 0 for step in steps)
    told = json.loads((run_dir / "rounds" / "00000" / "pairing.json").read_text())
    assert told["counts"]["pairs"] == len(pairs)
