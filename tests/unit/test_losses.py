"""The preference loss against hand-derived numbers, closed forms and autograd."""

from __future__ import annotations

import math

import pytest
import torch

from align.training.losses import LOSSES, PairBatch, dpo
from align.training.schedule import factor


def batch(z: float, label: float, beta: float = 0.1, **changes: float) -> PairBatch:
    """One pair whose margin is z / beta."""
    values = {"policy_chosen": -9.0 + z / beta, "policy_rejected": -11.0, "ref_chosen": -9.0, "ref_rejected": -11.0}
    return PairBatch(
        **{k: torch.tensor([v], dtype=torch.float64) for k, v in ({**values, "label": label} | changes).items()}
    )


def test_equal_to_the_reference_the_loss_is_ln_2_for_every_label() -> None:
    for label in (0.0, 0.3, 0.5, 1.0):
        assert dpo(batch(0.0, label), 0.1).item() == pytest.approx(math.log(2), abs=1e-12)


def test_hand_derived_values() -> None:
    """At z = ln 3, σ(z) = 3/4: a hard label costs ln(4/3), a label of 0.8 costs 0.8 ln(4/3) + 0.2 ln 4."""
    z = math.log(3)
    assert dpo(batch(z, 1.0), 0.1).item() == pytest.approx(math.log(4 / 3), abs=1e-12)
    assert dpo(batch(z, 0.8), 0.1).item() == pytest.approx(0.8 * math.log(4 / 3) + 0.2 * math.log(4), abs=1e-12)


def test_gradient_is_beta_times_sigma_minus_label() -> None:
    for z, label in ((0.0, 1.0), (0.7, 0.6), (-2.0, 0.9)):
        record = batch(z, label)
        for tensor in (record.policy_chosen, record.policy_rejected):
            tensor.requires_grad_()
        dpo(record, 0.1).sum().backward()
        slope = 0.1 * (1 / (1 + math.exp(-z)) - label)
        assert record.policy_chosen.grad is not None and record.policy_rejected.grad is not None
        assert record.policy_chosen.grad.item() == pytest.approx(slope, abs=1e-12)
        assert record.policy_rejected.grad.item() == pytest.approx(-slope, abs=1e-12)


def test_swapping_the_responses_and_the_label_changes_nothing() -> None:
    a = batch(1.3, 0.8)
    b = PairBatch(a.policy_rejected, a.policy_chosen, a.ref_rejected, a.ref_chosen, 1 - a.label)
    torch.testing.assert_close(dpo(a, 0.1), dpo(b, 0.1), rtol=0, atol=1e-12)


def test_far_from_the_reference_it_stays_finite() -> None:
    losses = dpo(batch(1e4, 0.5), 0.1)
    assert losses.item() == pytest.approx(5e3)


def test_training_on_soft_labels_reaches_the_closed_form() -> None:
    """With every pair weighted by the true Bradley-Terry probability, DPO's minimiser is π_ref exp(r/β)/Z."""
    torch.manual_seed(0)
    beta, rewards = 0.5, torch.randn(6, dtype=torch.float64)
    reference = torch.randn(6, dtype=torch.float64).log_softmax(0)
    logits = reference.clone().requires_grad_()
    first, second = torch.triu_indices(6, 6, 1)
    label = torch.sigmoid(rewards[first] - rewards[second])
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        policy = logits.log_softmax(0)
        loss = dpo(PairBatch(policy[first], policy[second], reference[first], reference[second], label), beta).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimum = (reference + rewards / beta).softmax(0)
    assert 0.5 * (logits.softmax(0) - optimum).abs().sum().item() < 1e-6


def test_losses_return_one_value_per_pair() -> None:
    many = PairBatch(*(torch.randn(5) for _ in range(4)), label=torch.rand(5))
    for loss in LOSSES.values():
        alone = [loss(PairBatch(*(getattr(many, f)[i : i + 1] for f in PairBatch.__slots__)), 0.1) for i in range(5)]
        torch.testing.assert_close(loss(many, 0.1), torch.cat(alone))


def test_the_record_refuses_tensors_of_different_shape() -> None:
    with pytest.raises(AssertionError):
        PairBatch(*(torch.zeros(3) for _ in range(4)), label=torch.zeros(2))


def test_schedule_by_hand() -> None:
    assert [factor(s, "constant", 2, 10) for s in range(4)] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0, 1.0]
    assert [factor(s, "linear", 0, 4) for s in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert [factor(s, "cosine", 0, 4) for s in (0, 2, 4, 9)] == [1.0, pytest.approx(0.5), 0.0, 0.0]
    assert factor(5, "cosine", 5, 5) == 1.0
