"""A rank of the layout tests of the preference losses: `python preference_job.py LAUNCH.json`.

For every case and token budget it takes one step of `train_round` on a policy that differs from its reference, and
keeps the loss and the gradient where the optimizer would step.  A launch is {"out": path, "jobs": {"model", "budgets",
"cases": {name: {"loss", "labels"}}}}; the gradients go to OUT.gradients.
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from align.distributed import Ranks, close, connect
from align.recipe import Recipe
from align.training.engine import PolicyEngine
from align.training.trainers import RoundData, train_round
from tests.e2e.training_job import preferences


def recipe_for(model: str, case: dict[str, Any], budget: int) -> Recipe:
    """All pairs in one step."""
    return Recipe.model_validate(
        {
            "name": "test",
            "policy": {"model": model, "dtype": "float32"},
            "verifiers": [{"kind": "repetition", "name": "filler"}],
            "pairs": {"labels": case["labels"]},
            "training": {
                "loss": case["loss"], "pairs_per_step": 100, "tokens_per_batch": budget, "logit_chunk_tokens": 16,
            },
        }
    )  # fmt: skip


class Recorder:
    """An engine whose step gives the averaged gradient away instead of applying it."""

    def __init__(self, model: str, ranks: Ranks) -> None:
        filler = recipe_for(model, {"loss": {}, "labels": "soft"}, 100)
        self.engine = PolicyEngine(Path(model), filler, ranks, total_steps=1)
        self.gradient = torch.zeros(0)
        draw = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in self.engine.model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
        self.engine.apply = self.take  # type: ignore[method-assign]

    def take(self) -> bool:
        parameters = [p for p in self.engine.model.parameters() if p.grad is not None]
        self.gradient = torch.cat([p.grad.flatten() for p in parameters]).clone()
        for parameter in parameters:
            parameter.grad = None
        return True


def run(job: dict[str, Any], ranks: Ranks) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """By case/budget: the metrics of the step with what the trainer remembers of it, and the gradient."""
    recorder = Recorder(job["model"], ranks)
    soft, samples = preferences()
    hard = [replace(p, p_win=1.0, p_tie=0.0, weight=1.0) for p in soft]
    found: dict[str, Any] = {}
    gradients: dict[str, torch.Tensor] = {}
    for name, case in job["cases"].items():
        for budget in job["budgets"]:
            recipe = recipe_for(job["model"], case, budget)
            recorder.engine.recipe = recipe  # what says how much goes into a forward
            recorder.engine.trainer_state = {"mean_reward": 0.3, "rewards": 20}
            rows: list[dict[str, Any]] = []
            data = RoundData(0, samples=samples, pairs=soft if case["labels"] == "soft" else hard)
            train_round(recorder.engine, data, recipe, rows.append)
            found[f"{name}/{budget}"] = rows[0] | recorder.engine.trainer_state
            gradients[f"{name}/{budget}"] = recorder.gradient
    recorder.engine.close()
    return found, gradients


def main() -> None:
    """One launch."""
    launch = json.loads(Path(sys.argv[1]).read_text())
    ranks = connect(deadline_s=120)
    found, gradients = run(launch["jobs"], ranks)
    Path(f"{launch['out']}.{ranks.rank}").write_text(json.dumps(found))
    if ranks.rank == 0:
        torch.save(gradients, f"{launch['out']}.gradients")
    close(ranks)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main()
