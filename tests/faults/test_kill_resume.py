"""Kill the run, start it again with the same command, and end with exactly what an uninterrupted run ends with.

One run directory is killed again and again, each time at the next point, so that one chain of restarts covers them
all.  The reference is the same recipe never killed.  ALIGN_FAULT names a point in the store or between stages.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.conftest import TINY

pytestmark = pytest.mark.engine

POINTS = [
    "loop.cold_start.after",
    "store.shard.before_rename:2@1",  # inside the evaluation samples of round 0, one rank only
    "loop.sample.after@0",
    "loop.score.after@1",
    "loop.pair.after@0",
    "training.step.after:2@1",
    "store.directory.after_body@0",  # inside the checkpoint's write
    "loop.train.after@1",
    "store.latest.before_rename@0",
    "loop.export.before@0",
]


def rows(run_dir: Path) -> list[tuple]:
    """Every sample of every round: id, response and log-probs."""
    files = sorted(run_dir.glob("rounds/*/*samples-*.parquet"))
    return sorted(
        (f.parent.name, r["id"], tuple(r["response_ids"]), tuple(r["logprobs"]))
        for f in files
        for r in pq.read_table(f).to_pylist()
    )


def weights(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "export" / "model.safetensors").read_bytes()).hexdigest()


def write_recipe(folder: Path) -> Path:
    folder.mkdir()
    recipe = folder / "tiny.yaml"
    recipe.write_text(TINY.format(output=folder / "runs"))
    return recipe


def test_killed_at_every_boundary_ends_the_same(tmp_path: Path, align: Callable) -> None:
    straight, broken = write_recipe(tmp_path / "straight"), write_recipe(tmp_path / "broken")
    done = align("run", straight, "--ranks", "2")
    assert done.status == 0, done.err
    for point in POINTS:
        killed = align("run", broken, "--ranks", "2", fault=point)
        assert killed.status not in (0, 2), f"{point} was not reached:\n{killed.out}\n{killed.err}"
    last = align("run", broken, "--ranks", "2")
    assert last.status == 0, last.err
    expected, found = straight.parent / "runs" / "tiny", broken.parent / "runs" / "tiny"
    assert rows(found) == rows(expected)
    assert weights(found) == weights(expected)


def test_killed_parent_leaves_no_rank_and_resumes(tmp_path: Path, align: Callable) -> None:
    recipe = write_recipe(tmp_path / "parent")
    run_dir = recipe.parent / "runs" / "tiny"
    command = [sys.executable, "-m", "align.cli", "run", str(recipe), "--ranks", "2"]
    parent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 300
    while not list(run_dir.glob("rounds/00000/samples-*.parquet")) and time.monotonic() < deadline:
        assert parent.poll() is None
        time.sleep(0.05)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    time.sleep(1.0)
    assert not processes_of(recipe)
    before = rows(run_dir)
    again = align("run", recipe, "--ranks", "2")
    assert again.status == 0, again.err
    assert set(before) <= set(rows(run_dir))


def processes_of(recipe: Path) -> list[int]:
    """Processes whose command line or open files belong to this run's directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if str(recipe.parent).encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found
