"""Every trainer on the arithmetic task: same starting models, same verifiers, same number of samples, three seeds.

    python benchmarks/arithmetic_trainers.py                        # every recipe of the task and every variant
    python benchmarks/arithmetic_trainers.py --only quickstart ppo --seeds 0

For each seed the quickstart's cold start is made once; every recipe then starts from it, so differences are the
trainers' own.  Runs go one per core and stay in `--output`, where a second call finds them finished.  Accuracy is on
held-out problems by the gold verifier, which no trainer sees; KL is to the starting model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from align.recipe import Recipe
from align.recipe_file import load_recipe
from benchmarks.common import Row, print_report

ROOT = Path(__file__).resolve().parents[1]
BASE = "quickstart"
MORE_KEPT = ("training.responses_per_step=256",)
"""Best-of-n keeps one response in eight; a loss that keeps more takes larger steps, not many more."""
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ipo": (BASE, ("training.loss.name=ipo", "training.loss.beta=1")),
    "simpo": (BASE, ("training.loss.name=simpo", "training.loss.beta=2", "training.reference=none")),
    "orpo": (BASE, ("training.loss.name=orpo", "training.loss.beta=0.5", "training.reference=none")),
    "gdpo": (BASE, ("training.loss.name=gdpo",)),
    "dr_dpo": (BASE, ("training.loss.name=dr_dpo",)),
    "plackett_luce": ("lipo", ("training.loss.name=plackett_luce",)),
    "gpo": ("lipo", ("training.loss.name=gpo", "training.reference=round")),
    "ranklist": ("lipo", ("training.loss.name=ranklist",)),
    "reward_regression": ("lipo", ("training.loss.name=reward_regression",)),
    "nsr": ("w_reinforce", ("training.algorithm=nsr",)),
    "psr": ("w_reinforce", ("training.algorithm=psr",)),
    "unlikelihood": ("w_reinforce", ("training.algorithm=unlikelihood", "training.learning_rate=3e-5")),
    "pairwise_grpo": ("grpo", ("training.algorithm=pairwise_grpo",)),
    "pairwise_ppo": ("ppo", ("training.algorithm=pairwise_ppo",)),
    "p3o": ("grpo", ("training.algorithm=p3o", "training.rl.kl.place=reward")),
    "filter": ("best_of_n", ("training.loss.name=filter", *MORE_KEPT)),
    "rwr": ("best_of_n", ("training.loss.name=rwr", "training.loss.beta=0.2", *MORE_KEPT)),
    "awr": ("best_of_n", ("training.loss.name=awr", "training.loss.beta=0.2", *MORE_KEPT)),
    "mml": ("best_of_n", ("training.loss.name=mml", *MORE_KEPT)),
    "quark": ("best_of_n", ("training.loss.name=quark", "training.supervised.quantiles_over=prompt", *MORE_KEPT)),
    "masked_thought": ("best_of_n", ("training.loss.name=masked_thought", *MORE_KEPT)),
    "unlikelihood_sft": (
        "best_of_n",
        ("training.loss.name=unlikelihood_sft", "training.supervised.unlikelihood_weight=0.05", *MORE_KEPT),
    ),
    "sharpening": ("best_of_n", ("training.loss.name=sharpening",)),
    "rlhf_sharpening": ("best_of_n", ("training.loss.name=rlhf_sharpening", "training.loss.beta=1", *MORE_KEPT)),
    "reward_conditioning": (
        "conditional",
        ("training.loss.name=reward_conditioning", 'training.supervised.control=[q, r, ";", c]'),
    ),
}
"""Losses without a recipe of their own: the recipe that is changed, and how."""
METRICS = ("accuracy", "pass@8", "kl", "entropy")


@dataclass(frozen=True)
class Trainer:
    """A recipe and what is changed in it."""

    path: Path
    overrides: tuple[str, ...] = ()


def task_trainers() -> dict[str, Trainer]:
    """The recipes of the arithmetic task that start from the quickstart's model, and their variants."""
    start = load_recipe(ROOT / "recipes" / f"{BASE}.yaml")
    found = {}
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        recipe = load_recipe(path)
        if recipe.policy == start.policy and recipe.cold_start == start.cold_start and recipe.prompts == start.prompts:
            found[recipe.name] = Trainer(path)
    return found | {name: Trainer(found[base].path, changes) for name, (base, changes) in VARIANTS.items()}


def budget(recipe: Recipe) -> int:
    """Responses drawn for training in the whole run."""
    return recipe.rounds.count * recipe.rounds.prompts_per_round * recipe.sampling.samples_per_prompt


def align(arguments: Sequence[str], core: int | None, log: Path) -> None:
    """`align …` in a process of its own, on one core where one is given."""
    environment = dict(os.environ)
    command = [sys.executable, "-m", "align.cli", *arguments]
    if core is not None:
        environment["OMP_NUM_THREADS"] = "1"
        command = ["taskset", "-c", str(core), *command]
    with log.open("w") as out:
        status = subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, check=False)
    if status.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit status {status.returncode}, see {log}")


def make_start(seed: int, output: Path) -> Path:
    """The model that every run of this seed starts from."""
    name = f"start-{seed}"
    directory = output / name / "cold_start"
    if not directory.is_dir():
        recipe = ROOT / "recipes" / f"{BASE}.yaml"
        settings = [f"seed={seed}", f"name={name}", f"output_dir={output}"]
        align(["sample", str(recipe), "--ranks", "2", *settings], None, output / f"{name}.log")
    return directory


def run_one(trainer: Trainer, name: str, seed: int, start: Path, core: int, output: Path) -> dict[str, Any]:
    """One training run; its summary."""
    run = f"{name}-{seed}"
    settings = [
        f"seed={seed}", f"name={run}", f"output_dir={output}", f"policy.model={start}", "policy.from_scratch=null",
        "cold_start=null", "evaluation.every=1000", "training.zero_stage=0",
    ]  # fmt: skip
    align(["run", str(trainer.path), "--ranks", "1", *settings, *trainer.overrides], core, output / f"{run}.log")
    found: dict[str, Any] = json.loads((output / run / "summary.json").read_text())
    return found


def run_all(
    trainers: dict[str, Trainer], seeds: Sequence[int], output: Path, workers: int
) -> dict[str, list[dict[str, Any]]]:
    """Summaries by trainer, in the order of the seeds."""
    starts = {seed: make_start(seed, output) for seed in seeds}
    cores: Queue[int] = Queue()
    for core in sorted(os.sched_getaffinity(0))[-workers:]:
        cores.put(core)

    def job(name: str, seed: int) -> dict[str, Any]:
        core = cores.get()
        try:
            return run_one(trainers[name], name, seed, starts[seed], core, output)
        finally:
            cores.put(core)

    with ThreadPoolExecutor(cores.qsize()) as pool:
        jobs = {name: [pool.submit(job, name, seed) for seed in seeds] for name in trainers}
        return {name: [future.result() for future in futures] for name, futures in jobs.items()}


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def table(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Markdown, best trainer first, the starting model on top."""

    def value(summary: dict[str, Any], when: str, metric: str) -> float:
        return float(summary["evaluation"][when][metric]["value"])

    lines = ["| trainer | " + " | ".join(METRICS) + " | gain | seconds |", "|---" * (len(METRICS) + 3) + "|"]
    first = next(iter(found.values()))
    cells = [spread([value(s, "before", m) for s in first]) for m in METRICS]
    lines.append(f"| before | {' | '.join(cells)} | | |")
    for name in sorted(found, key=lambda n: -statistics.mean(value(s, "after", "accuracy") for s in found[n])):
        runs = found[name]
        cells = [spread([value(s, "after", m) for s in runs]) for m in METRICS]
        gain = statistics.mean(value(s, "after", "accuracy") - value(s, "before", "accuracy") for s in runs)
        seconds = statistics.mean(s["seconds"]["total"] for s in runs)
        lines.append(f"| {name} | {' | '.join(cells)} | {100 * gain:+.1f} | {seconds:.0f} |")
    return lines


def main() -> None:
    known = task_trainers()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=sorted(known), choices=sorted(known), metavar="NAME")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="runs at once, a core each")
    parser.add_argument("--output", type=Path, default=Path("runs/arithmetic_trainers"))
    asked = parser.parse_args()
    output: Path = asked.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    chosen = {name: known[name] for name in asked.only}
    budgets = {name: budget(load_recipe(t.path, t.overrides)) for name, t in chosen.items()}
    if len(set(budgets.values())) > 1:
        raise SystemExit(f"the recipes draw different numbers of samples: {budgets}")
    found = run_all(chosen, asked.seeds, output, asked.workers)
    print(f"{next(iter(budgets.values()))} samples per run, seeds {asked.seeds}; mean ± standard deviation\n")
    print("\n".join(table(found)))
    rows = []
    for name, runs in found.items():
        before, after = (
            statistics.mean(s["evaluation"][w]["accuracy"]["value"] for s in runs) for w in ("before", "after")
        )
        rows.append(Row(name, after, before, after / before, "accuracy after, before"))
    print_report("arithmetic_trainers", rows)


if __name__ == "__main__":
    main()
