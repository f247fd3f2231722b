"""KTO and APO-zero for single responses against TRL's own trainer; see `kto_trl.py`, which is the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

TOLERANCE = 1e-5
"""float32, other order of sums: packed groups in micro-batches against one padded batch."""


def test_loss_and_gradient_are_trl_s() -> None:
    command = [sys.executable, str(Path(__file__).with_name("kto_trl.py"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == 16
    assert max(row["loss"] for row in rows) < TOLERANCE
    assert max(row["gradient"] for row in rows) < TOLERANCE
    known = [row["z_ref"] for row in rows if row["z_ref"] is not None]
    assert max(known) > 0.1 and min(known) == 0.0  # both sides of the clamp
