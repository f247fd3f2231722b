"""The losses of pairs against hand-derived numbers, closed forms, identities and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from align.catalogue import LOSSES
from align.recipe_training import Loss
from align.training.losses import divergence, one_sided, pairwise, reference_free, tokens, whole_step
from align.training.losses.pairs import PairBatch
from align.training.losses.pairwise import dpo
from align.training.schedule import factor

PREFERENCE = sorted(name for name, facts in LOSSES.items() if facts.family == "preference")
LN2, LN3 = math.log(2), math.log(3)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sides(c: float, r: float, label: float = 1.0, lengths: tuple[float, float] = (4.0, 2.0)) -> PairBatch:
    """One pair with these log-ratios; the reference says -9 and -11."""
    return PairBatch(
        policy_chosen=column(c - 9), policy_rejected=column(r - 11), ref_chosen=column(-9), ref_rejected=column(-11),
        label=column(label), weight=column(1.0), chosen_length=column(lengths[0]), rejected_length=column(lengths[1]),
        tokens_per_pair=lengths[0],
    )  # fmt: skip


def margin(z: float, label: float = 1.0, beta: float = 0.1) -> PairBatch:
    """One pair whose margin is z / beta."""
    return sides(z / beta, 0.0, label)


def many(count: int = 7, seed: int = 0) -> PairBatch:
    """Random pairs with soft labels, weights and lengths."""
    draw = torch.Generator().manual_seed(seed)
    normal = [torch.randn(count, generator=draw, dtype=torch.float64) - 5.0 for _ in range(4)]
    label = 0.5 + 0.5 * torch.rand(count, generator=draw, dtype=torch.float64)
    weight = 0.2 + torch.rand(count, generator=draw, dtype=torch.float64)
    lengths = [torch.randint(1, 9, (count,), generator=draw).double() for _ in range(2)]
    return PairBatch(*normal, label, weight, *lengths, tokens_per_pair=float(lengths[0].mean()))


def only(batch: PairBatch, index: int) -> PairBatch:
    """One pair of the batch."""
    cut = {f.name: getattr(batch, f.name)[index : index + 1] for f in fields(batch) if f.name != "tokens_per_pair"}
    return replace(batch, **cut)


def loss_of(name: str, **settings: Any) -> Callable[[PairBatch], Tensor]:
    """A loss as the trainer calls it, with the settings of a recipe."""
    if name in ("cdpo", "rdpo", "exo"):
        settings = {"label_smoothing": 0.1, **settings}
    facts = LOSSES[name]
    arguments = facts.arguments(Loss(name=name, **settings))
    return lambda batch: facts.function()(batch, **arguments)


def value(loss: Callable[[PairBatch], Tensor], batch: PairBatch) -> float:
    return float(loss(batch).item())


# ---- numbers worked out by hand: where z = ln 3, σ(z) = 3/4 ----------------------------------------------------------

BY_HAND: dict[str, tuple[Callable[[], Tensor], float]] = {
    "dpo, hard": (lambda: dpo(margin(LN3), beta=0.1), math.log(4 / 3)),
    "dpo, soft": (lambda: dpo(margin(LN3, 0.8), beta=0.1), 0.8 * math.log(4 / 3) + 0.2 * math.log(4)),
    "cdpo": (
        lambda: pairwise.cdpo(margin(LN3), beta=0.1, label_smoothing=0.2),
        0.8 * math.log(4 / 3) + 0.2 * math.log(4),
    ),
    "cdpo, soft": (
        lambda: pairwise.cdpo(margin(LN3, 0.75), beta=0.1, label_smoothing=0.1),  # 0.75 * 0.9 + 0.25 * 0.1 = 0.7
        0.7 * math.log(4 / 3) + 0.3 * math.log(4),
    ),
    "rdpo": (
        lambda: pairwise.rdpo(margin(LN3), beta=0.1, label_smoothing=0.25),
        (0.75 * math.log(4 / 3) - 0.25 * math.log(4)) / 0.5,
    ),
    "hinge": (lambda: pairwise.hinge(margin(0.25, 0.9), beta=0.1), 0.9 * 0.75 + 0.1 * 1.25),
    "hinge, won": (lambda: pairwise.hinge(margin(1.5), beta=0.1), 0.0),
    # c = 8 over 4 tokens, r = -2 over 2: a margin of 3 per token against 1/(2 * 0.25) = 2
    "ipo": (lambda: pairwise.ipo(sides(8, -2), beta=0.25), 1.0),
    "ipo, soft": (lambda: pairwise.ipo(sides(8, -2, 0.75), beta=0.25), 0.75 * 1.0 + 0.25 * 25.0),
    "dpo_norm": (lambda: pairwise.dpo_norm(sides(4 * LN3, 0), beta=1.0), math.log(4 / 3)),
    "exo": (
        lambda: pairwise.exo(margin(LN3), beta=0.1, label_smoothing=0.5 - 0.1),  # KL((3/4, 1/4) || (0.6, 0.4))
        0.75 * math.log(0.75 / 0.6) + 0.25 * math.log(0.25 / 0.4),
    ),
    "weighted": (lambda: pairwise.weighted(margin(LN3, 0.8), beta=0.1), 0.6 * math.log(4 / 3)),
    "weighted, wrong way": (lambda: pairwise.weighted(margin(-LN3, 0.2), beta=0.1), 0.6 * math.log(4 / 3)),
    "gdpo": (lambda: pairwise.gdpo(margin(2 * LN3, 0.75), beta=0.1), math.log(4 / 3)),
    "discopop": (  # σ(z / τ) = 3/4 where z = τ ln 3
        lambda: pairwise.discopop(margin(0.5 * LN3), beta=0.1, discopop_tau=0.5),
        0.25 * math.log(1 + 3**-0.5) + 0.75 * 3**-0.5,
    ),
    "nca": (
        lambda: one_sided.nca(sides(LN3, -LN3), beta=1.0),
        math.log(4 / 3) + 0.5 * math.log(4) + 0.5 * math.log(4 / 3),
    ),
    "bco": (lambda: one_sided.bco(sides(LN3, -LN3), beta=1.0), 2 * math.log(4 / 3)),
    "bco, shifted": (lambda: one_sided.bco(sides(2 * LN3, 0), beta=1.0, shift=LN3), 2 * math.log(4 / 3)),
    "sppo": (lambda: one_sided.sppo_hard(sides(7, -3), beta=0.1), 4.0 + 4.0),  # targets 5 and -5
    "sppo, soft": (lambda: one_sided.sppo_hard(sides(7, -3, 0.7), beta=0.1), 25.0 + 1.0),  # targets 2 and -2
    "apo_zero": (lambda: one_sided.apo_zero(sides(LN3, -LN3), beta=1.0), 0.5),
    "apo_down": (lambda: one_sided.apo_down(sides(-LN3, -2 * LN3), beta=1.0), 0.5),
    "sft": (lambda: one_sided.sft(sides(-3, 0)), 3.0),  # 12 nats over 4 tokens
    # lc = -8 over 4 tokens, lr = -8 over 2: 2 nats a token between them
    "simpo": (
        lambda: reference_free.simpo(sides(1, 3), beta=0.5, simpo_gamma=1.0, label_smoothing=0.0),
        LN2,
    ),
    "cpo": (
        lambda: reference_free.cpo(sides(9 + LN3, 11), beta=1.0, label_smoothing=0.2),
        0.8 * math.log(4 / 3) + 0.2 * math.log(4),
    ),
    "cpo_hinge": (lambda: reference_free.cpo_hinge(sides(1, 3), beta=0.1), 1.0),
    "cpo_ipo": (lambda: reference_free.cpo_ipo(sides(1, 3), beta=0.25), 0.0),
    # per token P = 3/4 and 1/2: odds 3 and 1
    "orpo": (
        lambda: reference_free.orpo(sides(9 + 4 * math.log(0.75), 11 + 2 * math.log(0.5)), beta=0.2),
        0.2 * math.log(4 / 3),
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_hand_derived_value(name: str) -> None:
    compute, expected = BY_HAND[name]
    assert compute().item() == pytest.approx(expected, abs=1e-12)


def test_aot_by_hand() -> None:
    """Policy margins 3 and 1, reference margins 2 and 0, paired the other way round: both gaps are 1 once sorted."""
    batch = PairBatch(
        policy_chosen=column(-1, -2), policy_rejected=column(-4, -3), ref_chosen=column(-3, -2),
        ref_rejected=column(-3, -4), label=column(1, 1), weight=column(1, 1), chosen_length=column(1, 1),
        rejected_length=column(1, 1),
    )  # fmt: skip
    found = whole_step.aot(batch, beta=LN3, label_smoothing=0.0)
    assert found.tolist() == pytest.approx([math.log(4 / 3)] * 2, abs=1e-12)
    # log-ratios: chosen 2 and 0, rejected -1 and 1; sorted gaps 0 - -1 = 1 and 2 - 1 = 1
    found = whole_step.aot_unpaired(batch, beta=LN3, label_smoothing=0.2)
    assert found.tolist() == pytest.approx([0.8 * math.log(4 / 3) + 0.2 * math.log(4)] * 2, abs=1e-12)


def test_dr_dpo_by_hand_and_at_its_ends() -> None:
    """Losses ln 2 and ln 4 at b = 1: -log((1/2 + 1/4) / 2); at large b DPO's mean; a weight counts as copies."""
    batch = PairBatch(
        policy_chosen=column(0.0, -LN3), policy_rejected=column(0.0, 0.0), ref_chosen=column(0, 0),
        ref_rejected=column(0, 0), label=column(1, 1), weight=column(1, 1), chosen_length=column(1, 1),
        rejected_length=column(1, 1),
    )  # fmt: skip
    assert whole_step.dr_dpo(batch, beta=1.0, dr_temperature=1.0).tolist() == pytest.approx([math.log(8 / 3)] * 2)
    plain = dpo(batch, beta=1.0).mean().item()
    assert whole_step.dr_dpo(batch, beta=1.0, dr_temperature=1e7)[0].item() == pytest.approx(plain, abs=1e-6)
    doubled = whole_step.dr_dpo(replace(batch, weight=column(2, 1)), beta=1.0, dr_temperature=1.0)[0].item()
    assert doubled == pytest.approx(-math.log((2 / 2 + 1 / 4) / 3), abs=1e-12)


# ---- identities ------------------------------------------------------------------------------------------------------


def test_equal_to_the_reference_dpo_is_ln_2_for_every_label() -> None:
    for label in (0.0, 0.3, 0.5, 1.0):
        assert dpo(margin(0.0, label), beta=0.1).item() == pytest.approx(LN2, abs=1e-12)


def test_dpo_gradient_is_beta_times_sigma_minus_label() -> None:
    for z, label in ((0.0, 1.0), (0.7, 0.6), (-2.0, 0.9)):
        record = margin(z, label)
        for tensor in (record.policy_chosen, record.policy_rejected):
            tensor.requires_grad_()
        dpo(record, beta=0.1).sum().backward()
        slope = 0.1 * (1 / (1 + math.exp(-z)) - label)
        assert record.policy_chosen.grad is not None and record.policy_rejected.grad is not None
        assert record.policy_chosen.grad.item() == pytest.approx(slope, abs=1e-12)
        assert record.policy_rejected.grad.item() == pytest.approx(-slope, abs=1e-12)


SYMMETRIC = ["dpo", "cdpo", "hinge", "ipo", "dpo_norm", "exo", "nca", "sppo_hard", "weighted", "gdpo", "orpo", "cpo"]


@pytest.mark.parametrize("name", [*SYMMETRIC, "cpo_hinge", "cpo_ipo"])
def test_swapping_the_responses_and_the_label_changes_nothing(name: str) -> None:
    a = many()
    b = PairBatch(
        a.policy_rejected, a.policy_chosen, a.ref_rejected, a.ref_chosen, 1 - a.label, a.weight, a.rejected_length,
        a.chosen_length,
    )  # fmt: skip
    torch.testing.assert_close(loss_of(name)(a), loss_of(name)(b), rtol=0, atol=1e-12)


NOT_MONOTONE = ("apo_down", "discopop")  # the first lowers both responses, the second has a bump above z = 0


@pytest.mark.parametrize("name", [n for n in PREFERENCE if n not in NOT_MONOTONE])
def test_a_better_margin_lowers_the_loss(name: str) -> None:
    """With a certain label, more likelihood for the chosen response and less for the rejected one costs less."""
    before = sides(0.2, -0.1, lengths=(6.0, 8.0))
    after = sides(0.4, -0.3, lengths=(6.0, 8.0))
    assert value(loss_of(name), after) < value(loss_of(name), before)


@pytest.mark.parametrize("name", PREFERENCE)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    batch = replace(many(5, seed=3), label=torch.ones(5, dtype=torch.float64))

    def total(chosen: Tensor, rejected: Tensor) -> Tensor:
        return loss_of(name)(replace(batch, policy_chosen=chosen, policy_rejected=rejected)).sum()

    inputs = (batch.policy_chosen.clone().requires_grad_(), batch.policy_rejected.clone().requires_grad_())
    assert torch.autograd.gradcheck(total, inputs, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PREFERENCE)
def test_a_loss_of_its_own_per_pair_unless_the_table_says_otherwise(name: str) -> None:
    batch = many()
    together, alone = loss_of(name)(batch), torch.cat([loss_of(name)(only(batch, i)) for i in range(7)])
    assert together.shape == batch.label.shape
    assert torch.allclose(together, alone) is not LOSSES[name].whole_step


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "dr_dpo"])
def test_a_loss_of_the_whole_step_does_not_depend_on_the_order(name: str) -> None:
    batch, order = many(), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    if not LOSSES[name].soft:  # no weight per pair either
        batch = replace(batch, weight=torch.ones_like(batch.weight))
    cut = {f.name: getattr(batch, f.name)[order] for f in fields(batch) if f.name != "tokens_per_pair"}
    shuffled = replace(batch, **cut)
    for record in (batch, shuffled):
        record.policy_chosen.requires_grad_()
        (record.weight * loss_of(name)(record)).sum().backward()
    assert batch.policy_chosen.grad is not None and shuffled.policy_chosen.grad is not None
    torch.testing.assert_close(shuffled.policy_chosen.grad, batch.policy_chosen.grad[order], rtol=0, atol=1e-12)


def test_rdpo_is_unbiased_under_flips_and_cdpo_has_the_stated_minimum() -> None:
    noise, z = 0.3, 0.8
    flipped = (1 - noise) * pairwise.rdpo(margin(z), beta=0.1, label_smoothing=noise) + noise * pairwise.rdpo(
        margin(-z), beta=0.1, label_smoothing=noise
    )
    assert flipped.item() == pytest.approx(dpo(margin(z), beta=0.1).item(), abs=1e-12)
    best = math.log((1 - noise) / noise)
    at = [value(loss_of("cdpo", label_smoothing=noise), margin(best + d)) for d in (-0.01, 0.0, 0.01)]
    assert at[1] < min(at[0], at[2])


def test_length_normalised_dpo_is_dpo_at_beta_over_the_length() -> None:
    batch = sides(2.0, -1.0, 0.8, lengths=(5.0, 5.0))
    torch.testing.assert_close(pairwise.dpo_norm(batch, beta=0.5), dpo(batch, beta=0.1))


@pytest.mark.parametrize("name", [n for n in PREFERENCE if not LOSSES[n].reference])
def test_a_reference_free_loss_does_not_look_at_the_reference(name: str) -> None:
    batch = many()
    moved = replace(batch, ref_chosen=batch.ref_chosen + 3.0, ref_rejected=batch.ref_rejected - 1.0)
    assert torch.equal(loss_of(name)(batch), loss_of(name)(moved))


@pytest.mark.parametrize("name", [n for n in PREFERENCE if not LOSSES[n].soft])
def test_a_loss_that_takes_no_soft_label_does_not_look_at_it(name: str) -> None:
    batch = many()
    assert torch.equal(loss_of(name)(batch), loss_of(name)(replace(batch, label=1 - batch.label)))


def test_log_odds_at_both_ends() -> None:
    """P = 1/2 has log odds 0; the gradient 1 / (1 - P) is finite near both ends."""
    logprob = column(math.log(0.5), -40.0, -1e-6).requires_grad_()
    found = reference_free.log_odds(logprob)
    assert found.tolist() == pytest.approx([0.0, -40.0, -math.log(math.expm1(1e-6))], abs=1e-9)
    found.sum().backward()
    assert logprob.grad is not None
    assert logprob.grad.tolist() == pytest.approx([2.0, 1.0, 1 / -math.expm1(-1e-6)], rel=1e-6)


def test_far_from_the_reference_dpo_stays_finite() -> None:
    assert dpo(margin(1e4, 0.5), beta=0.1).item() == pytest.approx(5e3)


# ---- modifiers -------------------------------------------------------------------------------------------------------


def test_divergences_by_hand() -> None:
    """At u = 2: log 2, 1 - 1/2, log(4/3), and (sqrt(2) - 1) / 0.5 at α = 1.5."""
    u = column(math.log(2))
    found = [divergence.score(u, name, 1.5).item() for name in ("reverse_kl", "forward_kl", "js", "alpha")]
    assert found == pytest.approx([LN2, 0.5, math.log(4 / 3), (2**0.5 - 1) / 0.5], abs=1e-12)


def test_alpha_near_one_is_the_reverse_kl_and_far_out_it_stays_finite() -> None:
    u = column(-2.0, 0.3, 4.0)
    torch.testing.assert_close(divergence.score(u, "alpha", 1.0), u)
    torch.testing.assert_close(divergence.score(u, "alpha", 1.0001), u, rtol=0, atol=1e-3)
    assert torch.isfinite(divergence.score(torch.tensor([1e4]), "alpha", 3.0)).all()


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "js", "alpha"])
def test_every_divergence_leaves_an_unmoved_policy_without_a_margin(name: str) -> None:
    batch = sides(0.0, 0.0)
    assert divergence.with_divergence(batch, name, 0.5).margin.item() == 0.0
    assert dpo(divergence.with_divergence(batch, name, 0.5), beta=0.3).item() == pytest.approx(LN2)


def test_ld_weights_by_hand() -> None:
    assert tokens.ld_weights([3, 2], [2, 3], 0.25) == [1.0, 1.0, 0.25, 1.0, 1.0]


def test_wpo_weights_by_hand() -> None:
    """Uniform over 4: log p - log sum p^2 = log 1/4 - log 1/4 = 0; a token of half the usual chance gives log 1/2."""
    logprobs = torch.tensor([math.log(1 / 4), math.log(1 / 4), math.log(1 / 8)], requires_grad=True)
    squares = torch.full((3,), math.log(1 / 4))
    found = tokens.wpo_log_weights(logprobs, squares, torch.tensor([1, 2]))
    assert found.tolist() == pytest.approx([0.0, math.log(1 / 2) / 2], abs=1e-6)
    assert not found.requires_grad


# ---- what training reaches -------------------------------------------------------------------------------------------


def test_training_on_soft_labels_reaches_the_closed_form() -> None:
    """With every pair weighted by the true Bradley-Terry probability, DPO's minimiser is π_ref exp(r/β)/Z."""
    torch.manual_seed(0)
    beta, rewards = 0.5, torch.randn(6, dtype=torch.float64)
    reference = torch.randn(6, dtype=torch.float64).log_softmax(0)
    logits = reference.clone().requires_grad_()
    first, second = torch.triu_indices(6, 6, 1)
    label = torch.sigmoid(rewards[first] - rewards[second])
    one = torch.ones_like(label)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure() -> Tensor:
        optimizer.zero_grad()
        policy = logits.log_softmax(0)
        batch = PairBatch(policy[first], policy[second], reference[first], reference[second], label, one, one, one)
        loss = dpo(batch, beta=beta).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimum = (reference + rewards / beta).softmax(0)
    assert 0.5 * (logits.softmax(0) - optimum).abs().sum().item() < 1e-6


def test_the_record_refuses_tensors_of_different_shape() -> None:
    with pytest.raises(AssertionError):
        replace(many(), label=torch.zeros(2))


def test_schedule_by_hand() -> None:
    assert [factor(s, "constant", 2, 10) for s in range(4)] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0, 1.0]
    assert [factor(s, "linear", 0, 4) for s in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert [factor(s, "cosine", 0, 4) for s in (0, 2, 4, 9)] == [1.0, pytest.approx(0.5), 0.0, 0.0]
    assert factor(5, "cosine", 5, 5) == 1.0
