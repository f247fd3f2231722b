"""This project's DPO against TRL's `DPOTrainer`, step by step, with both optimizers running."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.dpo_vs_trl import Worker, make_model

STEPS = 6

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("case", ["24+12", "5+20"])
def test_the_losses_of_trl_step_by_step(tmp_path: Path, case: str) -> None:
    """Same model, pairs and optimizer: the losses agree while the policy moves away from the live reference."""
    make_model(tmp_path, layers=2, width=64)
    workers = [Worker(side, case, tmp_path, STEPS, STEPS) for side in ("ours", "trl")]
    for worker in workers:
        worker.block()
    ours, trl = (worker.end()["losses"] for worker in workers)
    assert ours[0] == pytest.approx(math.log(2), abs=1e-6)
    assert max(abs(loss - ours[0]) for loss in ours) > 1e-4  # the policy did move
    assert ours == pytest.approx(trl, abs=1e-5)
