"""One rank, killed or failed at every point of every write: the same command ends with the same run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Runs
from store_scenario import make_samples, recipe, result

from align.distributed import Ranks
from align.errors import RunError
from align.faults import parse
from align.store import RunStore

WRITE = ("before_open", "before_write", "mid_write", "before_fsync", "before_rename", "after_rename", "after_sync")
WRITES = (
    "store.recipe",
    "store.environment",
    "store.run",
    "store.json",
    "store.shard",
    "store.ledger",
    "store.report",
    "store.manifest",
    "store.directory.manifest",
    "store.latest",
)
OTHERS = (
    "durable.mkdir.before",
    "store.metrics.before_open",
    "store.metrics.before_write",
    "store.metrics.after_write",
    "store.directory.before_mkdir",
    "store.directory.before_body",
    "store.directory.after_body",
    "store.directory.before_fsync",
    "store.directory.before_rename",
    "store.directory.after_rename",
    "store.directory.after_sync",
    "store.checkpoint.drop.before_rename",
    "store.checkpoint.drop.before_delete",
)
POINTS = (*(f"{write}.{point}" for write in WRITES for point in WRITE), *OTHERS)
CHUNKS = 8


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    started = Runs()
    yield started
    started.close()


@pytest.fixture(scope="module")
def whole(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The uninterrupted run: its result, how often each point was reached, and the calls it made."""
    path = tmp_path_factory.mktemp("whole")
    trace = path / "trace"
    assert runs.go(path / "run", environment={"ALIGN_FAULT_TRACE": str(trace)})["status"] == [0]
    counted = runs.go(path / "counted", shim="count")
    return {
        "result": result(path / "run"),
        "reached": Counter(trace.read_text().split()),
        "calls": json.loads(counted["output"][0]),
    }


def finish(runs: Runs, directory: Path, whole: dict) -> None:
    """Give the command again: it ends well, and nothing tells that the run was ever killed."""
    answer = runs.go(directory)
    assert answer["status"] == [0], answer["output"]
    assert result(directory) == whole["result"]


def test_the_reference_run_is_what_it_should_be(whole: dict) -> None:
    found = whole["result"]
    assert found["finished"] and found["repeated"] == 0 and found["notices"] == []
    assert sorted(found["rows"]["samples/1"]) == sorted(repr(s) for i in range(3) for s in make_samples(1, i))
    assert [len(found["rows"][f"{stage}/0"]) for stage in ("samples", "verdicts", "scores", "pairs")] == [12, 12, 12, 6]
    assert [line["step"] for line in found["metrics"]] == [1, 2, 3, 11, 12, 13]
    assert not [name for name in found["files"] if ".tmp-" in name or name == "checkpoints/00001"]


def test_every_point_is_known_and_reached(whole: dict) -> None:
    """A new write has to be listed here, and so is killed below."""
    assert set(whole["reached"]) == set(POINTS)


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point(point: str, runs: Runs, whole: dict, memory_path: Path) -> None:
    """The first time that the run comes by, and the last."""
    for nth in sorted({1, whole["reached"][point]}):
        directory = memory_path / f"{nth}"
        answer = runs.go(directory, environment={"ALIGN_FAULT": f"{point}:{nth}"})
        assert answer["status"] == [-signal.SIGKILL]
        finish(runs, directory, whole)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_killed_before_every_call_into_the_operating_system(
    chunk: int, runs: Runs, whole: dict, memory_path: Path
) -> None:
    """Every open, write, flush, rename and delete, whether or not a fault point stands there."""
    count = whole["calls"]["count"]
    assert count > 400
    for call in range(1 + chunk, count + 1, CHUNKS):
        directory = memory_path / str(call)
        assert runs.go(directory, shim=call)["status"] == [-signal.SIGKILL]
        finish(runs, directory, whole)
        shutil.rmtree(directory)


@pytest.mark.parametrize("seed", range(8))
def test_killed_again_and_again(seed: int, runs: Runs, whole: dict, memory_path: Path) -> None:
    rng = random.Random(seed)
    for _ in range(5):
        runs.go(memory_path / "run", shim=rng.randrange(1, whole["calls"]["count"] // 2))
    finish(runs, memory_path / "run", whole)


def test_nothing_is_renamed_before_it_is_flushed(whole: dict) -> None:
    """What a power loss needs: contents before names, and each name before the next thing that relies on it."""
    assert whole["calls"]["unsynced"] == []
    log = whole["calls"]["log"]
    renames = [i for i, entry in enumerate(log) if entry[0] == "rename"]
    assert len(renames) > 40
    for here, following in zip(renames, [*renames[1:], len(log)], strict=True):
        parent = str(Path(log[here][2]).parent)
        assert ["fsync", parent] in log[here + 1 : following], log[here]


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EIO"])
@pytest.mark.parametrize("write", [*WRITES, "store.metrics", "store.directory"])
def test_a_failing_disk_is_named_and_harms_nothing(
    write: str, name: str, runs: Runs, whole: dict, memory_path: Path
) -> None:
    points = {"store.metrics": ("before_write",), "store.directory": ("before_mkdir", "before_fsync", "before_rename")}
    for point in points.get(write, ("before_open", "mid_write", "before_fsync", "before_rename")):
        directory = memory_path / point
        answer = runs.go(directory, environment={"ALIGN_FAULT": f"{write}.{point}={name}"})
        assert answer["status"] == [1] and answer["seconds"] < 10
        message = answer["output"][0]
        assert message.startswith(f"RunError: {directory}/small") or f": {directory}/small" in message
        if name == "ENOSPC":
            assert "needs" in message and "free" in message and "nothing committed is lost" in message
        assert not list(directory.rglob(".tmp-*"))
        finish(runs, directory, whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 128 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def test_a_full_disk(runs: Runs, whole: dict, small_disk: Path) -> None:
    answer = runs.go(small_disk)
    assert answer["status"] == [1]
    assert f"{small_disk}/small" in answer["output"][0] and "free" in answer["output"][0]
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    finish(runs, small_disk, whole)


def test_a_read_only_disk(runs: Runs, whole: dict, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    runs.go(small_disk, environment={"ALIGN_FAULT": "store.latest.after_sync"})
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    answer = runs.go(small_disk)
    assert answer["status"] == [1] and "Read-only file system" in answer["output"][0]
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    finish(runs, small_disk, whole)


def test_a_body_that_fills_the_disk(small_disk: Path) -> None:
    """A library's own words for a full disk become ours."""
    with RunStore.open(recipe(small_disk), Ranks(), identity={}) as store:
        with pytest.raises(RunError, match=r"checkpoints/00001: No space left on device.* are free"):
            with store.commit_checkpoint(1) as path:
                (path / "weights").write_bytes(b"0" * 200_000)
        assert store.latest_checkpoint() is None
        assert sorted(p.name for p in (store.root / "checkpoints").iterdir()) == []


def test_the_room_for_a_checkpoint_is_looked_for_first(small_disk: Path) -> None:
    with RunStore.open(recipe(small_disk), Ranks(), identity={}) as store:
        with store.commit_checkpoint(1) as path:
            (path / "weights").write_bytes(b"0" * 70_000)
        with pytest.raises(RunError, match=r"needs 70,000 bytes and [\d,]+ are free"):
            with store.commit_checkpoint(2) as path:
                raise AssertionError("the body must not run")
        assert store.latest_checkpoint() == 1


def test_two_runs_in_one_directory(runs: Runs, whole: dict, tmp_path: Path) -> None:
    """The second is refused at once with the owner's name; a killed owner's lock is no lock."""
    other = Runs()
    other.begin(tmp_path, environment={"ALIGN_FAULT": "store.ledger.before_rename:2=stop"})
    lock = tmp_path / "small" / "lock"
    ledger = tmp_path / "small" / "rounds" / "00000" / ".tmp-0-samples-00001.json"
    wait_for(lambda: ledger.exists() and lock.read_text())
    owner = json.loads(lock.read_text())["pid"]
    answer = runs.go(tmp_path)
    assert answer["status"] == [1] and answer["seconds"] < 5
    assert f"is in use by process {owner} on " in answer["output"][0]
    assert ledger.exists()  # a refused run leaves the owner's unfinished files alone
    os.kill(owner, signal.SIGKILL)
    finish(runs, tmp_path, whole)
    assert other.end()["status"] == [-signal.SIGKILL]
    other.close()


def wait_for(condition: object, seconds: float = 20.0) -> None:
    """Until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def test_the_wish_for_a_fault_is_checked() -> None:
    assert parse("store.run.before_open:2@1=EIO") == ("store.run.before_open", 2, 1, "EIO")
    assert parse("a.b") == ("a.b", 1, None, "kill")
    for text in ("store.run:", "a=EWHATEVER", "a@x", ""):
        with pytest.raises(ValueError, match="ALIGN_FAULT"):
            parse(text)
