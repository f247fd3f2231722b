"""A DPO step of this project against OpenRLHF's `DPOTrainer`: same model, pairs, dtype, batch, live reference.

    python benchmarks/dpo_vs_openrlhf.py

OpenRLHF is made for GPUs; `openrlhf_cpu.py` says what stands in for its GPU packages here, and how it is installed.
Without it the benchmark says so and measures nothing.  Both sides train a Qwen3-shaped model (8 layers, width 256) in
float32 on the same 8 pairs per step in the same order, under DeepSpeed stage 0 with a clipped AdamW step, without
gradient checkpointing.  Each side has a process of its own, their blocks alternate, and every step's losses must agree.

Cases are named `prompt tokens + response tokens`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from benchmarks import openrlhf_cpu
from benchmarks.dpo_ours import BETA, CLIP, LEARNING_RATE, PAIRS, PairOfWords, make_pairs, run_ours, step_tokens
from benchmarks.models import Shape
from benchmarks.sides import Case, Duel, main

CASES = {
    "256+64": Case(Shape(), 256, 64, asked=1.5),
    "128+128": Case(Shape(), 128, 128),
    "64+256": Case(Shape(), 64, 256),
}


def run_openrlhf(
    model_dir: Path, pairs: list[PairOfWords], steps: int, after_step: Callable[[int], None]
) -> list[float]:
    """OpenRLHF's trainer over the pairs in order, in the form in which its collate function gives them."""

    def column(ids: list[list[int]]) -> torch.Tensor:
        return torch.tensor(ids)[:, None]

    batches = []
    for start in range(0, steps * PAIRS, PAIRS):
        taken = pairs[start : start + PAIRS]
        chosen, rejected = column([p + c for p, c, _ in taken]), column([p + r for p, _, r in taken])
        prompts = [len(p) for p, _, _ in taken]
        batches.append((chosen, torch.ones_like(chosen), rejected, torch.ones_like(rejected), prompts))
    settings = {"beta": BETA, "learning_rate": LEARNING_RATE, "clip": CLIP, "pairs": PAIRS}
    return openrlhf_cpu.train(model_dir, batches, after_step, settings)


def load() -> None:
    """Both sides import everything before memory is counted."""
    import align.training.preference  # noqa: F401

    if "ours" not in sys.argv:
        openrlhf_cpu.load()


DUEL = Duel(
    "dpo_vs_openrlhf", __file__, "OpenRLHF", CASES, make_pairs, step_tokens, run_ours, run_openrlhf, load,
    absent=openrlhf_cpu.absent,
)  # fmt: skip

if __name__ == "__main__":
    main(DUEL, __doc__)
