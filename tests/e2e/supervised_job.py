"""A rank of the supervised tests: `python supervised_job.py LAUNCH.json`, as `training_job.py` with scored responses.

Job keys: model, training, policy (recipe blocks), rounds (train until this version), save (checkpoint after the first
round), load (go on from one), freeze (report what each round's optimizer holds).
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from align.distributed import Ranks
from align.errors import AlignError
from align.recipe import Recipe
from align.records import Sample, Score
from align.training.engine import PolicyEngine
from align.training.trainers import RoundData, train_round
from tests.e2e.jobs import serve
from tests.e2e.training_job import preferences


def scored(tokenizer: Any) -> tuple[dict[str, Sample], list[Score]]:
    """30 responses to 10 prompts with scores in (0, 1); one was cut."""
    rng = random.Random(11)
    _, samples = preferences()
    samples = {i: replace(s, text=tokenizer.decode(list(s.response_ids))) for i, s in samples.items()}
    cut = min(samples)
    samples[cut] = replace(samples[cut], finish_reason="length")
    scores = []
    for sample in samples.values():
        value = round(rng.random(), 3)
        scores.append(Score(sample.id, sample.prompt_id, value, value, 0.0, 3))
    return samples, scores


def optimizer_state(engine: PolicyEngine) -> int:
    """Numbers in the optimizer's first moments."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return sum(state["exp_avg"].numel() for state in optimizer.state.values())


def run(job: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Train as the job says; reports every step's metrics, what was left out, and the weights' sums."""
    base = {"algorithm": "sft", "responses_per_step": 8, "tokens_per_batch": 96, "logit_chunk_tokens": 16}
    recipe = Recipe.model_validate(
        {
            "name": "test",
            "policy": {"model": job["model"], "dtype": "float32", **job.get("policy", {})},
            "verifiers": [{"kind": "repetition", "name": "filler"}],
            "training": {**base, **job.get("training", {})},
        }
    )
    engine = PolicyEngine(Path(job["model"]), recipe, ranks, total_steps=20)
    if job.get("load"):
        engine.load(Path(job["load"]))
    samples, scores = scored(engine.tokenizer)
    steps: list[dict[str, Any]] = []
    counts: dict[str, int] = {}
    freezes: list[dict[str, Any]] = []
    error = None
    try:
        for index in range(engine.version, job.get("rounds", 2)):
            before = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
            counts = train_round(engine, RoundData(index, samples, scores), recipe, steps.append).counts
            engine.version = index + 1
            if job.get("freeze"):
                freezes.append(_freeze_report(engine, before))
            if job.get("save") and engine.version == 1:
                Path(job["save"]).mkdir(exist_ok=True)
                engine.save(Path(job["save"]))
    except AlignError as caught:
        error = str(caught)
    sums = {name: float(tensor.double().sum()) for name, tensor in engine.named_weights()}
    engine.close()
    return {"steps": steps, "counts": counts, "error": error, "weights": sums, "freezes": freezes}


def _freeze_report(engine: PolicyEngine, before: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Which weights a round left bit for bit as they were, and how much the optimizer holds."""
    named = dict(engine.model.named_parameters())
    return {
        "frozen": sorted(engine.frozen),
        "same": sorted(n for n, p in named.items() if torch.equal(p, before[n])),
        "live_numbers": sum(p.numel() for p in named.values() if p.requires_grad),
        "all_numbers": sum(p.numel() for p in named.values()),
        "state_numbers": optimizer_state(engine),
    }


if __name__ == "__main__":
    serve(run)
