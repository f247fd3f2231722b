"""Label models against crowd-kit's Dawid-Skene and Snorkel's label model: the same answers, the time and the memory.

    python benchmarks/ensemble_vs_oracles.py [--items 1000000] [--voters 30] [--peer-items 100000]

Neither peer is a dependency: each is measured where it can be imported, and said to be absent where it cannot.  Peers
run on --peer-items of the items and on half of those; what all items would take is read off the line through the two.
Ours reads the votes from arrays, as they do, in chunks.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import Row, peak_over, print_report, resident_bytes

from align.ensemble.channels import Channel
from align.ensemble.dawid_skene import DawidSkene, expectation_maximisation
from align.ensemble.moments import fit_matched
from align.ensemble.streaming import CHUNK_ROWS, fit_stream

SAME_ITEMS = 20_000
Peer = Callable[[np.ndarray], Any]


def simulate(items: int, voters: int, silent: float, seed: int) -> np.ndarray:
    """[items, voters] int8 of 0, 1 and -1: independent voters, right with probability 0.55 to 0.85."""
    rng = np.random.default_rng(seed)
    truth = rng.random(items) < 0.45
    votes = np.empty((items, voters), dtype=np.int8)
    for j, right in enumerate(np.linspace(0.55, 0.85, voters)):
        votes[:, j] = np.where(rng.random(items) < right, truth, ~truth)
        votes[rng.random(items) < silent, j] = -1
    return votes


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = function()
    return time.perf_counter() - started, found


def in_chunks(votes: np.ndarray) -> Any:
    for first in range(0, len(votes), CHUNK_ROWS):
        chunk = votes[first : first + CHUNK_ROWS].astype(float)
        chunk[chunk < 0] = np.nan
        yield chunk


def with_nan(votes: np.ndarray) -> np.ndarray:
    return np.where(votes < 0, np.nan, votes).astype(float)


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


def compare(what: str, name: str, peer: Peer, votes: np.ndarray, items: int, ours_s: tuple[float, float]) -> list[Row]:
    """The peer on `votes`, on half of them, and on the line through both, `items`; ours on the first and the last."""
    half, _ = timed(lambda: peer(votes[: len(votes) // 2]))
    whole, _ = timed(lambda: peer(votes))
    slope = max(whole - half, 0.0) / (len(votes) - len(votes) // 2)
    line = whole + slope * (items - len(votes))
    return [
        Row(f"{what}, {len(votes)} items; {name}, measured", ours_s[0], whole, whole / ours_s[0], "s"),
        Row(f"{what}, {items} items; {name}, on the line through {len(votes) // 2} and {len(votes)} items",
            ours_s[1], line, line / ours_s[1], "s"),
    ]  # fmt: skip


def same_answers(peers: dict[str, bool]) -> list[Row]:
    rows = []
    for silent in (0.0, 0.3):
        votes = simulate(SAME_ITEMS, 10, silent, seed=1)
        if peers["crowdkit"]:
            gap = float(np.abs(ours_em(votes) - crowd_kit(votes)).max())
            rows.append(Row(f"largest |P - crowd-kit|, {silent:.0%} silent", gap, 0.005, 0.005 / max(gap, 1e-9), "P"))
        if peers["snorkel"]:
            told = fit_matched(with_nan(votes), 0.45).p_good
            gap = float(np.nanmax(np.abs(told - snorkel(votes, 0.45, 5000))))
            rows.append(Row(f"largest |P - Snorkel|, {silent:.0%} silent", gap, 0.005, 0.005 / max(gap, 1e-9), "P"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--voters", type=int, default=30)
    parser.add_argument("--peer-items", type=int, default=100_000)
    arguments = parser.parse_args()
    peers = {name: importlib.util.find_spec(name) is not None for name in ("crowdkit", "snorkel")}
    for name, there in peers.items():
        print(f"{name}: {'measured' if there else 'not installed, so not measured'}")
    votes = simulate(arguments.items, arguments.voters, 0.1, seed=0)
    rows = []
    seconds: dict[int, float] = {}
    for items in (arguments.items // 4, arguments.items // 2, arguments.items):
        base = resident_bytes()
        seconds[items], _ = timed(lambda n=items: fit_stream(in_chunks(votes[:n]), DawidSkene(2.0)))  # type: ignore[misc]
        print(f"Dawid-Skene, {items} items x {arguments.voters}: {seconds[items]:.2f} s, {peak_over(base):.0f} MiB")
    linear = (seconds[arguments.items] / seconds[arguments.items // 4]) / 4
    rows.append(Row("Dawid-Skene: time at 4 x the items / (4 x the time)", linear, 1.0, 1.0 / linear, "ratio"))
    matched, _ = timed(lambda: fit_matched(with_nan(votes), 0.45))
    print(f"moments, {arguments.items} items: {matched:.2f} s")
    some = votes[: arguments.peer_items]
    if peers["crowdkit"]:
        ours, _ = timed(lambda: fit_stream(in_chunks(some), DawidSkene(2.0)))
        rows += compare("Dawid-Skene", "crowd-kit", crowd_kit, some, arguments.items, (ours, seconds[arguments.items]))
    if peers["snorkel"]:
        ours, _ = timed(lambda: fit_matched(with_nan(some), 0.45))
        for epochs in (100, 5000):
            peer = f"Snorkel, {epochs} epochs"
            rows += compare(
                "moments", peer, lambda v, e=epochs: snorkel(v, 0.45, e), some, arguments.items, (ours, matched)
            )
    rows += same_answers(peers)
    for row in rows:
        print(f"{row.case}: ours {row.ours:.4g}, peer {row.peer:.4g} {row.unit}, ratio {row.ratio:.1f}")
    print_report("ensemble_vs_oracles", rows)


if __name__ == "__main__":
    main()
