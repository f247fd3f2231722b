"""`align verify` with a reward model: its engine starts by itself, its logits are scores, and its time is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.e2e.test_reward_model import make_reward_model

RECIPE = """
name: check
policy: {{model: {model}, dtype: float32}}
prompts: {{source: arithmetic, arithmetic: {{digits: 1, count: 60}}}}
sampling: {{max_new_tokens: 4}}
verifiers:
  - {{kind: reward_model, name: rm, model: {model}, max_tokens: 8}}
  - {{kind: arithmetic, name: nines, check: nines}}
  - {{kind: arithmetic, name: parity, check: parity}}
"""


@pytest.mark.engine
def test_a_reward_model_scores_a_file_of_responses(tmp_path: Path, align: Callable) -> None:
    model = make_reward_model(tmp_path / "rm")
    (tmp_path / "r.yaml").write_text(RECIPE.format(model=model))
    rows = [{"prompt": f"{k}+3=", "response": str(k + 3 + d), "gold": int(not d)} for k in range(7) for d in (0, 1)]
    rows.append({"prompt": "1+1=", "response": "22222", "gold": 0})  # nine tokens
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = align("verify", tmp_path / "r.yaml", tmp_path / "r.jsonl", "--out", tmp_path / "out")
    assert done.status == 0, done.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    reward = report["verifiers"][0]
    assert (reward["name"], reward["kind"]) == ("rm", "score") and reward["coverage"] == pytest.approx(14 / 15)
    assert reward["failures"] == {"9 tokens, and the reward model takes 1 to 8": 1}
    assert reward["seconds_per_1000"] > 0 and report["true"]["items"] == 15
    assert pq.read_table(tmp_path / "out" / "scores.parquet").num_rows == 15
