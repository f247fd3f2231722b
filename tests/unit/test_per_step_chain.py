"""How well the per-step builder finds the step that matters, and what training on its pairs spends elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.unit.chain_task import RIGHT, Chain
from tests.unit.chain_training import continuation_pairs, learn, step_pairs, whole_pairs

COUNT = 400
SEEDS = range(4)


def expected_rate(best_of: int, rollouts: int) -> float:
    """P(no value before the pit is 0 by chance): each prefix is worth s = 1 - (1 - p)^best_of a rollout, p = .055 while
    both steps are to come and .2345 while one is, and seen as 0 with probability (1 - s)^rollouts."""
    both, one = (1.0 - ((1.0 - p) ** best_of) ** rollouts for p in (RIGHT**2, RIGHT))
    lost_first = (1.0 - RIGHT) / (1.0 - RIGHT**2)
    return lost_first * both**2 + (1.0 - lost_first) * both**2 * one**3


@pytest.mark.parametrize(
    ("best_of", "rollouts", "published"), [(1, 5, 0.04), (1, 20, 0.45), (5, 5, 0.63), (5, 10, 0.88), (5, 20, 0.998)]
)
def test_the_first_pit_is_found_as_often_as_it_should_be(best_of: int, rollouts: int, published: float) -> None:
    expected = expected_rate(best_of, rollouts)
    error = (expected * (1.0 - expected) / COUNT) ** 0.5
    assert Chain(0, best_of, rollouts).hit_rate(COUNT) == pytest.approx(expected, abs=4 * error)
    assert expected == pytest.approx(published, abs=0.06)  # published from a sample of unknown size


def test_pruning_changes_no_pit_that_was_found() -> None:
    """The first value of 0 is the first pit, whatever comes behind it."""
    assert Chain(1, 5, 20, prune=True).hit_rate(150) == pytest.approx(
        Chain(1, 5, 20, prune=False).hit_rate(150), abs=0.03
    )


def mean(pairs: Callable, count: int) -> tuple[float, float]:
    """(success, nats on the steps that do not matter), over the seeds."""
    return tuple(np.mean([learn(*pairs(seed, count)) for seed in SEEDS], axis=0).tolist())


@pytest.mark.parametrize("count", [16])
def test_whole_responses_spend_more_than_twice_as_much_where_nothing_is_to_be_gained(count: int) -> None:
    (plain, plain_nats), (shared, shared_nats), (step, step_nats) = (
        mean(pairs, count) for pairs in (whole_pairs, continuation_pairs, step_pairs)
    )
    assert plain > 0.98 and shared > 0.98 and step > 0.8
    assert 7.0 < plain_nats < 10.0
    assert plain_nats / shared_nats > 2.0 and plain_nats / step_nats > 2.0


@pytest.mark.parametrize("count", [4])
def test_with_a_handful_of_pairs_single_steps_teach_less(count: int) -> None:
    """Each pair of steps speaks of one step only, and the second of the two that matter is seldom the pit."""
    assert mean(step_pairs, count)[0] < mean(whole_pairs, count)[0] - 0.15
