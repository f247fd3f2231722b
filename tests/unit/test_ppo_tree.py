"""PPO on the tree with a known best policy: the project's code reaches it, and every classic mistake misses it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from align.distributed import Ranks
from align.recipe import Recipe
from align.records import Sample, Score
from align.training.engine import TokenStats
from align.training.logps import TokenLogProbs
from align.training.packing import PackedBatch
from align.training.policy_gradient import train_round
from align.training.trainers import RoundData
from benchmarks.ppo_tree import (
    BETA,
    CUT_SCORE,
    END,
    GAP,
    LONGEST,
    VARIATION,
    WRONG,
    Tree,
    estimates,
    judge,
    make_tree,
    optimum,
    rollouts_of,
    step_loss,
    train,
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tables of 85 rows: more threads only wait for each other


def test_the_tree_has_341_responses_and_its_optimum_adds_up() -> None:
    """π* is a distribution, reaches J*, and every other policy tried reaches less."""
    tree = make_tree()
    best, target = optimum(tree)
    assert len(tree.scores) == 341 and np.exp(tree.logprobs(tree.reference)).sum() == pytest.approx(1.0)
    assert target.sum() == pytest.approx(1.0)
    reached = (target * (tree.scores - 0.5 * (np.log(target) - tree.logprobs(tree.reference)))).sum()
    assert reached == pytest.approx(best)
    gap, variation = judge(tree, tree.reference)
    assert gap > 0.3 and variation > 0.3


def test_ppo_reaches_the_optimum() -> None:
    tree = make_tree()
    gap, variation = judge(tree, train(tree, "correct", seed=0))
    assert 0 <= gap < GAP and variation < VARIATION


@pytest.mark.parametrize("variant", WRONG)
def test_a_wrong_variant_misses_it(variant: str) -> None:
    """Half the iterations are enough to be far off."""
    tree = make_tree()
    gap, variation = judge(tree, train(tree, variant, seed=0, iterations=200))
    assert gap > GAP or variation > 2 * VARIATION


# ---- the benchmark's steps are the trainer's ------------------------------------------------------------------------

RATE, EPOCHS, DRAWN = 10.0, 3, 96  # plain gradient steps, far enough for ratios and values to be clipped


class Table:
    """What `train_round` asks of an engine, around a table: logits [85, 5] of a policy or values [85] of a critic."""

    def __init__(self, tree: Tree, table: np.ndarray, recipe: Recipe) -> None:
        self.table = torch.tensor(table, dtype=torch.float64, requires_grad=True)
        self.reference = torch.from_numpy(tree.reference)
        self.numbers = {
            tuple(tokens[:t]): int(states[t])
            for states, tokens, length in zip(tree.states, tree.tokens.tolist(), tree.lengths, strict=True)
            for t in range(length)
        }
        self.recipe, self.ranks, self.device, self.token_multiple = recipe, Ranks(), torch.device("cpu"), 1
        self.step, self.learning_rate = 0, RATE
        self.trainer_state: dict[str, Any] = {}
        self.critic: Table | None = None

    def read(self, table: Tensor, responses: Sequence[Sequence[int]]) -> Tensor:
        """[N] the entry of each token."""
        states = [self.numbers[tuple(response[:t])] for response in responses for t in range(len(response))]
        if table.ndim == 1:
            return table[states]
        return torch.log_softmax(table, -1)[states, [token for response in responses for token in response]]

    def look(self, table: Tensor, sequences: Sequence[Any]) -> list[np.ndarray]:
        return [self.read(table.detach(), [response]).numpy() for _, response in sequences]

    def values(self, sequences: Sequence[Any]) -> list[np.ndarray]:
        return self.look(self.table, sequences)

    def token_logprobs(self, sequences: Sequence[Any], reference: bool = False, **_: Any) -> TokenStats:
        found = self.look(self.reference if reference else self.table, sequences)
        return TokenStats(found, [np.zeros(len(each)) for each in found])

    def forward(self, batch: PackedBatch, **_: Any) -> TokenLogProbs:
        responses = [part.tolist() for part in batch.targets.split(batch.lengths.tolist())]
        return TokenLogProbs(self.read(self.table, responses))

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def gradient_square_sum(self) -> Tensor:
        assert self.table.grad is not None
        return self.table.grad.square().sum()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return values

    max_over_ranks = sum_over_ranks

    def apply(self) -> bool:
        descend(self.table)
        return True


def descend(table: Tensor) -> None:
    """One plain gradient step."""
    assert table.grad is not None
    with torch.no_grad():
        table -= RATE * table.grad
    table.grad = None


def round_of(tree: Tree, drawn: np.ndarray) -> RoundData:
    """The drawn responses behind one prompt, scored; those without an end were cut."""
    samples, scores = {}, []
    for index, number in enumerate(drawn):
        response = tuple(tree.tokens[number, : tree.lengths[number]].tolist())
        samples[str(index)] = Sample(
            id=str(index), prompt_id="p", index=index, policy_version=0, seed=0, prompt_ids=(0,),
            response_ids=response, logprobs=(), text="", finish_reason="stop" if response[-1] == END else "length",
            temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=LONGEST,
        )  # fmt: skip
        scores.append(Score(str(index), "p", 0.5, float(tree.scores[number]), 0.0, 1))
    return RoundData(0, samples, scores=scores)


def test_the_benchmark_steps_as_the_trainer_does() -> None:
    """`train_round` on the two tables, three epochs of a round, against the benchmark's own loop over its losses."""
    tree, rng = make_tree(), np.random.default_rng(1)
    logits, values = tree.reference + 0.3 * rng.normal(size=tree.reference.shape), rng.normal(size=len(tree.reference))
    drawn = rng.integers(len(tree.scores), size=DRAWN)
    recipe = Recipe.model_validate(
        {
            "name": "tree",
            "policy": {"model": "m", "dtype": "float32"},
            "sampling": {"samples_per_prompt": DRAWN, "max_new_tokens": LONGEST},
            "verifiers": [{"kind": "repetition", "name": "filler"}],
            "training": {
                "algorithm": "ppo", "epochs": EPOCHS, "responses_per_step": DRAWN, "tokens_per_batch": 50,
                "rl": {"kl": {"beta": BETA}},
                "reward": {"source": "reward", "truncated": "penalty", "penalty": CUT_SCORE},
            },
        }
    )  # fmt: skip
    engine: Any = Table(tree, logits, recipe)
    engine.critic = Table(tree, values, recipe)
    rows: list[dict[str, Any]] = []
    train_round(engine, round_of(tree, drawn), recipe, rows.append)
    assert len(rows) == EPOCHS and rows[-1]["clip_fraction"] > 0.03 and rows[-1]["critic_clip_fraction"] > 0.05

    rl = recipe.training.rl
    policy, critic = (torch.tensor(start, dtype=torch.float64, requires_grad=True) for start in (logits, values))
    rollouts, where = rollouts_of(tree, torch.log_softmax(policy, -1).detach().numpy(), values, drawn)
    assert rollouts.values is not None
    columns = [torch.from_numpy(c) for c in (rollouts.old, *estimates(rollouts, rl, "correct"), rollouts.values)]
    old, pushes, returns, old_values = columns
    for _ in range(EPOCHS):
        step_loss(
            policy, critic, where, [old, pushes, old_values, returns], torch.from_numpy(rollouts.lengths), rl
        ).backward()
        descend(policy)
        descend(critic)
    for found, expected, start in ((engine.table, policy, logits), (engine.critic.table, critic, values)):
        path = (expected.detach() - torch.from_numpy(start)).norm()
        assert path > 0.1 and (found - expected).detach().norm() <= 1e-5 * path
