"""What every side-by-side measurement shares: the machine's description, paired blocks, peak memory, the last line."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One case: `ratio` is how many times better this project is, whatever the unit's direction."""

    case: str
    ours: float
    peer: float
    ratio: float
    unit: str


def machine() -> str:
    """Processor, cores and the libraries that decide the speed."""
    import torch

    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores{gpu}, torch {torch.__version__}"


def paired_ratio(ours_s: Sequence[float], peer_s: Sequence[float]) -> float:
    """Median over neighbouring blocks of peer seconds / our seconds, so that a noisy machine slows both sides alike."""
    return statistics.median(peer / ours for ours, peer in zip(ours_s, peer_s, strict=True))


def peak_over(baseline_bytes: int) -> float:
    """MiB by which this process's largest resident size exceeds the baseline."""
    return (_status("VmHWM") - baseline_bytes) / 2**20


def resident_bytes() -> int:
    """This process's resident size now; the peak is counted from here on where the kernel allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    except OSError:
        pass
    return _status("VmRSS")


def _status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def print_report(benchmark: str, rows: Sequence[Row]) -> None:
    """The JSON object that is every benchmark's last line."""
    print(json.dumps({"benchmark": benchmark, "machine": machine(), "rows": [asdict(row) for row in rows]}))
