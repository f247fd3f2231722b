"""The contextual bandit of "Preference fine-tuning should leverage suboptimal, on-policy data" (arXiv 2404.14367).

    python benchmarks/bandit.py [--seeds 3]

A context is 100 uniform numbers, and there are 100 actions.  The data policy is a histogram whose mode lies near action
20; reward r4 has its peak at action 70, where the data is thin, and r5 at action 20, where it is thick.  A network
starts at the data policy, and the losses of `align.training.losses` train it, offline on samples of the data policy or
on its own.  What is to be seen: a loss that pushes bad actions down finds the far peak where imitation of the best does
not, samples of the policy itself find it in any case, and reusing a batch for too many steps goes stale.

Prints the mean reward under the policy at epoch 10 (`early`) and at the end, the least over the seeds, and, as its last
line, one JSON object.  There is no peer: the paper shows curves.

Legend: S states, N actions sampled in a state, A actions, P ordered pairs of a state.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from align.training.losses.negative import TokenBatch, w_reinforce
from align.training.losses.one_sided import sft
from align.training.losses.pairs import PairBatch
from align.training.losses.pairwise import dpo, ipo

ACTIONS, WIDTH, SAMPLES = 100, 100, 10
PEAKS = {"r4": 70.0, "r5": 20.0}
EVALUATED = 100  # states


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Example: Setting("offline IPO", "ipo", rate=0.003, states=100, epochs=1, inner=200, gap=0.2)
    """

    name: str
    loss: str
    rate: float
    states: int = 10
    epochs: int = 100
    inner: int = 15  # optimizer steps on one batch of samples
    gap: float = 0.0  # least reward difference of a pair
    beta: float = 0.05  # ipo: a margin of 1 / (2 beta) = 10
    early: int = 10  # the epoch that is looked at beside the last


OFFLINE: tuple[Setting, ...] = (
    Setting("offline best-of-N, 5 states", "best", 0.01, states=5, epochs=1, inner=200),
    Setting("offline best-of-N, 100 states", "best", 0.01, states=100, epochs=1, inner=200),
    Setting("offline IPO", "ipo", 0.003, states=100, epochs=1, inner=200, gap=0.2),
    Setting("offline DPO", "dpo", 0.003, states=100, epochs=1, inner=200),
)
ONLINE: tuple[Setting, ...] = (
    Setting("on-policy best-of-N", "best", 0.001),
    Setting("on-policy IPO", "ipo", 0.01),
    Setting("REINFORCE", "reinforce", 0.001, inner=1),
)
REUSED = Setting("reuse", "best", 3e-3)
REUSES = (1, 5, 15, 50, 150, 300)  # steps per batch, of 300 in all


class Policy(nn.Module):
    """Contexts [S, WIDTH] to log-probabilities [S, A]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(WIDTH, 50), nn.LayerNorm(50), nn.ReLU(), nn.Linear(50, 256), nn.ReLU(), nn.Linear(256, 256),
            nn.ReLU(), nn.Linear(256, ACTIONS),
        )  # fmt: skip
        for layer in self.body:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight, gain=0.01)
                nn.init.zeros_(layer.bias)

    def forward(self, states: Tensor) -> Tensor:
        return self.body(states).log_softmax(-1)


def reward_of(name: str) -> Tensor:
    """[A] exp(-((a - peak) / 10)²)."""
    return torch.exp(-(((torch.arange(ACTIONS) - PEAKS[name]) / 10.0) ** 2))


def data_policy() -> Tensor:
    """[A] the histogram of 10,000 draws of tanh(Cauchy(-0.7, 0.4)) in 100 bins on [-1, 1]; no bin is quite empty."""
    draws = torch.tanh(torch.distributions.Cauchy(-0.7, 0.4).sample((10_000,)))
    counts = torch.histc(draws, ACTIONS, -1.0, 1.0) + 1e-3
    return counts / counts.sum()


class World:
    """A seed's data policy, states to train on, and the network that was warmed up to the data policy on these."""

    def __init__(self, seed: int, states: int = 100) -> None:
        torch.manual_seed(seed)
        self.reference = data_policy()
        self.states, self.evaluated = torch.rand(100, WIDTH)[:states], torch.rand(EVALUATED, WIDTH)
        self.start = Policy()
        optimizer = torch.optim.Adam(self.start.parameters(), lr=0.01)
        for _ in range(100):
            policy = self.start(self.states)
            loss = (policy.exp() * (policy - self.reference.log())).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def train(setting: Setting, reward_name: str, seed: int) -> tuple[float, float]:
    """Mean reward under the policy on the evaluation states at the early epoch and at the end."""
    world, reward = World(seed, setting.states), reward_of(reward_name)
    policy, states = copy.deepcopy(world.start), world.states
    optimizer = torch.optim.Adam(policy.parameters(), lr=setting.rate)
    running: list[Tensor] = []
    early = 0.0
    for epoch in range(setting.epochs):
        with torch.no_grad():
            chances = policy(states).exp() if epoch else world.reference.expand(len(states), -1)
            actions = torch.multinomial(chances, SAMPLES, replacement=True)  # [S, N]
            old = policy(states).gather(1, actions)
        batch = LOSSES[setting.loss](setting, world.reference.log(), actions, reward[actions], old, running)
        for _ in range(setting.inner):
            loss = batch(policy(states))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch + 1 == setting.early or epoch + 1 == setting.epochs:
            value = mean_reward(policy, world, reward)
            early = value if epoch + 1 <= setting.early else early
    return early, value


def mean_reward(policy: Policy, world: World, reward: Tensor) -> float:
    with torch.no_grad():
        return (policy(world.evaluated).exp() @ reward).mean().item()


# ---- the losses, through the records that the trainers use -------------------------------------------------------

Batch = Callable[[Tensor], Tensor]  # log-probabilities [S, A] to a loss


def best_of_n(setting: Setting, reference: Tensor, actions: Tensor, rewards: Tensor, *_: object) -> Batch:
    """-log π of each state's best action."""
    best = actions.gather(1, rewards.argmax(1, keepdim=True))
    return lambda logprobs: sft(pairs_of(logprobs.gather(1, best)[:, 0], None, reference, best[:, 0], None)).mean()


def preference(setting: Setting, reference: Tensor, actions: Tensor, rewards: Tensor, *_: object) -> Batch:
    """DPO or IPO over all ordered pairs of a state whose rewards differ by more than the gap."""
    loss = {"dpo": dpo, "ipo": ipo}[setting.loss]
    state, better, worse = torch.nonzero(rewards[:, :, None] - rewards[:, None, :] > setting.gap, as_tuple=True)
    chosen, rejected = actions[state, better], actions[state, worse]

    def of(logprobs: Tensor) -> Tensor:
        records = pairs_of(logprobs[state, chosen], logprobs[state, rejected], reference, chosen, rejected)
        return loss(records, beta=setting.beta).mean()

    return of


def reinforce(
    setting: Setting, reference: Tensor, actions: Tensor, rewards: Tensor, old: Tensor, running: list[Tensor]
) -> Batch:
    """REINFORCE on rewards that are standardised by all seen so far, as W-REINFORCE with λ = 1: R = sign, weighted."""
    running.append(rewards)
    seen = torch.cat([r.flatten() for r in running])
    scaled = ((rewards - seen.mean()) / (seen.std() + 1e-8)).flatten()

    def of(logprobs: Tensor) -> Tensor:
        records = TokenBatch(logprobs.gather(1, actions).flatten(), old.flatten(), scaled.sign())
        return (scaled.abs() * w_reinforce(records, form="ratio", clip=1e9, positive_weight=1.0)).mean()

    return of


def pairs_of(chosen: Tensor, rejected: Tensor | None, reference: Tensor, up: Tensor, down: Tensor | None) -> PairBatch:
    """Records of responses of one token."""
    ones, zeros = torch.ones_like(chosen), torch.zeros_like(chosen)
    return PairBatch(
        policy_chosen=chosen,
        policy_rejected=zeros if rejected is None else rejected,
        ref_chosen=reference[up],
        ref_rejected=zeros if down is None else reference[down],
        label=ones,
        weight=ones,
        chosen_length=ones,
        rejected_length=ones,
    )


LOSSES: dict[str, Callable[..., Batch]] = {
    "best": best_of_n,
    "ipo": preference,
    "dpo": preference,
    "reinforce": reinforce,
}


# ---- the table --------------------------------------------------------------------------------------------------


def over_seeds(setting: Setting, reward: str, seeds: Sequence[int]) -> dict[str, float]:
    """Means over the seeds, and the least at the end."""
    found = [train(setting, reward, seed) for seed in seeds]
    return {
        "early": sum(e for e, _ in found) / len(found),
        "end": sum(e for _, e in found) / len(found),
        "least": min(e for _, e in found),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(1, parser.parse_args().seeds + 1)
    rows = []
    cases = [(s, r) for s in (*OFFLINE, *ONLINE) for r in PEAKS]
    cases += [(replace(REUSED, name=f"reuse T={t}", inner=t, epochs=300 // t), "r4") for t in REUSES]
    for setting, reward in cases:
        found, case = over_seeds(setting, reward, seeds), f"{setting.name}, {reward}"
        rows.append({"case": case, "ours": found["end"], "peer": None, "ratio": None, "unit": "mean reward", **found})
        told = "  ".join(f"{name} {value:.3f}" for name, value in found.items())
        print(f"{case:36} {told}")
    print(json.dumps({"benchmark": "bandit", "machine": platform.processor() or platform.machine(), "rows": rows}))


if __name__ == "__main__":
    main()
