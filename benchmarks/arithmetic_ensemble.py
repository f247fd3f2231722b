"""What the label model is worth to the policy: the arithmetic task with a dependent bloc and a hostile verifier.

    python benchmarks/arithmetic_ensemble.py                 # three seeds, four ways to use the same eight verifiers
    python benchmarks/arithmetic_ensemble.py --only ensemble majority --seeds 0

Eight verifiers, none of which knows the answer and each of which errs by itself: casting out nines three times with 30
to 35% of its answers turned round, the last digit, the rough size asked three times (one family: right and most wrong
answers pass), and one that says the opposite of casting out nines four times out of five.  From one cold start a seed:

    ensemble         the gate without labels, soft pairs
    ensemble_labels  the same, and gold on the responses to 16 training prompts a round may be seen
    majority         majority vote, hard pairs
    best_single      the verifier with the best accuracy on gold (known thanks to gold only), hard pairs

Everything else is the quickstart's.  Accuracy is on held-out problems by the gold verifier; the last lines print the
gaps, seed by seed too, since all arms of a seed begin from the same weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arithmetic_trainers import ROOT, Trainer, make_start, run_one, spread, table
from benchmarks.common import Row, print_report

BASE = ROOT / "recipes" / "quickstart.yaml"
VERIFIERS: tuple[dict[str, Any], ...] = (
    {"kind": "arithmetic", "name": "nines_a", "check": "nines", "flip_rate": 0.3},
    {"kind": "arithmetic", "name": "nines_b", "check": "nines", "flip_rate": 0.3},
    {"kind": "arithmetic", "name": "nines_c", "check": "nines", "flip_rate": 0.35},
    {"kind": "arithmetic", "name": "last_digit", "check": "last_digit", "flip_rate": 0.2},
    {"kind": "arithmetic", "name": "size_a", "check": "magnitude", "flip_rate": 0.05, "family": "size"},
    {"kind": "arithmetic", "name": "size_b", "check": "magnitude", "flip_rate": 0.05, "family": "size"},
    {"kind": "arithmetic", "name": "size_c", "check": "magnitude", "flip_rate": 0.05, "family": "size"},
    {"kind": "arithmetic", "name": "hostile", "check": "nines", "flip_rate": 0.8},
)
SOFT = ("ensemble.method=auto", "pairs.labels=soft")
ARMS: dict[str, tuple[str, ...]] = {
    "majority": ("ensemble.method=majority", "pairs.labels=hard"),
    "ensemble": SOFT,
    "ensemble_labels": (*SOFT, "ensemble.labels.prompts=16"),
    "best_single": ("ensemble.method=mean", "pairs.labels=hard"),
}
"""What each arm changes.  The majority's first round, drawn from the cold start, says which single verifier is best."""
ORDER = ("ensemble_labels", "ensemble", "majority", "best_single")


def verifiers(chosen: Sequence[dict[str, Any]]) -> str:
    """As an override of the recipe."""
    return f"verifiers={json.dumps(list(chosen))}"


def best_single(output: Path, seed: int) -> dict[str, Any]:
    """The block of the verifier that gold likes best on the first round of this seed."""
    report = json.loads((output / f"majority-{seed}" / "summary.json").read_text())["ensemble"][0]["on_gold"]
    name = report["best_single"].removeprefix("verifier/")
    return next(block for block in VERIFIERS if block["name"] == name)


def run_seed(seed: int, arms: Sequence[str], output: Path, core: int) -> dict[str, dict[str, Any]]:
    """The summaries of one seed's arms, by arm; one after the other."""
    start = make_start(seed, output)
    found = {}
    for arm in arms:
        chosen = [best_single(output, seed)] if arm == "best_single" else VERIFIERS
        trainer = Trainer(BASE, (verifiers(chosen), *ARMS[arm]))
        found[arm] = run_one(trainer, arm, seed, start, core, output)
    return found


def accuracy(summary: dict[str, Any]) -> float:
    return float(summary["evaluation"]["after"]["accuracy"]["value"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="seeds at once, a core each")
    parser.add_argument("--output", type=Path, default=Path("runs/arithmetic_ensemble"))
    asked = parser.parse_args()
    output: Path = asked.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    arms = [arm for arm in ARMS if arm in asked.only or (arm == "majority" and "best_single" in asked.only)]
    cores: Queue[int] = Queue()
    for core in sorted(os.sched_getaffinity(0))[-asked.workers :]:
        cores.put(core)

    def job(seed: int) -> dict[str, dict[str, Any]]:
        core = cores.get()
        try:
            return run_seed(seed, arms, output, core)
        finally:
            cores.put(core)

    with ThreadPoolExecutor(cores.qsize()) as pool:
        by_seed = list(pool.map(job, asked.seeds))
    found = {arm: [runs[arm] for runs in by_seed] for arm in arms}
    print("\n".join(table(found)))
    order = [arm for arm in ORDER if arm in found]
    rows = []
    for better, worse in zip(order, order[1:], strict=False):
        a, b = [accuracy(s) for s in found[better]], [accuracy(s) for s in found[worse]]
        gaps = [100 * (x - y) for x, y in zip(a, b, strict=True)]
        told = ", ".join(f"{gap:+.1f}" for gap in gaps)
        print(
            f"{better} - {worse}: {statistics.mean(gaps):+.1f} points (by seed {told}), {spread(a)} against {spread(b)}"
        )
        ours, peer = statistics.mean(a), statistics.mean(b)
        rows.append(Row(f"{better} over {worse}", ours, peer, ours / peer, "accuracy after training"))
    print_report("arithmetic_ensemble", rows)


if __name__ == "__main__":
    main()
