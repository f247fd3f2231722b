"""A run with a label file, its ensemble taught to one model, and a run that this model judges; the engines are real."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from reward_models.scorer import make_scorer, score
from tests.conftest import TINY, Finished, read_summary

pytestmark = pytest.mark.engine
LABELS = 20  # prompts, of two digits and so none of the run's own, with a right and a wrong response to each


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of one finished round whose gate sees a label file."""
    folder = tmp_path_factory.mktemp("distil")
    rows = [
        {"prompt": f"{10 + i}+{i % 9}=", "response": str(10 + i + i % 9 + wrong), "label": 1 - bool(wrong)}
        for i in range(LABELS)
        for wrong in (0, 1 + i % 3)
    ]
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = TINY.format(output=folder / "runs").replace("count: 2, prompts_per_round", "count: 1, prompts_per_round")
    text = text.replace("{method: dawid_skene}", f"{{method: auto, labels: {{file: {folder / 'labels.jsonl'}}}}}")
    (folder / "tiny.yaml").write_text(text)
    command = [sys.executable, "-m", "align.cli", "run", str(folder / "tiny.yaml"), "--ranks", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "tiny.yaml"


def test_the_gate_uses_the_label_file_and_the_report_says_so(recipe: Path) -> None:
    run_dir = recipe.parent / "runs" / "tiny"
    found = read_summary(run_dir)["ensemble"][0]
    assert found["labels"] == {"labels": 40, "good": 20, "prompts": 20, "from_gold": 0, "from_file": 40}
    assert found["why"].startswith(f"auto: {found['method']} on 40 labels of 20 prompts (held-out ranking: ")
    folder = run_dir / "rounds" / "00000"
    judged = [row for f in folder.glob("label_verdicts-*.parquet") for row in pq.read_table(f).to_pylist()]
    assert len({(row["sample_id"], row["verifier"]) for row in judged}) == len(judged) == 40 * 4
    scores = [row for f in folder.glob("scores-*.parquet") for row in pq.read_table(f).to_pylist()]
    assert not {row["sample_id"] for row in scores} & {row["sample_id"] for row in judged}


def test_a_distilled_verifier_judges_another_run(recipe: Path, align: Callable[..., Finished]) -> None:
    """What vLLM says in that run is what the checkpoint says in transformers."""
    run_dir = recipe.parent / "runs" / "tiny"
    settings = ("--epochs", "2", "--batch-size", "16", "--learning-rate", "1e-3")
    done = align("distil", recipe, *settings)
    assert done.status == 0, done.err
    report = json.loads((run_dir / "distilled_report.json").read_text())
    assert report["base"] == str(run_dir / "export") and report["served_difference"] < 1e-3
    chosen = report["selection"]
    assert 0 < chosen["prompts"] <= 16 and chosen["first"] <= chosen["best"] and chosen["judged_by"] == "gold"
    assert report["held_out"] == 2 * 8 * 2 and len(report["losses"]) == len(report["checks"]) <= 2
    assert f"retained {chosen['retained']:.3f}" in done.out and str(run_dir / "distilled") in done.out
    again = align("distil", recipe, *settings)
    assert again.status == 2 and "is there already; delete it" in again.err

    student = {"kind": "reward_model", "name": "student", "model": str(run_dir / "distilled")}
    verifiers = [student, *({"kind": "arithmetic", "name": n, "check": n} for n in ("nines", "parity"))]
    done = align("run", recipe, f"verifiers={json.dumps(verifiers)}", "name=next", "ensemble.method=mean")
    assert done.status == 0, done.err
    folder = recipe.parent / "runs" / "next" / "rounds" / "00000"
    rows = {s: [r for f in folder.glob(f"{s}-*.parquet") for r in pq.read_table(f).to_pylist()]
            for s in ("samples", "verdicts")}  # fmt: skip
    said = {row["sample_id"]: row["value"] for row in rows["verdicts"] if row["verifier"] == "student"}
    model, tokenizer = make_scorer(run_dir / "distilled")
    special = set(tokenizer.all_special_ids)
    inputs = [[*s["prompt_ids"], *(t for t in s["response_ids"] if t not in special)] for s in rows["samples"]]
    assert [said[s["id"]] for s in rows["samples"]] == pytest.approx(score(model, inputs), abs=1e-3)
    assert len(said) == 24 * 4 and len(set(said.values())) > 4
