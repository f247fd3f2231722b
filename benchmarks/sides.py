"""Two programs measured against each other: each in a process of its own, their blocks of steps alternating.

A benchmark names its sides in a `Duel` and calls `main`.  Losses of every step must agree, so that both sides have
done the same work; the ratio of speeds is a median over neighbouring blocks, so that a noisy machine slows both alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Row, paired_ratio, peak_over, print_report, resident_bytes
from benchmarks.models import Shape, make_model
from benchmarks.products import Products, gemm_rate

PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets; each side is one process alone, whatever started the benchmark."""

Run = Callable[[Path, Any, int, Callable[[int], None]], list[float]]
"""(model directory, examples, steps, what to call with the number of steps done) -> the loss of every step."""


@dataclass(frozen=True)
class Case:
    """What is trained on what, and how many times the peer's speed is asked for."""

    shape: Shape
    prompt_tokens: int
    response_tokens: int
    asked: float | None = None


@dataclass(frozen=True)
class Duel:
    """A benchmark of this project against one peer."""

    name: str
    script: str  # the file of the benchmark: its processes run it
    peer: str  # as it is called
    cases: Mapping[str, Case]
    examples: Callable[[Case, int], Any]  # for so many steps
    step_tokens: Callable[[Case], int]  # of the separate sequences, prompt and response, that a step stands for
    ours: Run
    theirs: Run
    load: Callable[[], None]  # imports what both sides need, before memory is counted
    absent: Callable[[], str | None] = lambda: None  # why the peer cannot be measured here
    tolerance: float = 1e-4  # of losses
    block_multiple: int = 1  # steps of a block are a multiple of this


def case_of(duel: Duel, name: str) -> Case:
    """The case of that name; other lengths are written alike."""
    if name in duel.cases:
        return duel.cases[name]
    prompt, response = map(int, name.split("+"))
    return Case(Shape(), prompt, response)


def serve(duel: Duel, side: str, case: Case, model_dir: Path, steps: int, block: int) -> None:
    """One side: says `ready`, and runs `block` steps for every line it reads.

    Answers each line with seconds of wall and processor time (and this machine's rate of matrix products right then),
    and at last with its losses and its peak memory over the process before any model was loaded.
    """
    duel.load()
    examples = duel.examples(case, steps)
    baseline = resident_bytes()
    counting = Products()
    started: tuple[float, float] | None = None

    def after_step(done: int) -> None:
        nonlocal started
        if side == "ours" and done == duel.block_multiple:
            counting.__exit__(None, None, None)
        if done % block:
            return
        if started is not None:
            report = {"wall_s": time.perf_counter() - started[0], "cpu_s": time.process_time() - started[1]}
            if side == "ours":
                report |= {"products": counting.flops / duel.block_multiple, "gemm": gemm_rate(counting.shapes)}
            _say(report)
        if done < steps:
            if done == 0:
                _say({"ready": side})
            sys.stdin.readline()
            if side == "ours" and done == 0:
                counting.__enter__()  # over the first steps, which only warm up
            started = (time.perf_counter(), time.process_time())

    losses = (duel.ours if side == "ours" else duel.theirs)(model_dir, examples, steps, after_step)
    peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else peak_over(baseline)
    _say({"losses": losses, "peak_mib": peak})


def _say(message: dict[str, Any]) -> None:
    print("@" + json.dumps(message), flush=True)


class Worker:
    """The other end of `serve`."""

    def __init__(self, script: str, side: str, case: str, model_dir: Path, steps: int, block: int) -> None:
        options = {"--side": side, "--case": case, "--model": model_dir, "--total": steps, "--steps": block}
        words = [str(word) for option in options.items() for word in option]
        alone = {k: v for k, v in os.environ.items() if k not in PLACE}
        self.process = subprocess.Popen(
            [sys.executable, script, *words],
            env=alone,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.listen()

    def listen(self) -> dict[str, Any]:
        """Its next message."""
        assert self.process.stdout is not None and self.process.stderr is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        error = self.process.communicate()[1]
        raise RuntimeError(f"the process ended early:\n{error[-4000:]}")

    def block(self) -> dict[str, Any]:
        """Let it run a block."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.listen()

    def end(self) -> dict[str, Any]:
        """Its losses and peak memory; the process is over afterwards."""
        report = self.listen()
        self.process.communicate()
        return report


def compare(duel: Duel, name: str, model_dir: Path, blocks: int, block: int) -> list[Row]:
    """Tokens of training per second and peak memory of both; the losses of every step must agree."""
    case = case_of(duel, name)
    make_model(model_dir, case.shape)
    block = -(-block // duel.block_multiple) * duel.block_multiple
    steps = (blocks + 1) * block
    ours, peer = (Worker(duel.script, side, name, model_dir, steps, block) for side in ("ours", "peer"))
    times = [(ours.block(), peer.block()) for _ in range(blocks + 1)][1:]  # the first block warms up
    ours_end, peer_end = ours.end(), peer.end()
    worst = max(abs(a - b) for a, b in zip(ours_end["losses"], peer_end["losses"], strict=True))
    first = abs(ours_end["losses"][0] - peer_end["losses"][0])
    assert worst < duel.tolerance and first < 1e-5, f"losses differ by {worst}, the first by {first}"
    print(f"{name}: {steps} losses agree to {worst:.1e}", flush=True)
    rows = []
    count = block * blocks * duel.step_tokens(case)
    for clock, unit in (("wall_s", "tokens/s"), ("cpu_s", "tokens/s of processor time")):
        ours_s, peer_s = ([pair[i][clock] for pair in times] for i in (0, 1))
        label = name if clock == "wall_s" else f"{name} processor time"
        rows.append(Row(label, count / sum(ours_s), count / sum(peer_s), paired_ratio(ours_s, peer_s), unit))
    ratio = peer_end["peak_mib"] / ours_end["peak_mib"]
    rows.append(Row(f"{name} peak memory", ours_end["peak_mib"], peer_end["peak_mib"], ratio, "MiB"))
    for row in rows:
        asked = f" (asked: {case.asked})" if row.case == name and case.asked else ""
        print(f"  {row.case}: ours {row.ours:.1f}, {duel.peer} {row.peer:.1f} {row.unit}, {row.ratio:.2f} x{asked}")
    limit = _distance(name, [pair[0] for pair in times], block)
    print(f"  {limit.case}: {limit.ours:.1f} of {limit.peer:.1f} {limit.unit}, {limit.ratio:.2f}", flush=True)
    return [*rows, limit]


def _distance(name: str, reports: list[dict[str, Any]], block: int) -> Row:
    """Our matrix products per second of training over this machine's rate at the same shapes, block by block."""
    achieved = [r["products"] * block / r["wall_s"] for r in reports]
    shares = [mine / r["gemm"] for mine, r in zip(achieved, reports, strict=True)]
    giga, gemm = statistics.median(achieved) / 1e9, statistics.median(r["gemm"] for r in reports) / 1e9
    return Row(f"{name} achieved of measured GEMM", giga, gemm, statistics.median(shares), "GFLOP/s")


def main(duel: Duel, description: str | None) -> None:
    """The benchmark's command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=6, help="alternating blocks per side and case")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps per block")
    parser.add_argument("--case", help=f"only this case: {', '.join(duel.cases)}, or other lengths in the same form")
    for hidden in ("--side", "--model", "--total"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.side:
        case = case_of(duel, arguments.case)
        serve(duel, arguments.side, case, Path(arguments.model), int(arguments.total), arguments.steps)
        return
    why = duel.absent()
    if why is not None:
        print(f"skipped: {why}")
        print_report(duel.name, [])
        return
    rows: list[Row] = []
    for name in [arguments.case] if arguments.case else duel.cases:
        with tempfile.TemporaryDirectory() as directory:
            rows += compare(duel, name, Path(directory), arguments.blocks, arguments.steps)
    print_report(duel.name, rows)
