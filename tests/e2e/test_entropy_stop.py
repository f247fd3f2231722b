"""A trainer that ends training for good ends the run: no round is sampled in vain, and a restart knows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import TINY, read_summary

pytestmark = pytest.mark.engine

TRAINING = """
training:
  algorithm: d2o
  learning_rate: 1e-2
  responses_per_step: 16
  tokens_per_batch: 256
  epochs: 4
  negative: {entropy_stop: 1.0, self_from: 0.0, preflight: {mode: "off"}}
rounds: {count: 3, prompts_per_round: 24}
"""


def test_the_run_ends_with_the_round_that_stopped_it(tmp_path: Path, align: Callable) -> None:
    lines = TINY.format(output=tmp_path / "runs").splitlines()
    kept = [line for line in lines if not line.startswith(("pairs:", "training:", "rounds:"))]
    recipe, run_dir = tmp_path / "tiny.yaml", tmp_path / "runs" / "tiny"
    recipe.write_text("\n".join(kept) + TRAINING)
    killed = align("run", recipe, fault="loop.train.after")
    assert killed.status not in (0, 2), killed.err
    report = json.loads((run_dir / "rounds" / "00000" / "training.json").read_text())
    assert "training.negative.entropy_stop" in report["stopped"] and report["counts"]["responses after the stop"] > 0

    refused = align("sample", recipe)
    assert refused.status == 2 and "training has ended: step" in refused.err

    done = align("run", recipe)
    assert done.status == 0, done.err
    assert f"the run ends after 1 of 3 rounds: {report['stopped']}" in done.out + done.err
    summary = read_summary(run_dir)
    assert (summary["status"], summary["rounds"], summary["stopped"]) == ("done", 1, report["stopped"])
    assert [row["round"] for row in summary["history"]] == [0, 1]  # what was trained is measured
    assert (run_dir / "export" / "model.safetensors").is_file()
    stages = {file.name.rsplit("-", 1)[0] for file in (run_dir / "rounds" / "00001").glob("*.parquet")}
    assert stages == {"eval_samples", "eval_verdicts", "eval_gold"}

    again = align("run", recipe)
    assert again.status == 0 and "is finished" in again.out + again.err
