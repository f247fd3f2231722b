"""A rank of the policy-gradient tests: `python rl_job.py LAUNCH.json`, with {"out": path, "jobs": {name: job}}.

Job keys: model, training, policy (recipe blocks), rounds (train until this version), save (checkpoint after the first
round), load (go on from one), weights (write policy and critic).
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from align.distributed import Ranks
from align.recipe import Recipe
from align.records import Sample, Score, content_id
from align.training.engine import PolicyEngine
from align.training.trainers import RoundData, train_round
from align.training.weights_view import named_weights
from tests.e2e.jobs import lean, serve

RESPONSES = 4


def recipe_for(model: str, training: dict[str, Any], policy: dict[str, Any]) -> Recipe:
    """A recipe around a model directory; what does not concern training is filler."""
    base = {"learning_rate": 1e-2, "responses_per_step": 16, "tokens_per_batch": 96, "logit_chunk_tokens": 16}
    return Recipe.model_validate(
        {
            "name": "test",
            "policy": {"model": model, "dtype": "float32", **policy},
            "sampling": {"samples_per_prompt": RESPONSES, "max_new_tokens": 12},
            "verifiers": [{"kind": "repetition", "name": "filler"}],
            "training": {**base, **training},
        }
    )


def rollouts(prompts: int = 9) -> tuple[dict[str, Sample], list[Score]]:
    """Prompts of several lengths with four scored responses and a greedy one; one response has no score, and all
    responses to one prompt have the same."""
    rng = random.Random(11)
    samples: dict[str, Sample] = {}
    scores: list[Score] = []
    for p in range(prompts):
        prompt = tuple(rng.randrange(3, 20) for _ in range(rng.randrange(2, 9)))
        for g in range(RESPONSES + 1):
            sample_id = content_id(p, g)
            response = tuple(rng.randrange(3, 20) for _ in range(rng.randrange(1, 13)))
            samples[sample_id] = Sample(
                id=sample_id, prompt_id=f"p{p}", index=g, policy_version=0, seed=0, prompt_ids=prompt,
                response_ids=response, logprobs=tuple(-rng.random() * 4 for _ in response), text="",
                finish_reason="length" if len(response) == 12 else "stop",
                temperature=1.0 if g < RESPONSES else 0.0, top_p=1.0, top_k=0, max_new_tokens=12,
            )  # fmt: skip
            chance = 0.5 if p == 3 else rng.random()
            if (p, g) != (5, 1):
                scores.append(Score(sample_id, f"p{p}", chance, chance, 0.1, 3))
    return samples, scores


def run(job: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Train as the job says; reports every step's metrics, the counts and how the better responses fared."""
    recipe = recipe_for(job["model"], job.get("training", {}), job.get("policy", {}))
    engine = PolicyEngine(Path(job["model"]), recipe, ranks, total_steps=20)
    if job.get("load"):
        engine.load(Path(job["load"]))
    samples, scores = rollouts()
    steps: list[dict[str, Any]] = []
    counts: dict[str, int] = {}
    drawn = [s for s in scores if samples[s.sample_id].temperature]  # greedy responses are baselines
    before = lean(engine, samples, drawn)
    for index in range(engine.version, job.get("rounds", 2)):
        counts = train_round(engine, RoundData(index, samples, scores=scores), recipe, steps.append).counts
        engine.version = index + 1
        if job.get("save") and engine.version == 1:
            Path(job["save"]).mkdir(exist_ok=True)
            engine.save(Path(job["save"]))
    after = lean(engine, samples, drawn)
    weights = {name: tensor.clone() for name, tensor in engine.named_weights()}
    if engine.critic is not None:
        weights |= {f"critic.{name}": t.clone() for name, t in named_weights(engine.critic._wrapped)}
    if job.get("weights") and ranks.rank == 0:
        torch.save(weights, job["weights"])
    state = dict(engine.trainer_state)
    engine.close()
    sums = {k: float(w.double().sum()) for k, w in weights.items()}
    return {"steps": steps, "counts": counts, "weights": sums, "gain": after - before, "state": state}


if __name__ == "__main__":
    serve(run)
