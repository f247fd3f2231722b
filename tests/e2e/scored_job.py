"""A rank of the tests of groups and wrong answers: `python scored_job.py LAUNCH.json`, {"out": path, "jobs": {…}}.

Job keys: model, training (recipe block), rounds (train until this version), save (checkpoint after the first round),
load (go on from one), weights (write them), poison (a token id whose embedding becomes NaN), prompts (how many).
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from align.distributed import Ranks
from align.errors import AlignError
from align.recipe import Recipe
from align.records import Given, Sample, Score, content_id
from align.training.engine import PolicyEngine
from align.training.trainers import RoundData, train_round
from tests.e2e.jobs import lean, serve

RESPONSES = 4


def recipe_for(model: str, training: dict[str, Any]) -> Recipe:
    """A recipe around a model directory; what does not concern training is filler."""
    base = {"learning_rate": 1e-2, "responses_per_step": 16, "tokens_per_batch": 96, "logit_chunk_tokens": 16}
    return Recipe.model_validate(
        {
            "name": "test",
            "policy": {"model": model, "dtype": "float32"},
            "prompts": {"source": "asked.jsonl"},
            "sampling": {"samples_per_prompt": RESPONSES, "max_new_tokens": 12, "temperature": 0.8},
            "verifiers": [{"kind": "repetition", "name": "filler"}],
            "training": {**base, **training},
        }
    )


def responses(prompts: int = 9) -> tuple[dict[str, Sample], list[Score]]:
    """Prompts of several lengths with four responses; one prompt has one response left with a score, one four equal
    ones, and one has only right responses."""
    rng = random.Random(5)
    samples: dict[str, Sample] = {}
    scores: list[Score] = []
    for p in range(prompts):
        prompt = tuple(rng.randrange(3, 20) for _ in range(rng.randrange(2, 9)))
        for g in range(RESPONSES):
            sample_id = content_id(p, g)
            samples[sample_id] = Sample(
                id=sample_id, prompt_id=f"p{p}", index=g, policy_version=0, seed=0, prompt_ids=prompt,
                response_ids=tuple(rng.randrange(3, 20) for _ in range(rng.randrange(1, 13))), logprobs=(), text="",
                finish_reason="stop", temperature=0.8, top_p=1.0, top_k=0, max_new_tokens=12,
            )  # fmt: skip
            chance = {3: 0.5, 4: 0.6 + 0.1 * g}.get(p, rng.random())
            if p != 5 or g == 1:
                scores.append(Score(sample_id, f"p{p}", chance, chance, 0.1, 3))
    return samples, scores


def given() -> dict[str, Given]:
    """Every prompt's bad answer, for a recipe that names their column."""
    return {f"p{p}": Given(f"bad {p}", (3 + p, 4, 5)) for p in range(9)}


def run(job: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Train as the job says; reports every step's metrics, the counts and how the better responses fared."""
    recipe = recipe_for(job["model"], job.get("training", {}))
    engine = PolicyEngine(Path(job["model"]), recipe, ranks, total_steps=20)
    if job.get("load"):
        engine.load(Path(job["load"]))
    if job.get("poison"):
        with torch.no_grad():
            engine.model.get_input_embeddings().weight[job["poison"]] = float("nan")
    samples, scores = responses(job.get("prompts", 9))
    steps: list[dict[str, Any]] = []
    counts: dict[str, int] = {}
    stopped, warnings, error = "", list[str](), None
    before = lean(engine, samples, scores)
    try:
        for index in range(engine.version, job.get("rounds", 2)):
            data = RoundData(index, samples, scores=scores, dispreferred=given())
            report = train_round(engine, data, recipe, steps.append)
            counts, stopped = report.counts or counts, report.stopped
            warnings += report.warnings
            engine.version = index + 1
            if job.get("save") and engine.version == 1:
                Path(job["save"]).mkdir(exist_ok=True)
                engine.save(Path(job["save"]))
    except AlignError as caught:
        error = str(caught)
    gain = lean(engine, samples, scores) - before
    weights = {name: tensor.clone() for name, tensor in engine.named_weights()}
    if job.get("weights") and ranks.rank == 0:
        torch.save(weights, job["weights"])
    engine.close()
    sums = {k: float(w.double().sum()) for k, w in weights.items()}
    told = {"steps": steps, "counts": counts, "stopped": stopped, "error": error, "step": engine.step}
    told["warnings"] = warnings
    return {**told, "weights": sums, "gain": gain, "state": dict(engine.trainer_state)}


if __name__ == "__main__":
    serve(run)
