"""What tests of training in real processes share: start the ranks, do the jobs in each, read the reports."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from align.distributed import Ranks, close, connect
from align.records import Sample, Score
from align.training.engine import PolicyEngine

ROOT = Path(__file__).parents[2]


def on_ranks(count: int, command: list[str], settings: dict[str, str], *, named_alone: bool, timeout_s: float) -> None:
    """Run the command in this many processes that can meet; fails with their words where one does not end well.

    `named_alone`: a single process too finds the variables of a rank.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(count):
        place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **settings}
        environment |= {key: str(value) for key, value in place.items()} if count > 1 or named_alone else {}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    errors = [process.communicate(timeout=timeout_s)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * count, "\n".join(errors)[-3000:]


def launch(ranks: int, jobs: dict[str, dict[str, Any]], where: Path, label: str, script: str) -> list[dict[str, Any]]:
    """Run the jobs on this many processes; every rank's reports by job."""
    file = where / f"{label}.json"
    file.write_text(json.dumps({"out": str(where / label), "jobs": jobs}))
    command = [sys.executable, str(Path(__file__).with_name(script)), str(file)]
    on_ranks(ranks, command, {"DS_ACCELERATOR": "cpu"}, named_alone=False, timeout_s=540)
    return [json.loads(Path(f"{where / label}.{rank}").read_text()) for rank in range(ranks)]


def launch_by_job(
    ranks: int, jobs: dict[str, dict[str, Any]], where: Path, label: str, script: str
) -> dict[str, list[dict[str, Any]]]:
    """The same on the model in `where`; by job, what each rank reported."""
    given = {name: {"model": str(where / "model"), **job} for name, job in jobs.items()}
    by_rank = launch(ranks, given, where, label, script)
    return {name: [reports[name] for reports in by_rank] for name in jobs}


def serve(run: Callable[[dict[str, Any], Ranks], dict[str, Any]]) -> None:
    """On one rank: all jobs of the launch that the command line names, one after the other."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    given = json.loads(Path(sys.argv[1]).read_text())
    ranks = connect(deadline_s=120)
    reports = {name: run(job, ranks) for name, job in given["jobs"].items()}
    Path(f"{given['out']}.{ranks.rank}").write_text(json.dumps(reports))
    close(ranks)


def lean(engine: PolicyEngine, samples: dict[str, Sample], scores: Sequence[Score]) -> float:
    """Covariance of P(good) and mean token log-probability within prompts: how much the policy prefers the better."""
    sequences = [(samples[s.sample_id].prompt_ids, samples[s.sample_id].response_ids) for s in scores]
    found = [float(row.mean()) for row in engine.token_logprobs(sequences).logprobs]
    by_prompt: dict[str, list[tuple[float, float]]] = {}
    for score, value in zip(scores, found, strict=True):
        by_prompt.setdefault(score.prompt_id, []).append((score.p_good, value))
    total = 0.0
    for rows in by_prompt.values():
        middle = sum(p for p, _ in rows) / len(rows)
        total += sum((p - middle) * v for p, v in rows)
    return total
