"""The whole loop on one-digit addition with the real vLLM and the real DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One two-rank run of the tiny recipe, shared by the tests of this file."""
    import subprocess
    import sys

    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("loop")
    recipe = folder / "tiny.yaml"
    recipe.write_text(TINY.format(output=folder / "runs"))
    command = [sys.executable, "-m", "align.cli", "run", str(recipe), "--ranks", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / "tiny"


def test_summary_tells_the_whole_run(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["status"] == "done"
    assert summary["rounds"] == 2
    for moment in ("before", "after"):
        metrics = summary["evaluation"][moment]
        for name in ("accuracy", "pass@1", "pass@2", "kl", "entropy", "length", "verifier/nines"):
            assert metrics[name]["low"] <= metrics[name]["value"] <= metrics[name]["high"]
    assert summary["evaluation"]["before"]["kl"]["value"] == pytest.approx(0.0, abs=1e-6)
    assert summary["evaluation"]["after"]["kl"]["value"] > 0.0
    told = summary["ensemble"][0]
    assert told["diagnostics"]["balance_low"] <= told["class_balance"] <= told["diagnostics"]["balance_high"]
    assert set(summary["verifiers"]) == {"nines", "parity", "last_digit", "frequency"}
    assert summary["tokens"]["sampled"] > 0 and summary["tokens"]["trained"] > 0
    assert all(report["mean_abs_difference"] < 1e-4 for report in summary["sync"])


def test_artifacts_belong_together(finished: Path) -> None:
    """Every verdict, score and pair names a sample that exists; four samples per prompt; gold stays apart."""
    for round_index in range(2):
        folder = finished / "rounds" / f"{round_index:05d}"
        table = {stage: [r for f in sorted(folder.glob(f"{stage}-*.parquet")) for r in pq.read_table(f).to_pylist()]
                 for stage in ("samples", "verdicts", "gold", "scores", "pairs")}  # fmt: skip
        ids = [row["id"] for row in table["samples"]]
        assert len(ids) == len(set(ids)) == 24 * 4
        assert {row["policy_version"] for row in table["samples"]} == {round_index}
        assert len(table["verdicts"]) == 4 * len(ids)
        assert {row["verifier"] for row in table["gold"]} == {"correct"}
        assert {row["sample_id"] for row in table["scores"]} == set(ids)
        prompt_of = {row["id"]: row["prompt_id"] for row in table["samples"]}
        for row in table["pairs"]:
            assert prompt_of[row["chosen_id"]] == prompt_of[row["rejected_id"]] == row["prompt_id"]
            assert 0.0 <= row["p_win"] <= 1.0 - row["p_tie"] + 1e-6


def test_evaluation_prompts_never_train(finished: Path) -> None:
    def prompts(stage: str) -> set[str]:
        files = (finished / "rounds").glob(f"*/{stage}-*.parquet")
        return {row["prompt_id"] for f in files for row in pq.read_table(f, columns=["prompt_id"]).to_pylist()}

    assert prompts("eval_samples") and not prompts("eval_samples") & prompts("samples")


def test_metrics_have_one_line_per_step(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == list(range(1, len(steps) + 1))
    assert all(row["grad_norm"] > 0 for row in rows)


def test_export_is_an_ordinary_checkpoint(finished: Path) -> None:
    """transformers loads it by itself, and it is the trained policy: not the cold start's weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported = AutoModelForCausalLM.from_pretrained(finished / "export")
    start = AutoModelForCausalLM.from_pretrained(finished / "cold_start")
    pairs = zip(exported.parameters(), start.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)
    tokenizer = AutoTokenizer.from_pretrained(finished / "export")
    assert tokenizer.decode(tokenizer("12+34=")["input_ids"]) == "12+34="
    assert not list((finished / "export").glob("*.bin"))
    assert "tiny" in (finished / "export" / "README.md").read_text()


def test_finished_run_says_so(finished: Path, align: Callable) -> None:
    recipe = finished.parent.parent / "tiny.yaml"
    again = align("run", recipe, "--ranks", "2")
    assert again.status == 0
    assert "finished" in again.out


def test_changed_recipe_is_refused(finished: Path, align: Callable) -> None:
    recipe = finished.parent.parent / "tiny.yaml"
    refused = align("run", recipe, "training.learning_rate=2e-3")
    assert refused.status == 2
    assert "training.learning_rate" in refused.err and "0.002" in refused.err


def test_verb_by_verb_is_the_same_as_run(finished: Path, tmp_path: Path, align: Callable) -> None:
    """`align sample`, `score`, `pair`, `train` … on one rank draw the samples that a two-rank run draws."""
    from tests.conftest import TINY

    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY.format(output=tmp_path / "runs"))
    for verb in ("evaluate", "sample", "score", "pair", "train", "export"):
        done = align(verb, recipe)
        assert done.status == 0, f"{verb}: {done.err}"
    run_dir = tmp_path / "runs" / "tiny"
    assert (run_dir / "checkpoints" / "00001").is_dir()
    assert (run_dir / "export-00001" / "model.safetensors").is_file()

    def ids(folder: Path) -> list[str]:
        files = sorted((folder / "rounds" / "00000").glob("samples-*.parquet"))
        return [row["id"] for f in files for row in pq.read_table(f, columns=["id"]).to_pylist()]

    assert ids(run_dir) == ids(finished)
