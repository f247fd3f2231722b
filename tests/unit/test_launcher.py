"""Ranks as processes: exit status, one message, nobody left behind, nobody listening off this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from align.launcher import rank_environment

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
WAIT_S = 60.0


class Job:
    """A launched verb of launcher_verbs.py."""

    def __init__(self, directory: Path, verb: str, ranks: int, environment: dict[str, str]) -> None:
        self.directory, self.ranks = directory, ranks
        outer = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "launcher_verbs.py"), verb, str(ranks), str(directory)],
            env={**outer, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", **environment},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def notes(self) -> list[dict]:
        """What every rank left, once all have."""
        files = [self.directory / f"{rank}.json" for rank in range(self.ranks or 1)]
        end = time.monotonic() + WAIT_S
        while not all(f.exists() for f in files):
            assert time.monotonic() < end and self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)
        return [json.loads(f.read_text()) for f in files]

    def left(self) -> list[dict]:
        """What the ranks left that came so far: one may be stopped before it leaves anything."""
        return [json.loads(f.read_text()) for f in self.directory.glob("[0-9].json")]

    def finish(self) -> tuple[int, str, str]:
        """Exit status, standard output, standard error."""
        out, err = self.process.communicate(timeout=WAIT_S)
        return self.process.returncode, out, err


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    jobs: list[Job] = []

    def start(verb: str, ranks: int, **environment: str) -> Job:
        jobs.append(Job(tmp_path, verb, ranks, environment))
        return jobs[-1]

    yield start
    for job in jobs:
        with job.process:  # closes the pipes and waits
            job.process.kill()


def gone(pid: int, within_s: float = 10.0) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_meet_on_the_loopback_only(start, ranks: int) -> None:
    job = start("listen", ranks)
    notes = job.notes()
    assert job.finish() == (0, "", "")
    for note in notes:
        assert note["everyone"] == [1] * ranks
        assert (note["verb"], note["round"]) == ("sample", 7)
        assert note["places"] and {address for address, _ in note["places"]} == {"127.0.0.1"}
        assert note["environment"]["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    threads = [int(note["environment"].get("OMP_NUM_THREADS", 1)) for note in notes]
    assert sum(threads) <= max(ranks, len(os.sched_getaffinity(0)))


def test_a_refusal_on_one_rank_is_told_once_and_stops_the_others(start) -> None:
    job = start("refuse", 2)
    assert job.finish() == (2, "", "questions.jsonl:3: prompt: is missing\n")
    assert all(gone(note["pid"]) for note in job.left())


def test_a_failure_on_all_ranks_is_told_once(start) -> None:
    assert start("refuse_together", 2).finish() == (1, "", "disk full: /there, 5 bytes needed, 3 free\n")


def test_a_bug_shows_one_traceback(start) -> None:
    status, out, err = start("stumble", 2).finish()
    assert status == 1 and out == ""
    assert err.count("Traceback (most recent call last)") == 1 and "KeyError: 'oops'" in err


def test_a_killed_rank_takes_the_others_along(start) -> None:
    job = start("wait", 2)
    notes = job.notes()
    os.kill(notes[1]["pid"], signal.SIGKILL)
    status, _, err = job.finish()
    assert status == 1
    assert err.startswith("rank 1 was killed by SIGKILL") and err.count("\n") == 1
    assert all(gone(note["pid"]) for note in notes)


def test_a_killed_launcher_takes_the_ranks_along(start) -> None:
    job = start("wait", 2)
    notes = job.notes()
    job.process.kill()
    assert all(gone(note["pid"]) for note in notes)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_everything(start, ranks: int, number: signal.Signals, status: int) -> None:
    job = start("wait", ranks)
    notes = job.notes()
    job.process.send_signal(number)
    returned, out, err = job.finish()
    assert (returned, out) == (status, "")
    assert err == f"\nstopped by {number.name}; the same command goes on from here\n"
    assert all(gone(note["pid"]) for note in notes)


def test_one_rank_reports_like_many(start) -> None:
    assert start("refuse_together", 1).finish() == (1, "", "disk full: /there, 5 bytes needed, 3 free\n")
    assert start("status", 1).finish()[0] == 0


def test_ranks_of_an_outer_launcher_are_taken_as_they_are(start) -> None:
    outer = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    assert start("status", 0, **outer).finish() == (0, "", "")
    assert start("status", 4, **outer).finish() == (0, "", "")
    status, _, err = start("status", 2, **outer).finish()
    assert status == 2 and err.startswith("rank 3: --ranks 2: this process was started as one of 4 ranks")


def test_the_ranks_share_the_cores_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.launcher.uses_gpu", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 5, 7, 11})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [rank_environment(ranks)["OMP_NUM_THREADS"] for ranks in (1, 2, 8)] == ["5", "2", "1"]


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.launcher.uses_gpu", lambda: False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    found = rank_environment(1)
    assert (found["OMP_NUM_THREADS"], found["VLLM_LOGGING_LEVEL"]) == ("1", "DEBUG")
    assert found["DS_ACCELERATOR"] == "cpu"  # DeepSpeed would look for a GPU that is not there
