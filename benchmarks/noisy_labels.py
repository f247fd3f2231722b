"""What each loss makes of labels that are not equally sure: linear rewards, half the preferences nearly coins.

    python benchmarks/noisy_labels.py

A response is a vector of 60 normal numbers and its reward a fixed direction; the policy is log-linear, so its margin is
θ · (chosen - rejected).  Half the preferences are flipped with probability .05 and half with .45, and each pair's label
says which.  Losses without a soft label see the preference alone, or are told the mean rate of .25.  Every loss is
minimised by gradient steps of one optimizer; the figure is the share of 20,000 fresh pairs put the right way round.
The losses are the ones that training uses.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from align.training.losses import pairwise, whole_step
from align.training.losses.pairs import PairBatch
from benchmarks.common import Row, print_report

DIMENSIONS, STEPS, LEARNING_RATE = 60, 400, 0.05
NOISE = (0.05, 0.45)
MEAN_NOISE = sum(NOISE) / 2
Loss = Callable[[PairBatch], Tensor]


def hard(loss: Loss) -> Loss:
    """The loss on the preferences alone."""
    return lambda batch: loss(_labelled(batch, torch.ones_like(batch.label)))


def _labelled(batch: PairBatch, label: Tensor) -> PairBatch:
    one = torch.ones_like(label)
    policy, reference = (batch.policy_chosen, batch.policy_rejected), (batch.ref_chosen, batch.ref_rejected)
    return PairBatch(*policy, *reference, label, one, one, one)


def filtered(batch: PairBatch) -> Tensor:
    """DPO on the pairs that are nearly sure, as if they were."""
    return hard(lambda b: pairwise.dpo(b, beta=1.0))(batch) * (batch.label > 0.9)


def per_pair_rdpo(batch: PairBatch) -> Tensor:
    """What `rdpo` refuses: its formula with a noise of its own for every pair."""
    noise = 1.0 - batch.label
    flipped = _labelled(batch, torch.zeros_like(noise))
    clean, wrong = hard(lambda b: pairwise.dpo(b, beta=1.0))(batch), pairwise.dpo(flipped, beta=1.0)
    return ((1.0 - noise) * clean - noise * wrong) / (1.0 - 2.0 * noise)


LOSSES: dict[str, Loss] = {
    "dpo, hard labels": hard(lambda b: pairwise.dpo(b, beta=1.0)),
    "cdpo, ε .25": hard(lambda b: pairwise.cdpo(b, beta=1.0, label_smoothing=MEAN_NOISE)),
    "rdpo, ε .25": hard(lambda b: pairwise.rdpo(b, beta=1.0, label_smoothing=MEAN_NOISE)),
    "dr_dpo, hard labels": hard(lambda b: whole_step.dr_dpo(b, beta=1.0, dr_temperature=1.0)),
    "dpo, soft labels": lambda b: pairwise.dpo(b, beta=1.0),
    "weighted": lambda b: pairwise.weighted(b, beta=1.0),
    "gdpo": lambda b: pairwise.gdpo(b, beta=1.0),
    "dpo on the sure half": filtered,
    "rdpo with a noise per pair (refused)": per_pair_rdpo,
}


def accuracy(loss: Loss, count: int, seed: int) -> float:
    """Train θ on so many pairs; the share of fresh pairs that it puts the right way round."""
    draw = torch.Generator().manual_seed(seed)
    truth = torch.randn(DIMENSIONS, generator=draw, dtype=torch.float64)
    gaps = torch.randn(count, DIMENSIONS, generator=draw, dtype=torch.float64) * 2**0.5
    noise = torch.tensor(NOISE, dtype=torch.float64)[torch.arange(count) % 2]
    wins = (gaps @ truth > 0) ^ (torch.rand(count, generator=draw, dtype=torch.float64) < noise)
    gaps = torch.where(wins[:, None], gaps, -gaps)  # chosen minus rejected, as labelled
    theta = torch.zeros(DIMENSIONS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=LEARNING_RATE)
    nothing, one = torch.zeros(count, dtype=torch.float64), torch.ones(count, dtype=torch.float64)
    for _ in range(STEPS):
        optimizer.zero_grad()
        batch = PairBatch(gaps @ theta, nothing, nothing, nothing, 1.0 - noise, one, one, one)
        loss(batch).mean().backward()
        optimizer.step()
    fresh = torch.randn(20_000, DIMENSIONS, generator=draw, dtype=torch.float64)
    return float((((fresh @ theta) > 0) == ((fresh @ truth) > 0)).double().mean())


def mean_accuracy(name: str, count: int, seeds: int) -> float:
    """Over the seeds."""
    return sum(accuracy(LOSSES[name], count, seed) for seed in range(seeds)) / seeds


def main() -> None:
    """Print the table, and the report of this project's benchmarks: each loss against plain DPO."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    rows: list[Row] = []
    print(f"{'loss':40} {'400 pairs':>10} {'4000 pairs':>10}   accuracy, mean of {seeds} seeds")
    found = {name: [mean_accuracy(name, count, seeds) for count in (400, 4000)] for name in LOSSES}
    plain = found["dpo, hard labels"]
    for name, values in found.items():
        print(f"{name:40} {values[0]:10.3f} {values[1]:10.3f}")
        for count, value, peer in zip((400, 4000), values, plain, strict=True):
            rows.append(Row(f"{name}, {count} pairs", value, peer, value / peer, "accuracy"))
    print_report("noisy_labels", rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
