"""PPO on the tree with a known best policy: the project's code reaches it, and every classic mistake misses it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.ppo_tree import GAP, VARIATION, WRONG, judge, make_tree, optimum, train


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
