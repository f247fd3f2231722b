"""Conditional training, with half of the network frozen, through the whole loop with the real vLLM and DeepSpeed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.conftest import TINY

pytestmark = pytest.mark.engine

TRAINING = """training:
  algorithm: sft
  loss: {name: conditional}
  supervised: {control: [b, gg], control_drop_rate: 0.2}
  freeze: half
  learning_rate: 1e-3
  responses_per_step: 8
  tokens_per_batch: 256
  zero_stage: 2"""


def conditional(output: Path) -> str:
    """The tiny recipe with another trainer; `b` is one token that it never saw, `gg` is two."""
    text = TINY.format(output=output).replace("context: 32}", 'context: 32, characters: "0123456789+-*=;:, ()cqr?bg"}')
    text = re.sub(r"\npairs: .*", "", text)
    return re.sub(r"training: .*", TRAINING, text)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in its second round's training and went on."""
    import os
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("conditional")
    recipe = folder / "tiny.yaml"
    recipe.write_text(conditional(folder / "runs"))
    command = [sys.executable, "-m", "align.cli", "run", str(recipe)]
    killed = {**os.environ, "ALIGN_FAULT": "training.step.after:15"}
    first = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, env=killed)
    assert first.returncode == -9, first.stdout + first.stderr
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / "tiny"


def rows(run: Path, round_index: int, stage: str) -> list[dict[str, Any]]:
    files = sorted((run / "rounds" / f"{round_index:05d}").glob(f"{stage}-*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_samples_and_evaluation_stand_behind_the_good_text_once_it_is_known(finished: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(finished / "export")
    b, g = tokenizer("bg")["input_ids"]
    bare = {row["prompt_id"]: row["prompt_ids"] for row in rows(finished, 0, "eval_samples")}
    assert all(g not in row["prompt_ids"] for stage in ("samples", "eval_samples") for row in rows(finished, 0, stage))
    for version, stage in ((1, "samples"), (1, "eval_samples"), (2, "eval_samples")):
        found = rows(finished, version, stage)
        assert found and all(row["prompt_ids"][:2] == [g, g] for row in found)
        assert all(b not in row["response_ids"] for row in found)  # one token, so banned
        if stage == "eval_samples":
            assert all(row["prompt_ids"][2:] == bare[row["prompt_id"]] for row in found)


def test_every_scored_response_is_learned_in_every_round(finished: Path) -> None:
    steps = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == list(range(1, 25))
    assert [sum(s["responses"] for s in steps if s["round"] == r) for r in (0, 1)] == [96, 96]


def test_the_export_says_what_to_put_in_front(finished: Path) -> None:
    assert "Put `gg` in front of every prompt" in (finished / "export" / "README.md").read_text()
