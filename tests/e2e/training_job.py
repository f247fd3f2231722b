"""A rank of the training tests: `python training_job.py LAUNCH.json`, with {"out": path, "jobs": {name: job}}.

Job keys: model, training, policy (recipe blocks), rounds (train until this version), save (checkpoint after the first
round), load (go on from one), weights (write them), export (Hugging Face directory), poison (a token id whose
embedding becomes NaN).
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from align.distributed import Ranks
from align.errors import AlignError
from align.recipe import Recipe
from align.records import Pair, Sample, content_id
from align.training.engine import PolicyEngine
from align.training.trainers import RoundData, train_round
from tests.e2e.jobs import serve


def recipe_for(model: str, training: dict[str, Any], policy: dict[str, Any]) -> Recipe:
    """A recipe around a model directory; what does not concern training is filler."""
    base = {"learning_rate": 1e-2, "pairs_per_step": 8, "tokens_per_batch": 96, "logit_chunk_tokens": 16}
    return Recipe.model_validate(
        {
            "name": "test",
            "policy": {"model": model, "dtype": "float32", **policy},
            "verifiers": [{"kind": "repetition", "name": "filler"}],
            "training": {**base, **training},
        }
    )


def preferences(prompts: int = 10) -> tuple[list[Pair], dict[str, Sample]]:
    """Prompts of several lengths with three responses each and one or two soft pairs: 15 pairs for 10 prompts."""
    rng = random.Random(7)
    samples: dict[str, Sample] = {}
    pairs: list[Pair] = []
    for p in range(prompts):
        prompt = tuple(rng.randrange(3, 20) for _ in range(rng.randrange(2, 9)))
        ids = [content_id(p, g) for g in range(3)]
        for g, sample_id in enumerate(ids):
            response = tuple(rng.randrange(3, 20) for _ in range(rng.randrange(1, 12)))
            samples[sample_id] = Sample(
                id=sample_id, prompt_id=f"p{p}", index=g, policy_version=0, seed=0, prompt_ids=prompt,
                response_ids=response, logprobs=(), text="", finish_reason="stop", temperature=1.0, top_p=1.0, top_k=0,
                max_new_tokens=12,
            )  # fmt: skip
        for other, p_win, weight in [(1, 0.7, 0.9), (2, 0.6, 0.8)][: 1 + p % 2]:
            pair_id = content_id(ids[0], ids[other])
            pairs.append(Pair(pair_id, f"p{p}", ids[0], ids[other], p_win, 0.1, weight, 0.5, "test"))
    return pairs, samples


def run(job: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Train as the job says; reports every step's metrics and writes what is asked for."""
    recipe = recipe_for(job["model"], job.get("training", {}), job.get("policy", {}))
    engine = PolicyEngine(Path(job["model"]), recipe, ranks, total_steps=20)
    if job.get("load"):
        engine.load(Path(job["load"]))
    if job.get("poison"):
        with torch.no_grad():
            engine.model.get_input_embeddings().weight[job["poison"]] = float("nan")
    pairs, samples = preferences()
    steps: list[dict[str, Any]] = []
    error = None
    try:
        for index in range(engine.version, job.get("rounds", 2)):
            train_round(engine, RoundData(index, samples, pairs=pairs), recipe, steps.append)
            engine.version = index + 1
            if job.get("save") and engine.version == 1:
                Path(job["save"]).mkdir(exist_ok=True)
                engine.save(Path(job["save"]))
    except AlignError as caught:
        error = str(caught)
    weights = {name: tensor.clone() for name, tensor in engine.named_weights()}
    if job.get("weights") and ranks.rank == 0:
        torch.save(weights, job["weights"])
    if job.get("export"):
        engine.save_pretrained(Path(job["export"]), recipe.export.lora)
    engine.close()
    sums = {k: float(w.double().sum()) for k, w in weights.items()}
    return {"steps": steps, "error": error, "step": engine.step, "weights": sums}


if __name__ == "__main__":
    serve(run)
