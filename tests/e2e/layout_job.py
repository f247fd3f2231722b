"""A rank of the layout tests: `python layout_job.py LAUNCH.json`.

For every case and layout it runs `train_round` with all examples in one step, on a policy that differs from its
reference, and keeps the losses and the gradients where an optimizer would step.  With several epochs the policy moves
in between, along the same path in every layout, so that what the later steps start from does not hang on the earlier
ones.  A launch is {"out": path, "jobs": {"model", "layouts": {name: [tokens_per_batch, logit_chunk_tokens]}, "cases":
{name: {"data", "training", "labels"}}}}; the gradients go to OUT.gradients.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from align.distributed import Ranks, close, connect
from align.recipe import Recipe
from align.training.engine import PolicyEngine
from align.training.sharded import ShardedModel
from align.training.trainers import RoundData, train_round
from tests.e2e import rl_job, scored_job, supervised_job
from tests.e2e.training_job import preferences

STATE = {"preferences": {"mean_reward": 0.3, "rewards": 20}}
"""What the trainer remembers of the rounds before."""
EVERYTHING = 100  # examples of a step, more than there are


def recipe_for(model: str, case: dict[str, Any], layout: Sequence[int]) -> Recipe:
    """Everything in one step, laid out so."""
    tokens, chunk = layout
    counted = "pairs_per_step" if case["data"] == "preferences" else "responses_per_step"
    return Recipe.model_validate(
        {
            "name": "test",
            "policy": {"model": model, "dtype": "float32"},
            "sampling": {"samples_per_prompt": 4, "max_new_tokens": 12},
            "verifiers": [{"kind": "repetition", "name": "filler"}],
            "pairs": {"labels": case.get("labels", "soft")},
            "training": {
                **case["training"], counted: EVERYTHING, "tokens_per_batch": tokens, "logit_chunk_tokens": chunk,
            },
        }
    )  # fmt: skip


def data_for(case: dict[str, Any], tokenizer: Any) -> RoundData:
    """The round that the trainer of this case reads."""
    if case["data"] == "preferences":
        pairs, samples = preferences()
        if case["labels"] == "hard":
            pairs = [replace(p, p_win=1.0, p_tie=0.0, weight=1.0) for p in pairs]
        return RoundData(0, samples, pairs=pairs)
    made = {"rollouts": rl_job.rollouts, "responses": scored_job.responses}
    samples, scores = made[case["data"]]() if case["data"] in made else supervised_job.scored(tokenizer)
    return RoundData(0, samples, scores=scores)


class Recorder:
    """An engine with a critic, whose steps give the averaged gradient away instead of applying it."""

    def __init__(self, model: str, ranks: Ranks) -> None:
        filler = recipe_for(model, {"data": "rollouts", "training": {"algorithm": "ppo"}}, (100, 16))
        self.engine = PolicyEngine(Path(model), filler, ranks, total_steps=1)
        self.critic = self.engine.critic
        assert self.critic is not None
        self.gradients: list[torch.Tensor] = []
        self._draw = torch.Generator()
        self._learners: list[ShardedModel] = [self.engine, self.critic]
        self._initial = [[p.detach().clone() for p in learner._wrapped.parameters()] for learner in self._learners]
        for learner in self._learners:
            learner.apply = self._taking(learner)  # type: ignore[method-assign]

    def start(self, recipe: Recipe) -> None:
        """Back to the policy and critic that every case begins with, none of which is the initial one."""
        self.engine.recipe = recipe  # what says how much goes into a forward
        self.engine.critic = self.critic if recipe.training.trainer.critic else None
        assert self.critic is not None
        self.critic.recipe = recipe
        self.gradients = []
        self._draw.manual_seed(0)
        with torch.no_grad():
            for learner, initial in zip(self._learners, self._initial, strict=True):
                for parameter, value in zip(learner._wrapped.parameters(), initial, strict=True):
                    parameter.copy_(value)
                self._move(learner, 0.05)

    def _move(self, learner: ShardedModel, size: float) -> None:
        with torch.no_grad():
            for parameter in learner._wrapped.parameters():
                parameter.add_(size * torch.randn(parameter.shape, generator=self._draw))

    def _taking(self, learner: ShardedModel) -> Callable[[], bool]:
        def take() -> bool:
            parameters = [p for p in learner._wrapped.parameters() if p.grad is not None]
            self.gradients.append(torch.cat([p.grad.flatten() for p in parameters]).clone())
            for parameter in parameters:
                parameter.grad = None
            self._move(learner, 0.01)
            return True

        return take


def run(job: dict[str, Any], ranks: Ranks) -> tuple[dict[str, Any], dict[str, list[torch.Tensor]]]:
    """By case/layout: the metrics of the steps, what the trainer remembers, and the gradients in their order."""
    recorder = Recorder(job["model"], ranks)
    found: dict[str, Any] = {}
    gradients: dict[str, list[torch.Tensor]] = {}
    for name, case in job["cases"].items():
        data = data_for(case, recorder.engine.tokenizer)
        for label, layout in job["layouts"].items():
            recipe = recipe_for(job["model"], case, layout)
            recorder.start(recipe)
            recorder.engine.trainer_state = dict(STATE.get(case["data"], {}))
            rows: list[dict[str, Any]] = []
            train_round(recorder.engine, data, recipe, rows.append)
            steps = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
            found[f"{name}/{label}"] = {"steps": steps, "state": recorder.engine.trainer_state}
            gradients[f"{name}/{label}"] = recorder.gradients
    recorder.engine.critic = recorder.critic
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
