"""Every preference loss of TRL 1.16 and its modifiers: loss and gradient within 1e-5, through both real paths."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("preference_trl.py")
TOLERANCE = 1e-5
"""Both sides compute log-probabilities in float32 and subtract a reference: some of the last digits differ."""

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_loss_and_gradient_agree_with_trl(rows: list[dict[str, Any]]) -> None:
    apart = [row for row in rows if not max(row["loss"], row["gradient"]) <= TOLERANCE]
    assert apart == []


def test_every_loss_type_and_modifier_of_trl_is_compared(rows: list[dict[str, Any]]) -> None:
    """The 15 of the DPOTrainer, CPO's four with SimPO, and ORPO; each modifier at least once with each family."""
    from trl import DPOConfig

    said = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert {row["loss_type"] for row in rows if row["trainer"] == "dpo"} == {
        "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
        "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
    }  # fmt: skip
    assert all(f"'{row['loss_type']}'" in said for row in rows if row["trainer"] == "dpo")
    assert {row["loss_type"] for row in rows if row["trainer"] == "cpo"} == {"sigmoid", "hinge", "ipo", "simpo"}
    assert any(row["trainer"] == "orpo" for row in rows)
