"""Advantages, KL estimates, clipping and aggregation against verl 0.9.1, to 1e-6.

`verl_0_9_1.json` holds what verl's functions printed for the inputs below, so nothing of verl need be installed; where
it is, the same functions are called once more on random inputs.
"""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.training import advantages as adv
from align.training import kl
from align.training.losses import policy_gradient as losses

VERL: dict[str, Any] = json.loads(Path(__file__).with_name("verl_0_9_1.json").read_text())["values"]
TOLERANCE = 1e-6  # verl divides masked means by count + 1e-8; the rest is the same arithmetic in float64

LENGTHS = np.array([3, 1, 4, 2])
GROUPS = ["a", "a", "b", "b"]
OLD = np.array([-0.5, -1.2, -0.3, -2.0, -0.7, -0.1, -1.5, -0.9, -0.4, -0.6])
NEW = np.array([-0.4, -1.6, -0.2, -1.1, -0.75, -0.35, -1.2, -0.9, -1.4, -0.55])
REFERENCE = np.array([-0.6, -1.0, -0.5, -1.8, -0.9, -0.2, -1.1, -1.3, -0.3, -0.8])
VALUES = np.array([0.2, 0.5, -0.1, 0.3, 0.0, 0.4, 0.1, -0.2, 0.6, 0.25])
NEW_VALUES = np.array([0.5, 0.45, -0.4, 0.1, 0.05, 0.7, 0.1, 0.3, 0.55, 0.1])
ADVANTAGES = np.array([1.2, -0.7, 0.4, -1.5, 0.9, -0.3, 2.1, 0.0, -1.1, 0.6])
SCORES = np.array([1.0, -0.5, 0.25, 0.75])
MODES = {
    "token-mean": "token_mean",
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-sum-norm": "sequence_sum_fixed",
}


def near(values: Any) -> Any:
    return pytest.approx(values, abs=TOLERANCE)


def rewards() -> np.ndarray:
    return adv.token_rewards(SCORES, OLD - REFERENCE, LENGTHS, 0.1)


def tensor(values: np.ndarray, gradient: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=gradient)


def test_gae_returns_and_whitening() -> None:
    found, returns = adv.gae(rewards(), VALUES, LENGTHS, 0.98, 0.9)
    assert returns.tolist() == near(VERL["returns"])
    assert adv.whiten(found).tolist() == near(VERL["gae_whitened"])


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_advantages_within_a_prompt(name: str) -> None:
    found = adv.leave_one_out(SCORES, GROUPS) if name == "rloo" else adv.group_relative(SCORES, GROUPS, name == "grpo")
    assert adv.over_tokens(found, LENGTHS).tolist() == near(VERL[name])


def test_reinforce_plus_plus_and_remax() -> None:
    whitened = adv.whiten(adv.rewards_to_go(rewards(), LENGTHS, 0.98))
    assert whitened.tolist() == near(VERL["reinforce_pp"])
    baseline = adv.over_tokens(np.array([0.3, 0.3, -0.2, -0.2]), LENGTHS)
    assert (adv.rewards_to_go(rewards(), LENGTHS, 1.0) - baseline).tolist() == near(VERL["remax"])


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_kl_estimates(name: str) -> None:
    assert kl.ESTIMATORS[name](tensor(NEW), tensor(REFERENCE)).tolist() == near(VERL[name])


def test_the_kl_loss_shows_k3_and_has_the_gradient_of_k2() -> None:
    now = tensor(NEW, gradient=True)
    shown = kl.penalty(now, tensor(REFERENCE), tensor(NEW), "k3")  # drawn by the policy itself: weight 1
    shown.sum().backward()
    assert shown.tolist() == near(VERL["k3"])
    assert now.grad is not None and now.grad.tolist() == near(VERL["k3+gradient"])


@pytest.mark.parametrize("mode", MODES)
def test_clipped_loss_aggregation_and_gradient(mode: str) -> None:
    now = tensor(NEW, gradient=True)
    batch = losses.TokenBatch(now, tensor(OLD), tensor(ADVANTAGES))
    loss = (weights(MODES[mode]) * losses.clipped(batch, 0.2, 0.28, 3.0)).sum()
    loss.backward()
    assert loss.item() == near(VERL[f"policy {mode}"])
    assert now.grad is not None and now.grad.tolist() == near(VERL[f"policy gradient {mode}"])
    assert losses.clip_share(batch, 0.2, 0.28).mean().item() == near(VERL["clip"])


def weights(mode: str) -> torch.Tensor:
    lengths = torch.from_numpy(LENGTHS)
    found = losses.token_weights(lengths, mode, tokens=10, responses=4, fixed_length=4)
    return found.double()


def test_dual_clip_bounds_a_bad_token() -> None:
    moved = NEW.copy()
    moved[3] = 0.0  # ratio e^2 with a negative advantage
    batch = losses.TokenBatch(tensor(moved), tensor(OLD), tensor(ADVANTAGES))
    assert (weights("token_mean") * losses.clipped(batch, dual=3.0)).sum().item() == near(VERL["dual"])
    assert losses.clipped(batch)[3] > losses.clipped(batch, dual=3.0)[3]


def test_value_loss() -> None:
    found = losses.value_loss(tensor(NEW_VALUES), tensor(VALUES), tensor(np.array(VERL["returns"])), 0.2)
    assert found.mean().item() == near(VERL["value"])


def test_adaptive_coefficient() -> None:
    assert kl.adapted(0.1, 9.0, 6.0, 10000, 256) == near(VERL["adaptive up"])
    assert kl.adapted(0.1, 5.7, 6.0, 10000, 256) == near(VERL["adaptive down"])


def test_an_installed_verl_says_the_same() -> None:
    """On random numbers, where verl 0.9 can be imported (it wants ray and tensordict)."""
    core = pytest.importorskip("verl.trainer.ppo.core_algos", exc_type=ImportError)
    rng = np.random.default_rng(0)
    lengths, width = rng.integers(1, 9, size=12), 8
    mask = torch.from_numpy((np.arange(width) < lengths[:, None]).astype(np.float64))

    def padded(flat: np.ndarray) -> torch.Tensor:
        table = torch.zeros(len(lengths), width, dtype=torch.float64)
        table[mask.bool()] = torch.from_numpy(flat)
        return table

    count = int(lengths.sum())
    per_token, values = rng.normal(size=count), rng.normal(size=count)
    mine, returns = adv.gae(per_token, values, lengths, 0.99, 0.95)
    theirs, their_returns = core.compute_gae_advantage_return(padded(per_token), padded(values), mask, 0.99, 0.95)
    assert adv.whiten(mine).tolist() == near(theirs[mask.bool()].tolist())
    assert returns.tolist() == near(their_returns[mask.bool()].tolist())
    config = types.SimpleNamespace(gamma=0.99)
    theirs, _ = core.compute_reinforce_plus_plus_outcome_advantage(padded(per_token), mask, config=config)
    assert adv.whiten(adv.rewards_to_go(per_token, lengths, 0.99)).tolist() == near(theirs[mask.bool()].tolist())
