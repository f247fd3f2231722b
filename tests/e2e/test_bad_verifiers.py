"""Verifiers that are worth nothing, in whole runs: what they did is counted and told, and the round goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.conftest import Finished, read_summary

pytestmark = pytest.mark.engine
SILENT = 2  # prompts of which no verifier knows what to check
LONG = '[{"check": "characters", "minimum": 3}]'
RECIPE = """
name: bad
output_dir: {folder}
policy:
  from_scratch: {{hidden_size: 64, intermediate_size: 128, layers: 1, heads: 2, kv_heads: 1, head_dim: 32, context: 32}}
  dtype: float32
cold_start: {{source: {folder}/lessons.jsonl, steps: 5, batch_size: 8, examples: 24, learning_rate: 1e-3}}
prompts: {{source: {folder}/prompts.jsonl, prompt_column: question, split_column: split}}
sampling: {{samples_per_prompt: 4, max_new_tokens: 4, prompts_per_shard: 8}}
verifiers: {verifiers}
ensemble: {{method: auto}}
pairs: {{builder: best_worst}}
training: {{pairs_per_step: 8, tokens_per_batch: 256, zero_stage: 0}}
rounds: {{count: 1, prompts_per_round: 12, on_empty: continue}}
evaluation: {{prompts: 2, samples_per_prompt: 1, k: [1], bootstrap: 20}}
"""


def run(folder: Path, align: Callable[..., Finished], verifiers: list[dict[str, Any]]) -> tuple[dict, list, list, list]:
    """The summary, and the verdicts, scores and pairs of the round."""
    rows = [
        {
            "question": f"{i}+{i}=",
            "split": "eval" if i >= 12 else "train",
            "checks": "" if i < SILENT else LONG,
            "broken": "not a list of checks",
        }
        for i in range(14)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lessons = [{"prompt": f"{i}-{i}=", "response": str(i)} for i in range(24)]
    (folder / "lessons.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lessons))
    recipe = folder / "bad.yaml"
    recipe.write_text(RECIPE.format(folder=folder, verifiers=json.dumps(verifiers)))
    done = align("run", recipe)
    assert done.status == 0, done.err
    rounds = folder / "bad" / "rounds" / "00000"
    verdicts, scores, pairs = ([r for f in rounds.glob(f"{s}-*.parquet") for r in pq.read_table(f).to_pylist()]
                               for s in ("verdicts", "scores", "pairs"))  # fmt: skip
    return read_summary(folder / "bad"), verdicts, scores, pairs


def test_one_that_is_constant_and_one_that_always_fails(tmp_path: Path, align: Callable[..., Finished]) -> None:
    """The failure stands as none with its reason, never as 0, and costs no response its score."""
    reason = "column broken is not JSON"
    summary, verdicts, scores, _ = run(
        tmp_path,
        align,
        [
            {"kind": "format", "name": "constant", "pattern": "(?s).*"},
            {"kind": "instructions", "name": "failing", "column": "broken"},
            {"kind": "length", "name": "long", "unit": "characters", "minimum": 3},
            {"kind": "length", "name": "short", "unit": "characters", "maximum": 3},
            {"kind": "repetition", "name": "varied", "n": 1},
        ],
    )
    assert summary["status"] == "done" and len(scores) == 12 * 4
    assert {(row["value"], row["reason"]) for row in verdicts if row["verifier"] == "failing"} == {(None, reason)}
    failing, constant = summary["verifiers"]["failing"], summary["verifiers"]["constant"]
    assert failing["coverage"] == 0.0 and failing["abstained"] == {reason: 48}
    assert constant["coverage"] == constant["positive_rate"] == 1.0
    warnings = summary["ensemble"][0]["warnings"]
    assert "failing gave no verdict at all" in warnings
    assert any(w.startswith("constant said the same of 100.0% of the responses") for w in warnings)
    assert all(0.0 <= row["p_good"] <= 1.0 and row["voters"] <= 4 for row in scores)


def test_two_verifiers_that_are_silent_on_a_prompt(tmp_path: Path, align: Callable[..., Finished]) -> None:
    """The prompt is left out and counted; two verifiers cannot judge each other, so their mean is used."""
    summary, verdicts, scores, pairs = run(
        tmp_path,
        align,
        [
            {"kind": "instructions", "name": "one", "column": "checks"},
            {"kind": "instructions", "name": "other", "column": "checks", "checks": [{"check": "no_commas"}]},
        ],
    )
    found = summary["ensemble"][0]
    assert summary["status"] == "done" and found["method"] == "mean"
    assert "2 verifiers or families speak, and it takes 3" in found["why"]
    assert found["counts"] == {"scored": (12 - SILENT) * 4, "too_few_voters": SILENT * 4}
    silent = {row["sample_id"] for row in verdicts if row["value"] is None}
    assert len(silent) == SILENT * 4 and not silent & {row["sample_id"] for row in scores}
    assert not silent & {row[key] for row in pairs for key in ("chosen_id", "rejected_id")}
    assert summary["verifiers"]["one"]["abstained"] == {"the prompt has no text in column checks": SILENT * 4}
