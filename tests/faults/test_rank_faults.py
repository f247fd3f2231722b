"""Two ranks over gloo, one of them killed, stopped or failed: the other one says so, and nothing half-done is seen."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Runs
from store_scenario import result

KILLS = (
    ("store.run.before_rename", 0),
    ("store.shard.mid_write", 1),
    ("store.ledger.after_rename", 1),
    ("store.manifest.before_rename", 0),
    ("store.directory.before_body", 1),
    ("store.directory.after_body", 1),
    ("store.directory.before_fsync", 0),
    ("store.directory.before_fsync:2", 1),
    ("store.directory.manifest.before_rename:2", 0),
    ("store.directory.before_rename:2", 0),
    ("store.directory.after_rename:2", 0),
    ("store.latest.before_rename", 0),
    ("store.checkpoint.drop.before_delete", 0),
)


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    started = Runs(torch=True)
    yield started
    started.close()


@pytest.fixture(scope="module")
def whole(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("whole")
    assert runs.go(path / "two", ranks=2)["status"] == [0, 0]
    return result(path / "two")


def finish(runs: Runs, directory: Path, whole: dict) -> None:
    answer = runs.go(directory, ranks=2)
    assert answer["status"] == [0, 0], answer["output"]
    assert result(directory) == whole


def test_two_ranks_make_the_rows_of_one(runs: Runs, whole: dict, memory_path: Path) -> None:
    assert runs.go(memory_path, ranks=1)["status"] == [0]
    alone = result(memory_path)
    assert alone["rows"] == whole["rows"] and alone["weights"] == whole["weights"]
    extra = set(whole["files"]) - set(alone["files"])
    assert extra == {"checkpoints/00002/weights-1", "scratch/weights-1", "scratch/nested/part-1"}


@pytest.mark.parametrize(("point", "rank"), KILLS)
def test_one_rank_killed(point: str, rank: int, runs: Runs, whole: dict, memory_path: Path) -> None:
    answer = runs.go(memory_path, ranks=2, environment={"ALIGN_FAULT": f"{point}@{rank}"})
    assert answer["status"][rank] == -signal.SIGKILL, answer["output"]
    assert answer["status"][1 - rank] == 1, answer["output"]
    assert answer["seconds"] < 15
    assert f"rank {1 - rank} waited for the other ranks at" in answer["output"][1 - rank]
    assert f"rank {rank} is gone" in answer["output"][1 - rank]
    for directory in committed(memory_path / "small"):
        names = json.loads((directory / "manifest.json").read_text())["files"]
        found = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}
        assert found == {*names, "manifest.json"}
    finish(runs, memory_path, whole)


def committed(root: Path) -> list[Path]:
    """Directories under their final names."""
    return [path for path in (root / "scratch", *root.glob("checkpoints/[0-9]*")) if path.exists()]


def test_the_place_where_a_dead_rank_was_last_seen_is_told(runs: Runs, memory_path: Path) -> None:
    answer = runs.go(memory_path, ranks=2, environment={"ALIGN_FAULT": "store.shard.before_open@1"})
    assert "at 'samples': rank 1 is gone (last seen at 'commit scratch')" in answer["output"][0]


@pytest.mark.parametrize("point", ["store.shard.mid_write", "store.directory.before_fsync"])
def test_a_full_disk_on_one_rank_stops_both_with_one_message(
    point: str, runs: Runs, whole: dict, memory_path: Path
) -> None:
    answer = runs.go(memory_path, ranks=2, environment={"ALIGN_FAULT": f"{point}@1=ENOSPC"})
    assert answer["status"] == [1, 1] and answer["seconds"] < 15
    for output in answer["output"]:
        assert "rank 1: " in output and "No space left on device" in output and "free" in output
    finish(runs, memory_path, whole)


def test_a_rank_that_hangs_is_waited_for_until_the_deadline(runs: Runs, whole: dict, memory_path: Path) -> None:
    answer = runs.go(
        memory_path, ranks=2, deadline_s=5.0, environment={"ALIGN_FAULT": "store.shard.before_open@1=stop"}
    )
    assert answer["status"] == [1, -signal.SIGKILL]
    assert "rank 1 did not come within 5 s (last seen at 'commit scratch')" in answer["output"][0]
    finish(runs, memory_path, whole)


def test_ranks_die_with_their_launcher(runs: Runs, whole: dict, memory_path: Path) -> None:
    """kill -9 of the parent leaves nobody behind who could still write."""
    launcher = Runs(torch=True)
    launcher.begin(memory_path, ranks=2, environment={"ALIGN_FAULT": "store.shard.mid_write@1=stop"})
    locks = [memory_path / "small" / name for name in ("lock", "lock.ranks")]
    pending = memory_path / "small/rounds/00000/.tmp-1-samples-00001.parquet"
    end = time.monotonic() + 30
    while not pending.exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    ranks = [json.loads(lock.read_text())["pid"] for lock in locks]
    launcher.process.kill()
    launcher.close()
    while any(is_alive(pid) for pid in ranks):
        assert time.monotonic() < end
        time.sleep(0.01)
    finish(runs, memory_path, whole)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that ended and was not reaped does not."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
