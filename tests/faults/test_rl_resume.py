"""A killed PPO run goes on to the same policy and the same critic, byte for byte."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.conftest import TINY

pytestmark = pytest.mark.engine

TRAINING = """
training:
  algorithm: {algorithm}
  learning_rate: 1e-3
  responses_per_step: 32
  tokens_per_batch: 256
  epochs: 2
  rl: {{kl: {{target: 0.5}}, critic: {{learning_rate: 1e-3}}}}
"""
POINT = "training.step.after:9"  # in the second round, so that the critic comes from a checkpoint


def write_recipe(folder: Path, algorithm: str) -> Path:
    folder.mkdir()
    text = TINY.format(output=folder / "runs")
    kept = [line for line in text.splitlines() if not line.startswith(("pairs:", "training:"))]
    recipe = folder / "tiny.yaml"
    recipe.write_text("\n".join(kept) + TRAINING.format(algorithm=algorithm))
    return recipe


def weights(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "export" / "model.safetensors").read_bytes()).hexdigest()


def figures(run_dir: Path) -> list[dict]:
    """Every step's metrics but the wall time."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_a_killed_run_ends_with_the_same_policy_and_critic(tmp_path: Path, align: Callable) -> None:
    """pairwise_ppo: a critic, an adaptive coefficient, and a greedy response of each prompt as the anchor."""
    straight, broken = (write_recipe(tmp_path / name, "pairwise_ppo") for name in ("straight", "broken"))
    done = align("run", straight)
    assert done.status == 0, done.err
    killed = align("run", broken, fault=POINT)
    assert killed.status not in (0, 2), f"{POINT} was not reached:\n{killed.out}\n{killed.err}"
    last = align("run", broken)
    assert last.status == 0, last.err
    expected, found = straight.parent / "runs" / "tiny", broken.parent / "runs" / "tiny"
    assert weights(found) == weights(expected)
    assert figures(found) == figures(expected)  # losses, values and coefficient of every step
    drawn = [r for f in sorted(expected.glob("rounds/00000/samples-*.parquet")) for r in pq.read_table(f).to_pylist()]
    greedy = [r for r in drawn if r["temperature"] == 0.0]
    assert len(drawn) == 24 * 5 and len(greedy) == 24 == len({r["prompt_id"] for r in greedy})
    assert {r["index"] for r in greedy} == {4}
