"""What several test files share: a recipe small enough to run end to end in seconds, and a way to run `align`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TINY = """
name: tiny
seed: 3
output_dir: {output}
policy:
  from_scratch: {{hidden_size: 64, intermediate_size: 128, layers: 2, heads: 2, kv_heads: 1, head_dim: 32, context: 32}}
  dtype: float32
cold_start: {{steps: 30, batch_size: 32, examples: 500, error_rate: 0.5, learning_rate: 5e-3}}
prompts:
  arithmetic: {{digits: 1, count: 60}}
  eval_fraction: 0.3
sampling: {{samples_per_prompt: 4, max_new_tokens: 4, prompts_per_shard: 8}}
verifiers:
  - {{kind: arithmetic, name: nines, check: nines}}
  - {{kind: arithmetic, name: parity, check: parity}}
  - {{kind: arithmetic, name: last_digit, check: last_digit}}
  - {{kind: self_consistency, name: frequency}}
ensemble: {{method: dawid_skene}}
pairs: {{builder: top_bottom, k: 1}}
training: {{learning_rate: 1e-3, pairs_per_step: 8, tokens_per_batch: 256, zero_stage: 2}}
rounds: {{count: 2, prompts_per_round: 24}}
evaluation: {{prompts: 8, samples_per_prompt: 2, k: [1, 2], bootstrap: 50, gold: {{kind: answer, name: correct}}}}
"""


@dataclass(frozen=True)
class Finished:
    """A command that ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def tiny_recipe(tmp_path: Path) -> Path:
    """A recipe file for a run under `tmp_path`: two rounds on one-digit addition."""
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY.format(output=tmp_path / "runs"))
    return file


@pytest.fixture
def align() -> Callable[..., Finished]:
    """Run `align ARGUMENTS` in a process of its own; `fault` kills it at a named point."""

    def run(*arguments: str | Path, fault: str = "", timeout_s: float = 400.0) -> Finished:
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment["ALIGN_FAULT"] = fault
        command = [sys.executable, "-m", "align.cli", *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


def read_summary(run_dir: Path) -> dict[str, Any]:
    """The run's summary.json."""
    return json.loads((run_dir / "summary.json").read_text())
