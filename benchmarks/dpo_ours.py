"""This project's side of the DPO measurements, and the pairs that both sides learn from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.models import Author, Words
from benchmarks.sides import Case

PAIRS = 8  # per step
BETA, LEARNING_RATE, CLIP = 0.1, 1e-4, 1.0

PairOfWords = tuple[Words, Words, Words]  # prompt, chosen, rejected; responses end with EOS


def make_pairs(case: Case, steps: int) -> list[PairOfWords]:
    """Random words of exact length."""
    author, size = Author(), case.response_tokens
    return [
        (author.words(case.prompt_tokens), author.response(size), author.response(size)) for _ in range(steps * PAIRS)
    ]


def step_tokens(case: Case) -> int:
    """Of the chosen and rejected sequences that a step stands for, each with its prompt."""
    return 2 * PAIRS * (case.prompt_tokens + case.response_tokens)


def run_ours(model_dir: Path, pairs: list[PairOfWords], steps: int, after_step: Callable[[int], None]) -> list[float]:
    """This project over the pairs in order, through the `train_round` that a run calls.

    A round here is one step, so its reference log-probabilities are computed live.
    """
    from align.distributed import Ranks
    from align.recipe import Recipe
    from align.records import Pair, Sample
    from align.training.engine import PolicyEngine
    from align.training.trainers import RoundData, train_round

    training = {
        "learning_rate": LEARNING_RATE, "pairs_per_step": PAIRS, "tokens_per_batch": 8192, "max_grad_norm": CLIP,
        "loss": {"beta": BETA},
    }  # fmt: skip
    policy = {"model": str(model_dir), "dtype": "float32"}
    verifiers = [{"kind": "repetition", "name": "unused"}]
    recipe = Recipe.model_validate(
        {"name": "benchmark", "policy": policy, "verifiers": verifiers, "training": training}
    )
    samples: dict[str, Sample] = {}
    for i, (prompt, *responses) in enumerate(pairs):
        for side, ids in zip(("c", "r"), responses, strict=True):
            samples[f"{i}{side}"] = Sample(
                id=f"{i}{side}", prompt_id=f"p{i}", index=0, policy_version=0, seed=0, prompt_ids=tuple(prompt),
                response_ids=tuple(ids), logprobs=(), text="", finish_reason="stop", temperature=1.0, top_p=1.0,
                top_k=0, max_new_tokens=len(ids),
            )  # fmt: skip
    records = [Pair(f"{i}", f"p{i}", f"{i}c", f"{i}r", 1.0, 0.0, 1.0, 1.0, "benchmark") for i in range(len(pairs))]
    engine = PolicyEngine(model_dir, recipe, Ranks(), total_steps=steps)
    losses: list[float] = []
    after_step(0)
    for done in range(steps):
        batch = records[done * PAIRS : (done + 1) * PAIRS]
        train_round(engine, RoundData(done, samples, pairs=batch), recipe, lambda row: losses.append(row["loss"]))
        after_step(done + 1)
    return losses
