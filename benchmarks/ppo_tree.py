"""PPO on a tree of 341 responses whose best policy is known, through this project's own advantages, KL and losses.

    python benchmarks/ppo_tree.py            # every variant, three seeds

Vocabulary of 5 with an end of sequence, at most 4 tokens: 85 responses that end and 256 that are cut, which get -1 for
it.  A random reference and random scores; a table of logits as policy and one of values as critic.  With the KL in the
reward the best policy is π* ∝ π_ref exp(R / β), and what it reaches is J* = β log Σ π_ref exp(R / β).

The project's are `estimate` (KL in the reward, GAE, whitening), the clipped losses of policy and critic and the weights
of their tokens: those that `align.training.policy_gradient.train_round` uses.  The benchmark's own are the tree, the
sampling, one Adam over both tables in float64 with a learning rate that falls to 0, whole batches as steps, and
`step_loss`, which puts the losses together and lets policy and critic step at once.  Left out is what lies around the
mathematics: networks, packing, ranks, DeepSpeed.  `tests/unit/test_ppo_tree.py` runs `train_round` on the same two
tables and compares the steps.

A right implementation comes within .01 of J* and within .02 of π* in total variation; each of the classic mistakes
misses one of the two by far.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from align.recipe_rl import PolicyGradient
from align.training import advantages as adv
from align.training import kl
from align.training.losses import policy_gradient as losses
from align.training.rollouts import Rollouts, estimate

WORDS, END, LONGEST = 4, 4, 4  # tokens 0 … 3 and the end of sequence
BETA, CUT_SCORE = 0.5, -1.0
GAP, VARIATION = 0.01, 0.02

WRONG = ("reward_whitened_with_shift", "kl_clamped", "k2_in_reward", "k3_in_reward", "score_one_early")
RIGHT = ("correct", "lambda_1", "no_whitening", "one_epoch")


@dataclass(frozen=True)
class Tree:
    """Every response, with the states and tokens it goes through."""

    states: np.ndarray  # [341, 4] number of the prefix in front of each token
    tokens: np.ndarray  # [341, 4]
    lengths: np.ndarray  # [341]
    reference: np.ndarray  # [85, 5] log π_ref
    scores: np.ndarray  # [341] with CUT_SCORE where there is no end

    def logprobs(self, table: np.ndarray) -> np.ndarray:
        """[341] log-probability of every response under a table of log-probabilities [85, 5]."""
        steps = table[self.states, self.tokens] * (np.arange(LONGEST) < self.lengths[:, None])
        return steps.sum(axis=1)


def make_tree(seed: int = 0) -> Tree:
    """A random reference and random scores."""
    rng = np.random.default_rng(seed)
    prefixes = [p for n in range(LONGEST) for p in itertools.product(range(WORDS), repeat=n)]
    number = {p: i for i, p in enumerate(prefixes)}
    responses = [(*p, END) for p in prefixes] + list(itertools.product(range(WORDS), repeat=LONGEST))
    states, tokens = np.zeros((2, len(responses), LONGEST), dtype=np.int64)
    for i, response in enumerate(responses):
        for t, token in enumerate(response):
            states[i, t], tokens[i, t] = number[response[:t]], token
    logits = rng.normal(size=(len(prefixes), WORDS + 1))
    reference = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    scores = rng.normal(scale=0.7, size=len(responses))
    scores[len(prefixes) :] = CUT_SCORE
    return Tree(states, tokens, np.array([len(r) for r in responses]), reference, scores)


def optimum(tree: Tree) -> tuple[float, np.ndarray]:
    """J* and π* [341]."""
    weights = tree.logprobs(tree.reference) + tree.scores / BETA
    top = weights.max()
    total = top + np.log(np.exp(weights - top).sum())
    return BETA * float(total), np.exp(weights - total)


def judge(tree: Tree, table: np.ndarray) -> tuple[float, float]:
    """(J* - J, total variation to π*) of a policy."""
    best, target = optimum(tree)
    logprobs = tree.logprobs(table)
    chances = np.exp(logprobs)
    reached = float((chances * (tree.scores - BETA * (logprobs - tree.logprobs(tree.reference)))).sum())
    return best - reached, 0.5 * float(np.abs(chances - target).sum())


def estimates(rollouts: Rollouts, rl: PolicyGradient, variant: str) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and returns [N]: the project's own, or with one mistake put in."""
    if variant not in WRONG:
        found = estimate(rollouts, rl, "ppo", BETA)
        assert found.returns is not None
        return found.advantages, found.returns
    assert rollouts.token_kl is not None and rollouts.values is not None and rollouts.reference is not None
    old, reference = torch.from_numpy(rollouts.old), torch.from_numpy(rollouts.reference)
    penalty = rollouts.token_kl
    if variant == "kl_clamped":
        penalty = penalty.clip(min=0.0)
    elif variant in ("k2_in_reward", "k3_in_reward"):
        penalty = kl.ESTIMATORS[variant[:2]](old, reference).numpy()
    rewards = adv.token_rewards(rollouts.scores, penalty, rollouts.lengths, BETA)
    if variant == "score_one_early":
        last = np.cumsum(rollouts.lengths) - 1
        rewards[last] -= rollouts.scores
        rewards[np.where(rollouts.lengths > 1, last - 1, last)] += rollouts.scores
    elif variant == "reward_whitened_with_shift":
        rewards = adv.whiten(rewards)
    found_advantages, returns = adv.gae(rewards, rollouts.values, rollouts.lengths, rl.gamma, rl.lam)
    return adv.whiten(found_advantages), returns


def train(tree: Tree, variant: str, seed: int, iterations: int = 400, batch: int = 256) -> np.ndarray:
    """PPO from the reference; the trained table of log-probabilities [85, 5]."""
    rng = np.random.default_rng(seed)
    rl = PolicyGradient(lam=1.0 if variant == "lambda_1" else 0.95, whiten=variant != "no_whitening")
    epochs = 1 if variant == "one_epoch" else 4
    logits = torch.tensor(tree.reference, dtype=torch.float64, requires_grad=True)
    values = torch.zeros(len(tree.reference), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [logits]}, {"params": [values]}], lr=0.03, eps=1e-5)
    for iteration in range(iterations):
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * (1.0 - iteration / iterations)
        table = torch.log_softmax(logits, -1).detach().numpy()
        chances = np.exp(tree.logprobs(table))
        drawn = rng.choice(len(chances), size=batch, p=chances / chances.sum())
        rollouts, where = rollouts_of(tree, table, values.detach().numpy(), drawn)
        pushes, returns = estimates(rollouts, rl, variant)
        columns = [torch.from_numpy(c) for c in (rollouts.old, pushes, rollouts.values, returns)]
        for _ in range(epochs):
            optimizer.zero_grad()
            step_loss(logits, values, where, columns, torch.from_numpy(rollouts.lengths), rl).backward()
            optimizer.step()
    return torch.log_softmax(logits, -1).detach().numpy()


def rollouts_of(
    tree: Tree, table: np.ndarray, values: np.ndarray, drawn: np.ndarray
) -> tuple[Rollouts, tuple[np.ndarray, np.ndarray]]:
    """The responses with these numbers as a round sees them, under a policy's log-probabilities [85, 5] and a critic's
    values [85]; and the state and token [N] of each position."""
    lengths = tree.lengths[drawn]
    real = np.arange(LONGEST) < lengths[:, None]
    states, tokens = tree.states[drawn][real], tree.tokens[drawn][real]
    rollouts = Rollouts(
        ids=[str(i) for i in drawn],
        groups=[""] * len(drawn),
        lengths=lengths,
        scores=tree.scores[drawn],
        old=table[states, tokens],
        reference=tree.reference[states, tokens],
        values=values[states].copy(),
    )
    return rollouts, (states, tokens)


def step_loss(
    logits: Tensor,
    values: Tensor,
    where: tuple[np.ndarray, np.ndarray],
    columns: list[Tensor],
    lengths: Tensor,
    rl: PolicyGradient,
) -> Tensor:
    """The clipped losses of policy and critic, both token means."""
    states, tokens = (torch.from_numpy(w) for w in where)
    old, pushes, old_values, returns = columns
    now = torch.log_softmax(logits, -1)[states, tokens]
    each = losses.clipped(losses.TokenBatch(now, old, pushes), rl.clip_low, rl.clip_high, rl.dual_clip)
    critic = losses.value_loss(values[states], old_values, returns, rl.critic.value_clip)
    weights = losses.token_weights(
        lengths,
        rl.aggregation,
        tokens=len(states),
        responses=len(lengths),
        fixed_length=LONGEST,
    )
    return (weights * (each + critic)).sum()


def measure(variant: str, seeds: int) -> dict[str, float | str]:
    """Means and worst over seeds."""
    tree, started = make_tree(), time.monotonic()
    found = [judge(tree, train(tree, variant, seed)) for seed in range(seeds)]
    gaps, variations = zip(*found, strict=True)
    return {
        "case": variant,
        "gap": float(np.mean(gaps)),
        "worst gap": max(gaps),
        "variation": float(np.mean(variations)),
        "worst variation": max(variations),
        "seconds": round((time.monotonic() - started) / seeds, 2),
    }


def main() -> None:
    """Prints one line per variant and the whole as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    tree = make_tree()
    best, _ = optimum(tree)
    gap, variation = judge(tree, tree.reference)
    print(
        f"{len(tree.scores)} responses, J* {best:.4f}, J of the reference {best - gap:.4f}, variation {variation:.3f}"
    )
    rows = []
    for variant in (*RIGHT, *WRONG):
        rows.append(measure(variant, seeds))
        passes = rows[-1]["worst gap"] < GAP and rows[-1]["worst variation"] < VARIATION
        print(f"{variant:28s} gap {rows[-1]['gap']:.4f}  variation {rows[-1]['variation']:.4f}  {passes}", flush=True)
    print(json.dumps({"benchmark": "ppo_tree", "rows": rows}))


if __name__ == "__main__":
    main()
