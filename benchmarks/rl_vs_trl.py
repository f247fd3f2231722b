"""A GRPO step of this project against TRL's `GRPOTrainer` on given completions: 8 responses per prompt.

    python benchmarks/rl_vs_trl.py

Nothing is generated on either side: the completions and their rewards are given.  Both sides then do the same: the
log-probabilities of the policy before the round and of the reference, once, and two clipped AdamW steps on these
16 responses (KL in the loss, k3 shown, its gradient corrected).  Float32, no gradient checkpointing; each side in a
process of its own, blocks alternating, every step's losses must agree.  Tokens of training are those of the separate
sequences, prompt and response, on both sides.

Cases are named `prompt tokens + response tokens`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from benchmarks.models import Author, Shape, Words, text
from benchmarks.sides import Case, Duel, main

PROMPTS, RESPONSES = 2, 8  # per step
EPOCHS = 2  # steps on the same responses
BETA, LEARNING_RATE, CLIP = 0.04, 1e-4, 1.0
CASES = {
    "256+64": Case(Shape(), 256, 64, asked=2.5),
    "128+128": Case(Shape(), 128, 128, asked=1.7),
    "64+256": Case(Shape(), 64, 256, asked=1.3),
}

Rollout = list[tuple[Words, list[Words], list[float]]]  # of a round: prompt, its responses, their rewards


def make_rollouts(case: Case, steps: int) -> list[Rollout]:
    """Random words of exact length, random rewards."""
    author = Author()

    def group() -> tuple[Words, list[Words], list[float]]:
        responses = [author.response(case.response_tokens) for _ in range(RESPONSES)]
        return author.words(case.prompt_tokens), responses, [author.reward() for _ in responses]

    return [[group() for _ in range(PROMPTS)] for _ in range(-(-steps // EPOCHS))]


def step_tokens(case: Case) -> int:
    """Of the sequences that a step stands for, each with its prompt."""
    return PROMPTS * RESPONSES * (case.prompt_tokens + case.response_tokens)


def run_ours(model_dir: Path, rollouts: list[Rollout], steps: int, after_step: Callable[[int], None]) -> list[float]:
    """This project over the rollouts in order, through the `train_round` that a run calls."""
    from align.distributed import Ranks
    from align.recipe import Recipe
    from align.records import Sample, Score
    from align.training.engine import PolicyEngine
    from align.training.trainers import RoundData, train_round

    training = {
        "algorithm": "grpo", "learning_rate": LEARNING_RATE, "responses_per_step": PROMPTS * RESPONSES,
        "tokens_per_batch": 8192, "max_grad_norm": CLIP, "epochs": EPOCHS, "reward": {"source": "reward"},
        "rl": {"kl": {"place": "loss", "beta": BETA}},
    }  # fmt: skip
    recipe = Recipe.model_validate(
        {
            "name": "benchmark",
            "policy": {"model": str(model_dir), "dtype": "float32"},
            "verifiers": [{"kind": "repetition", "name": "unused"}],
            "sampling": {"samples_per_prompt": RESPONSES, "temperature": 1.0},
            "training": training,
        }
    )
    engine = PolicyEngine(model_dir, recipe, Ranks(), total_steps=steps)
    losses: list[float] = []

    def on_step(row: dict[str, Any]) -> None:
        losses.append(row["loss"])
        after_step(len(losses))

    after_step(0)
    for number, rollout in enumerate(rollouts):
        samples, scores = {}, []
        for p, (prompt, responses, rewards) in enumerate(rollout):
            for r, (ids, reward) in enumerate(zip(responses, rewards, strict=True)):
                name, prompt_id = f"{number}-{p}-{r}", f"{number}-{p}"
                samples[name] = Sample(
                    id=name, prompt_id=prompt_id, index=r, policy_version=number, seed=0, prompt_ids=tuple(prompt),
                    response_ids=tuple(ids), logprobs=(), text="", finish_reason="stop", temperature=1.0, top_p=1.0,
                    top_k=0, max_new_tokens=len(ids),
                )  # fmt: skip
                scores.append(Score(name, prompt_id, p_good=reward, reward=reward, spread=0.0, voters=1))
        train_round(engine, RoundData(number, samples, scores=scores), recipe, on_step)
    return losses


def run_trl(model_dir: Path, rollouts: list[Rollout], steps: int, after_step: Callable[[int], None]) -> list[float]:
    """TRL's trainer with its generation replaced by the given completions; all else is its own."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    losses: list[torch.Tensor] = []
    waiting = iter(rollouts)
    now: Rollout = []

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [value for _, _, rewards in now for value in rewards]

    class Between(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            after_step(state.global_step)

    class Given(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids: list[Words], *args: Any, **kwargs: Any) -> Any:
            nonlocal now
            now = next(waiting)
            expected = [prompt for prompt, responses, _ in now for _ in responses]
            assert [list(ids) for ids in prompt_ids] == expected, "TRL tokenised the prompts differently"
            return [list(ids) for _, responses, _ in now for ids in responses], None

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.detach())
            return loss

    with tempfile.TemporaryDirectory() as scratch:
        trainer = Given(
            model=AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32),
            reward_funcs=reward,
            args=GRPOConfig(
                output_dir=scratch, per_device_train_batch_size=PROMPTS * RESPONSES, num_generations=RESPONSES,
                num_iterations=EPOCHS, steps_per_generation=1, max_steps=steps, learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=CLIP, weight_decay=0.0, beta=BETA,
                loss_type="bnpo", epsilon=0.2, temperature=1.0, shuffle_dataset=False, gradient_checkpointing=False,
                bf16=False, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=Dataset.from_list([{"prompt": text(p)} for rollout in rollouts for p, _, _ in rollout]),
            processing_class=AutoTokenizer.from_pretrained(model_dir, padding_side="left"),
            callbacks=[Between()],
        )  # fmt: skip
        after_step(0)
        trainer.train()
    return [loss.item() for loss in losses]


def load() -> None:
    """Both sides import everything before memory is counted: TRL uses DeepSpeed where it is installed."""
    import deepspeed  # noqa: F401
    import trl.trainer.grpo_trainer  # noqa: F401

    import align.training.policy_gradient  # noqa: F401


DUEL = Duel(
    "rl_vs_trl", __file__, "TRL", CASES, make_rollouts, step_tokens, run_ours, run_trl, load, block_multiple=EPOCHS
)

if __name__ == "__main__":
    main(DUEL, __doc__)
