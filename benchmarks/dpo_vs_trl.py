"""A DPO step of this project against TRL's `DPOTrainer`: same model, pairs, dtype, batch, optimizer, live reference.

    python benchmarks/dpo_vs_trl.py

Both sides train a Qwen3-shaped model (8 layers, width 256; one case 4 layers, width 512) in float32 on the same 8
pairs per step in the same order, recompute the reference in every step and take a clipped AdamW step, without gradient
checkpointing.  TRL takes text only, so a word-level tokenizer makes its token counts exact.  Each side has a process of
its own, so that neither changes the other's surroundings; their blocks of steps alternate, and every step's losses
must agree.  Tokens of training are those of the separate sequences, prompt and response, on both sides.

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

from benchmarks.dpo_ours import BETA, CLIP, LEARNING_RATE, PAIRS, PairOfWords, make_pairs, run_ours, step_tokens
from benchmarks.models import Shape, text
from benchmarks.sides import Case, Duel, main

CASES = {
    "256+64": Case(Shape(), 256, 64, asked=2.5),
    "128+128": Case(Shape(), 128, 128, asked=1.7),
    "64+256": Case(Shape(), 64, 256, asked=1.3),
    "256+64 width 512": Case(Shape(layers=4, width=512), 256, 64),
}


def run_trl(model_dir: Path, pairs: list[PairOfWords], steps: int, after_step: Callable[[int], None]) -> list[float]:
    """TRL's trainer over the pairs in order; `after_step` is called between its steps.  Returns its losses."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": text(p), "chosen": " " + text(c[:-1]), "rejected": " " + text(r[:-1])} for p, c, r in pairs]
    losses: list[torch.Tensor] = []

    class Between(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            after_step(state.global_step)

    class Plain(DPOTrainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.detach())
            return loss

    with tempfile.TemporaryDirectory() as scratch:
        trainer = Plain(
            model=AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32),
            args=DPOConfig(
                output_dir=scratch, per_device_train_batch_size=PAIRS, max_steps=steps, learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=CLIP, weight_decay=0.0, beta=BETA,
                gradient_checkpointing=False, bf16=False, max_length=None, report_to="none", save_strategy="no",
                logging_strategy="no", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(model_dir),
            callbacks=[Between()],
        )  # fmt: skip
        _check_tokens(trainer, pairs)
        after_step(0)
        trainer.train()
    return [loss.item() for loss in losses]


def _check_tokens(trainer: Any, pairs: list[PairOfWords]) -> None:
    """TRL must see exactly the tokens that this project sees."""
    for row, (prompt, chosen, rejected) in zip(trainer.train_dataset, pairs, strict=True):
        found = (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])
        assert found == (prompt, chosen, rejected), "TRL tokenised the pairs differently"


def load() -> None:
    """Both sides import everything before memory is counted: TRL uses DeepSpeed where it is installed."""
    import deepspeed  # noqa: F401
    import trl.trainer.dpo_trainer  # noqa: F401

    import align.training.preference  # noqa: F401


DUEL = Duel("dpo_vs_trl", __file__, "TRL", CASES, make_pairs, step_tokens, run_ours, run_trl, load)

if __name__ == "__main__":
    main(DUEL, __doc__)
