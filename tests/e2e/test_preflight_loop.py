"""The pre-flight through the real loop: it is looked at once, decides for the whole run, and survives a kill."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import TINY, read_summary

pytestmark = pytest.mark.engine

LOOK = "{{mode: {mode}, prompts: 8, samples_per_prompt: 8, rise_from: 4}}"


def recipe(folder: Path, mode: str, name: str) -> Path:
    """The tiny recipe with negative-sample reinforcement, which a model this weak has no chance with."""
    lines = TINY.format(output=folder / "runs").replace("name: tiny", f"name: {name}").splitlines()
    kept = [line for line in lines if not line.startswith(("pairs:", "training:"))]
    look = LOOK.format(mode=mode).replace("{{", "{").replace("}}", "}")
    kept.append(
        "training: {algorithm: nsr, learning_rate: 1e-3, responses_per_step: 32, tokens_per_batch: 256, zero_stage: 2, "
        f"negative: {{preflight: {look}}}}}"
    )
    file = folder / f"{name}.yaml"
    file.write_text("\n".join(kept))
    return file


def test_fallback_and_refusal(tmp_path: Path, align: Callable) -> None:
    file = recipe(tmp_path, "fallback", "falls")
    killed = align("run", file, fault="training.step.after:1")
    assert killed.status != 0
    run_dir = tmp_path / "runs" / "falls"
    looked = json.loads((run_dir / "rounds" / "00000" / "preflight.json").read_text())
    done = align("run", file)
    assert done.status == 0, done.err
    assert "pre-flight: " in killed.out + killed.err and "pre-flight: pass@" not in done.out + done.err  # one look

    summary = read_summary(run_dir)
    assert summary["preflight"] == looked
    assert (looked["decision"], looked["trains_with"], looked["judge"]) == ("fallback", "w_reinforce", "gold")
    assert set(looked["pass"]) == {"1", "2", "4", "8"} and looked["pass"]["8"] < 0.9
    assert "pass@8 is below 0.9" in looked["explain"]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert sum(row["right"] for row in rows) > 0  # negative-sample reinforcement would have computed none of them

    refused = recipe(tmp_path, "refuse", "stops")
    start = f"policy.model={run_dir / 'cold_start'}"
    stopped = align("run", refused, start, "policy.from_scratch=null", "cold_start=null")
    assert stopped.status == 1 and "training.negative.preflight.mode" in stopped.err
    folder = tmp_path / "runs" / "stops" / "rounds" / "00000"
    kept = json.loads((folder / "preflight.json").read_text())
    assert kept["decision"] == "refuse" and kept["trains_with"] is None
    assert not list(folder.glob("samples-*.parquet")) and not (tmp_path / "runs" / "stops" / "metrics.jsonl").exists()
