"""`align verify --votes` on a large file: seconds and peak memory of the whole command, against a budget.

    python -m benchmarks.verify_votes --rows 100000 300000 1000000 --verifiers 30

Each file is made on the spot (verifiers with their own accuracy, 10% abstained, groups of four, gold on every row) and
verified plain without labels and gzipped with 20.  `peer` is the budget: 2 s of processor time to start and 13 s a
million rows, and 2 GiB of memory.  With several numbers of rows, what a further row costs from the second last to the
last is set against what it costs from the first to the second: 1 is linear.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks.common import Row, machine

BUDGET_MIB = 2048.0
BUDGET_S_TO_START = 2.0
BUDGET_S_PER_MILLION = 13.0
BLOCK = 50_000


def write_votes(path: Path, rows: int, verifiers: int, scores: int) -> None:
    """A simulated matrix; the last `scores` verifiers give real values."""
    rng = np.random.default_rng(0)
    right = rng.uniform(0.55, 0.9, verifiers)
    names = [f"v{j}" + ("~" if j >= verifiers - scores else "") for j in range(verifiers)]
    opened = gzip.open(path, "wt", compresslevel=1) if path.suffix == ".gz" else open(path, "w", encoding="utf-8")
    with opened as file:
        file.write(f"item,group,gold,{','.join(names)}\n")
        for start in range(0, rows, BLOCK):
            some = min(BLOCK, rows - start)
            gold = rng.random(some) < 0.4
            votes = np.where(rng.random((some, verifiers)) < right, gold[:, None], ~gold[:, None])
            text = np.where(votes, "1", "0").astype("U8")
            for j in range(verifiers - scores, verifiers):
                text[:, j] = np.char.mod("%.4f", rng.normal(gold * 1.5, 1.0))
            text[rng.random(text.shape) < 0.1] = ""
            lines = [
                f"response-{start + i:09d},prompt-{(start + i) // 4},{int(gold[i])},{','.join(text[i].tolist())}"
                for i in range(some)
            ]
            file.write("\n".join(lines) + "\n")


def measure(path: Path, labels: int | None) -> tuple[float, float]:
    """(processor seconds, peak MiB) of the command in a process of its own."""
    code = (
        "import resource, sys\n"
        "from align.cli import app\n"
        "try:\n"
        "    app(sys.argv[1:])\n"
        "finally:\n"
        "    used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "    print('USED', used.ru_utime + used.ru_stime, used.ru_maxrss, file=sys.stderr)\n"
    )
    with tempfile.TemporaryDirectory() as out:
        extra = [] if labels is None else ["--labels", str(labels)]
        command = [sys.executable, "-c", code, "verify", "--votes", str(path), "--out", f"{out}/r", *extra]
        done = subprocess.run(command, env={**os.environ}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds, peak_kib = done.stderr.split("USED")[1].split()
    return float(seconds), int(peak_kib) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--verifiers", type=int, default=30)
    parser.add_argument("--scores", type=int, default=0, help="how many of the verifiers give real values")
    chosen = parser.parse_args()
    rows = []
    for name, labels in (("votes.csv", None), ("votes.csv.gz", 20)):
        taken = []
        for count in sorted(chosen.rows):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / name
                write_votes(path, count, chosen.verifiers, chosen.scores)
                seconds, peak = measure(path, labels)
            taken.append((count, seconds))
            case = f"{count:,} x {chosen.verifiers}, {chosen.scores} of them scores, {name}, labels {labels or 0}"
            budget_s = BUDGET_S_TO_START + BUDGET_S_PER_MILLION * count / 1e6
            rows.append(Row(case, round(seconds, 1), budget_s, round(budget_s / seconds, 2), "s"))
            rows.append(Row(case, round(peak), BUDGET_MIB, round(BUDGET_MIB / peak, 2), "MiB"))
            print(rows[-2], rows[-1], flush=True)
        if len(taken) > 2:
            first, last = slope(*taken[:2]), slope(*taken[-2:])
            case = f"microseconds a further row, {name}, labels {labels or 0}: last step against first"
            rows.append(Row(case, last * 1e6, first * 1e6, first / last, "us"))
            print(rows[-1], flush=True)
    print(json.dumps({"benchmark": "verify_votes", "machine": machine(), "rows": [asdict(row) for row in rows]}))


def slope(one: tuple[int, float], other: tuple[int, float]) -> float:
    """Seconds a row between two (rows, seconds)."""
    return (other[1] - one[1]) / (other[0] - one[0])


if __name__ == "__main__":
    main()
