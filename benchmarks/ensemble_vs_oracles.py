"""Label models against crowd-kit's Dawid-Skene and Snorkel's label model: the same answers, the time and the memory.

    python benchmarks/ensemble_vs_oracles.py [--items 1000000] [--voters 30]

Neither peer is a dependency: each is measured where it can be imported, and said to be absent where it cannot.  Each
side runs in a process of its own, on the same votes in an array; its seconds are processor time, and its memory what it
adds to the votes and its imports.  A peer that needs more than 8 GiB or ten minutes is measured on half of the items, a
quarter, and so on, beside ours on as many, and the row says on how many.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import Row, peak_over, print_report, resident_bytes

from align.ensemble.channels import Channel
from align.ensemble.dawid_skene import DawidSkene, expectation_maximisation
from align.ensemble.moments import fit_matched
from align.ensemble.streaming import CHUNK_ROWS, fit_stream

SAME_ITEMS = 20_000
BALANCE = 0.45
SILENT = 0.1
MOST_BYTES = 8 * 2**30
MOST_SECONDS = 600
WARM_ITEMS = 2_000


def simulate(items: int, voters: int, silent: float, seed: int) -> np.ndarray:
    """[items, voters] int8 of 0, 1 and -1: independent voters, right with probability 0.55 to 0.85."""
    rng = np.random.default_rng(seed)
    truth = rng.random(items) < BALANCE
    votes = np.empty((items, voters), dtype=np.int8)
    for j, right in enumerate(np.linspace(0.55, 0.85, voters)):
        votes[:, j] = np.where(rng.random(items) < right, truth, ~truth)
        votes[rng.random(items) < silent, j] = -1
    return votes


def in_chunks(votes: np.ndarray) -> Any:
    for first in range(0, len(votes), CHUNK_ROWS):
        chunk = votes[first : first + CHUNK_ROWS].astype(float)
        chunk[chunk < 0] = np.nan
        yield chunk


def with_nan(votes: np.ndarray) -> np.ndarray:
    return np.where(votes < 0, np.nan, votes)


def crowd_kit(votes: np.ndarray) -> np.ndarray:
    """P(1) [items] by crowd-kit."""
    import pandas as pd
    from crowdkit.aggregation import DawidSkene as Peer

    task, worker = np.nonzero(votes >= 0)
    frame = pd.DataFrame({"task": task, "worker": worker, "label": votes[task, worker]})
    found = Peer(n_iter=100, tol=1e-5).fit(frame)
    return found.probas_[1].sort_index().to_numpy()


def snorkel(votes: np.ndarray, balance: float, epochs: int) -> np.ndarray:
    """P(1) [items] by Snorkel's label model, its class balance given."""
    from snorkel.labeling.model import LabelModel

    model = LabelModel(cardinality=2, verbose=False)
    model.fit(votes, n_epochs=epochs, lr=0.01, seed=0, class_balance=[1 - balance, balance], progress_bar=False)
    return model.predict_proba(votes)[:, 1]


def ours_em(votes: np.ndarray) -> np.ndarray:
    """P(1) [items] by the same EM without priors or limits, so that the answer is the textbook's."""
    made = [Channel(v.astype(np.int64), np.array([0.0, 1.0]), (j,)) for j, v in enumerate(votes.T)]
    start = np.nan_to_num(np.nanmean(with_nan(votes), axis=1), nan=0.5)
    return expectation_maximisation(made, start, DawidSkene(0.0, max_iterations=500)).p_good


SIDES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ours, Dawid-Skene": lambda votes: fit_stream(in_chunks(votes), DawidSkene(2.0)).p_good,
    "crowd-kit": crowd_kit,
    "ours, moments": lambda votes: fit_matched(votes, BALANCE).p_good,
    "Snorkel, 100 epochs": lambda votes: snorkel(votes, BALANCE, 100),
    "Snorkel, 5000 epochs": lambda votes: snorkel(votes, BALANCE, 5000),
}
UNSETTLED = ("Snorkel, 100 epochs",)
"""Peers that stop, as they do by default, far from where they would settle: timed, and their answers not compared."""


@dataclass(frozen=True)
class Measured:
    """One side on some of the items.

    Example: Measured(1000, 0.2, 31.0, np.array([0.9, 0.1]))
    """

    items: int
    seconds: float
    mib: float
    p_good: np.ndarray  # [items]


def run_side(name: str, items: int, voters: int, out: Path) -> None:
    """What a process of its own does: the side on fresh votes, its answer into `out`, time and memory to stdout."""
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    votes = simulate(items, voters, SILENT, seed=0)
    SIDES[name](votes[:WARM_ITEMS])  # imports are not counted
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + MOST_SECONDS,) * 2)
    base, started = resident_bytes(), time.process_time()
    found = SIDES[name](votes)
    seconds = time.process_time() - started
    np.save(out, found)
    print(json.dumps({"seconds": seconds, "mib": peak_over(base)}))


def measure(name: str, items: int, voters: int) -> Measured:
    """The side on `items`, or on the first half, quarter, … that it can do."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "p.npy"
        command = [sys.executable, __file__, "--items", str(items), "--voters", str(voters), "--side", name]
        done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            told = json.loads(done.stdout.splitlines()[-1])
            print(f"{name}, {items} items x {voters}: {told['seconds']:.2f} s, {told['mib']:.0f} MiB", flush=True)
            return Measured(items, told["seconds"], told["mib"], np.load(out))
    reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    print(f"{name}, {items} items x {voters}: not done ({reason}); on half of them:", flush=True)
    if items < 2 * WARM_ITEMS:
        raise SystemExit(done.stderr)
    return measure(name, items // 2, voters)


def compare(ours: Measured, ours_name: str, peer: str, voters: int) -> list[Row]:
    """Time and memory, on as many items as the peer can do."""
    theirs = measure(peer, ours.items, voters)
    if theirs.items < ours.items:
        ours = measure(ours_name, theirs.items, voters)
    case = f"{theirs.items} items x {voters}; {peer}"
    rows = [
        Row(case, ours.seconds, theirs.seconds, theirs.seconds / ours.seconds, "s"),
        Row(case, ours.mib, theirs.mib, theirs.mib / ours.mib, "MiB"),
    ]
    if peer in UNSETTLED:
        return rows
    gap = float(np.abs(ours.p_good - theirs.p_good).max())
    return [*rows, Row(f"largest |P - peer|, {case}", gap, 0.005, 0.005 / max(gap, 1e-9), "P")]


def same_answers(peers: dict[str, bool]) -> list[Row]:
    """Without priors, so that the answer is the textbook's."""
    rows = []
    for silent in (0.0, 0.3):
        votes = simulate(SAME_ITEMS, 10, silent, seed=1)
        if peers["crowdkit"]:
            gap = float(np.abs(ours_em(votes) - crowd_kit(votes)).max())
            rows.append(Row(f"largest |P - crowd-kit|, {silent:.0%} silent", gap, 0.005, 0.005 / max(gap, 1e-9), "P"))
        if peers["snorkel"]:
            told = fit_matched(with_nan(votes), BALANCE).p_good
            gap = float(np.nanmax(np.abs(told - snorkel(votes, BALANCE, 5000))))
            rows.append(Row(f"largest |P - Snorkel|, {silent:.0%} silent", gap, 0.005, 0.005 / max(gap, 1e-9), "P"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--voters", type=int, default=30)
    parser.add_argument("--side", choices=SIDES, help="one side alone, in this process")
    parser.add_argument("--out", type=Path, help="where that side's answer goes")
    arguments = parser.parse_args()
    if arguments.side:
        run_side(arguments.side, arguments.items, arguments.voters, arguments.out)
        return
    peers = {name: importlib.util.find_spec(name) is not None for name in ("crowdkit", "snorkel")}
    for name, there in peers.items():
        print(f"{name}: {'measured' if there else 'not installed, so not measured'}")
    rows = []
    quarter = measure("ours, Dawid-Skene", arguments.items // 4, arguments.voters)
    whole = measure("ours, Dawid-Skene", arguments.items, arguments.voters)
    linear = whole.seconds / quarter.seconds / 4
    rows.append(Row("Dawid-Skene: time at 4 x the items / (4 x the time)", linear, 1.0, 1.0 / linear, "ratio"))
    moments = measure("ours, moments", arguments.items, arguments.voters)
    if peers["crowdkit"]:
        rows += compare(whole, "ours, Dawid-Skene", "crowd-kit", arguments.voters)
    if peers["snorkel"]:
        for peer in ("Snorkel, 100 epochs", "Snorkel, 5000 epochs"):
            rows += compare(moments, "ours, moments", peer, arguments.voters)
    rows += same_answers(peers)
    for row in rows:
        print(f"{row.case}: ours {row.ours:.4g}, peer {row.peer:.4g} {row.unit}, ratio {row.ratio:.1f}")
    print_report("ensemble_vs_oracles", rows)


if __name__ == "__main__":
    main()
