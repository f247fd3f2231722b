"""Losses of whole groups and of single responses: numbers by hand, limits that are DPO, gradients, ties, padding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from align.training.losses.groupwise import (
    GroupBatch,
    gpo,
    gpo_scores,
    kendall_tau,
    lipo,
    plackett_luce,
    ranklist,
    ranklist_skip,
    reward_regression,
)
from align.training.losses.pairs import PairBatch
from align.training.losses.pairwise import dpo
from align.training.losses.unpaired import apo_zero_unpaired, kto, reference_point

BETA = 0.3


def group(ratios: Sequence[float], utilities: Sequence[float], sizes: Sequence[int] | None = None) -> GroupBatch:
    """Log-ratios and utilities of one group, or of several behind each other; the policy carries a gradient."""
    ratio = torch.tensor(ratios, dtype=torch.float64)
    reference = torch.linspace(-9.0, -4.0, len(ratios), dtype=torch.float64)
    utility = torch.tensor(utilities, dtype=torch.float64)
    return GroupBatch((ratio + reference).requires_grad_(), reference, utility, sizes or (len(ratios),))


def dpo_of(batch: GroupBatch) -> Tensor:
    """DPO of a group of two, the better one first."""
    ones = torch.ones(1, dtype=torch.float64)
    (c, r), (ref_c, ref_r) = batch.policy[:, None], batch.ref[:, None]
    return dpo(
        PairBatch(c, r, ref_c, ref_r, label=ones, weight=ones, chosen_length=ones, rejected_length=ones), beta=BETA
    )


LISTS: dict[str, Callable[[GroupBatch], Tensor]] = {
    "plackett_luce": lambda b: plackett_luce(b, beta=BETA),
    "lipo": lambda b: lipo(b, beta=BETA),
    "ranklist": lambda b: ranklist(b, beta=BETA, rank_margin=0.2),
    "ranklist_skip": lambda b: ranklist_skip(b, beta=BETA, rank_margin=0.2, rank_skip=2),
    "reward_regression": lambda b: reward_regression(b, beta=BETA),
}
ALL = LISTS | {"gpo": lambda b: gpo(b, beta=BETA)}


@pytest.mark.parametrize("margin", [-2.0, 0.0, 1.7])
def test_with_two_responses_the_lists_are_dpo(margin: float) -> None:
    batch = group([margin, 0.4], [0.9, 0.2])
    expected = dpo_of(batch)
    for found in (
        plackett_luce(batch, beta=BETA),
        ranklist(batch, beta=BETA, rank_margin=0.0),
        ranklist_skip(batch, beta=BETA, rank_margin=0.0, rank_skip=1),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("margin", [-2.0, 0.0, 1.7])
def test_with_two_responses_lipo_is_dpo_times_a_constant(margin: float) -> None:
    """|2^0.9 - 2^0.2| (1/log 2 - 1/log 3), whatever the scores are."""
    batch = group([margin, 0.4], [0.9, 0.2])
    constant = (2**0.9 - 2**0.2) * (1 / math.log(2) - 1 / math.log(3))
    torch.testing.assert_close(lipo(batch, beta=BETA), constant * dpo_of(batch), rtol=0, atol=1e-12)


def test_plackett_luce_is_a_distribution_over_orders() -> None:
    """e^-loss over all 24 orders of four responses adds up to 1."""
    ratios = [0.3, -1.2, 2.0, 0.7]
    total = sum(
        math.exp(-plackett_luce(group(ratios, order), beta=BETA).item())
        for order in itertools.permutations([0.1, 0.3, 0.5, 0.7])
    )
    assert total == pytest.approx(1.0, abs=1e-12)


def test_plackett_luce_by_hand_and_with_a_tie() -> None:
    """Equal scores, three responses: log 3 + log 2.  With the upper two tied, each is compared with the third only."""
    assert plackett_luce(group([0, 0, 0], [0.9, 0.5, 0.1]), beta=BETA).item() == pytest.approx(math.log(6), abs=1e-12)
    assert plackett_luce(group([0, 0, 0], [0.9, 0.9, 0.1]), beta=BETA).item() == pytest.approx(math.log(4), abs=1e-12)


def test_lipo_by_hand() -> None:
    """s = (1, 0, 2): ranks 2, 3, 1, so 1/D = 1/log 3, 1/log 4, 1/log 2; gains of 1, 0.5 and 0 are 1, √2 - 1 and 0."""
    batch = group([1 / BETA, 0.0, 2 / BETA], [1.0, 0.5, 0.0])
    gain, discount = [1.0, 2**0.5 - 1, 0.0], [1 / math.log(n) for n in (3, 4, 2)]
    scores = [1.0, 0.0, 2.0]
    expected = sum(
        abs(gain[i] - gain[j]) * abs(discount[i] - discount[j]) * math.log1p(math.exp(scores[j] - scores[i]))
        for i, j in ((0, 1), (0, 2), (1, 2))
    )
    assert lipo(batch, beta=BETA).item() == pytest.approx(expected, abs=1e-12)


def test_lipo_s_weights_carry_no_gradient_and_begin_anywhere() -> None:
    """The gradient is that of the pairs with λ held fixed; where all scores are equal it is not zero."""
    batch = group([0.5, -0.3, 0.9, 0.1], [0.8, 0.6, 0.3, 0.1])
    (slope,) = torch.autograd.grad(lipo(batch, beta=BETA).sum(), batch.policy)
    step = 1e-6  # too small to change a rank, so a difference quotient sees λ held fixed
    for k in range(4):
        values = batch.ratio.detach().clone()
        values[k] += step
        above = lipo(GroupBatch(values, torch.zeros_like(values), batch.utility, (4,)), beta=BETA)
        values[k] -= 2 * step
        below = lipo(GroupBatch(values, torch.zeros_like(values), batch.utility, (4,)), beta=BETA)
        assert slope[k].item() == pytest.approx(((above - below) / (2 * step)).item(), abs=1e-8)
    start = group([0.0, 0.0, 0.0], [0.8, 0.6, 0.3])
    (slope,) = torch.autograd.grad(lipo(start, beta=BETA).sum(), start.policy)
    assert slope.abs().max() > 0.01


def test_rounding_cannot_decide_a_rank() -> None:
    """Scores that differ in the last digits are ranked as equal ones, on any machine."""
    exact = lipo(group([0.0, 0.0, 0.0], [0.8, 0.6, 0.3]), beta=BETA)
    noisy = lipo(group([-2e-6, 1e-6, 3e-6], [0.8, 0.6, 0.3]), beta=BETA)
    torch.testing.assert_close(noisy, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", LISTS)
def test_gradients_of_a_group_add_up_to_zero(name: str) -> None:
    """Only differences of scores count, so a shift of all log-probabilities of a prompt changes nothing."""
    batch = group([0.5, -0.3, 0.9, 0.1, 0.7], [0.8, 0.6, 0.6, 0.1, 0.9], sizes=(3, 2))
    (slope,) = torch.autograd.grad(LISTS[name](batch).sum(), batch.policy)
    assert slope[:3].sum().abs() < 1e-12 and slope[3:].sum().abs() < 1e-12 and slope.abs().max() > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_a_group_is_not_changed_by_its_neighbours(name: str) -> None:
    ratios, utilities = [0.5, -0.3, 0.9, 0.1, 0.7, -1.0], [0.8, 0.6, 0.6, 0.1, 0.9, 0.9]
    together = ALL[name](group(ratios, utilities, sizes=(3, 1, 2)))
    cuts = ((0, 3), (3, 4), (4, 6))
    alone = torch.cat([ALL[name](group(ratios[a:b], utilities[a:b])) for a, b in cuts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["plackett_luce", "lipo", "ranklist", "ranklist_skip"])
def test_equal_utilities_say_nothing(name: str) -> None:
    batch = group([0.5, -0.3, 0.9], [0.4, 0.4, 0.4])
    loss = LISTS[name](batch)
    (slope,) = torch.autograd.grad(loss.sum(), batch.policy)
    assert loss.item() == 0.0 and not slope.any()


@pytest.mark.parametrize("name", ALL)
def test_the_gradient_lifts_the_best_and_lowers_the_worst(name: str) -> None:
    batch = group([0.0, 0.0, 0.0], [0.9, 0.5, 0.1])
    (slope,) = torch.autograd.grad(ALL[name](batch).sum(), batch.policy)
    assert slope[0] < 0 < slope[2]


def test_ranklist_looks_at_levels() -> None:
    """Utilities 0.9, 0.5, 0.5, 0.1 are three levels: four neighbouring pairs; two levels apart count for the skip."""
    batch = group([0, 0, 0, 0], [0.9, 0.5, 0.5, 0.1])
    assert ranklist(batch, beta=BETA, rank_margin=0.0).item() == pytest.approx(4 * math.log(2), abs=1e-12)
    near = ranklist_skip(batch, beta=BETA, rank_margin=0.0, rank_skip=1)  # log 3 for the first, log 2 for the middle
    assert near.item() == pytest.approx(math.log(3) + 2 * math.log(2), abs=1e-12)
    far = ranklist_skip(batch, beta=BETA, rank_margin=0.0, rank_skip=2)
    assert far.item() == pytest.approx(math.log(4) + 2 * math.log(2), abs=1e-12)
    shifted = ranklist(batch, beta=BETA, rank_margin=1.5)
    assert shifted.item() == pytest.approx(4 * math.log1p(math.exp(1.5)), abs=1e-12)


def test_the_log_sum_exp_is_at_most_the_sum() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        ratios, utilities = torch.randn(5).tolist(), torch.rand(5).tolist()
        batch = group(ratios, utilities)
        pairs = [(i, j) for i in range(5) for j in range(5) if utilities[i] > utilities[j]]
        whole = sum(math.log1p(math.exp(0.2 - BETA * (ratios[i] - ratios[j]))) for i, j in pairs)
        assert ranklist_skip(batch, beta=BETA, rank_margin=0.2, rank_skip=9).item() <= whole


def test_reward_regression_reaches_the_closed_form() -> None:
    """Trained on all responses at once, the policy is π_ref e^{ψ/β} / Z."""
    torch.manual_seed(0)
    utility, reference = torch.rand(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64).log_softmax(0)
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = reward_regression(GroupBatch(logits.log_softmax(0), reference, utility, (6,)), beta=BETA).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimum = (reference + utility / BETA).softmax(0)
    assert 0.5 * (logits.softmax(0) - optimum).abs().sum().item() < 1e-6


def test_gpo_by_hand() -> None:
    """Utilities 0.9 and 0.3 are preferred by ±0.3: the targets are ±0.3 / β."""
    loss = gpo(group([0.5, 0.1], [0.9, 0.3]), beta=BETA)
    assert loss.item() == pytest.approx(((0.5 - 0.3 / BETA) ** 2 + (0.1 + 0.3 / BETA) ** 2) / 2, abs=1e-12)


def test_gpo_on_rock_paper_scissors_averages_to_the_nash_point() -> None:
    """4000 steps at β = 5, each a gradient step on the loss from the policy itself, long enough to be one update
    π_{t+1} ∝ π_t e^{s̄/β}: the last policy is nearly pure, the mean of all is within 0.01 of a third each."""
    wins = torch.tensor([[0, 1, -1], [-1, 0, 1], [1, -1, 0]], dtype=torch.float64)
    logits = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    present, total = torch.ones(1, 3, dtype=torch.bool), torch.zeros(3, dtype=torch.float64)
    for _ in range(4000):
        policy = logits.log_softmax(1)
        now = policy.detach().exp()[0]
        total += now
        loss = gpo_scores(policy - policy.detach(), (wins @ now)[None], present, beta=5.0).sum()
        (slope,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            logits -= 1.5 * slope
    assert (total / 4000 - 1 / 3).abs().max() < 0.01
    assert now.max() > 0.95


def test_kendall_tau_counts_what_utilities_decide() -> None:
    """Of the two decided pairs one is in order; a log-ratio that differs by rounding only is a tie."""
    concordant, decided = kendall_tau(group([1.0, 2.0, 0.0], [0.9, 0.5, 0.5]))
    assert (concordant.item(), decided.item()) == (0.0, 2)
    concordant, decided = kendall_tau(group([1.0, 1.0 + 1e-6], [0.9, 0.5]))
    assert (concordant.item(), decided.item()) == (0.0, 1)


# ---- single responses ------------------------------------------------------------------------------------------------


def test_kto_by_hand() -> None:
    """β (Δ - z) = ln 3: a good response costs 1 - 3/4, a bad one 3/4; weights multiply their side."""
    ratio, z = torch.tensor([math.log(3) / BETA + 0.2] * 3, dtype=torch.float64), torch.tensor(0.2)
    label = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    loss = kto(ratio, label, z_ref=z, beta=BETA, desirable_weight=2.0, undesirable_weight=1.0)
    assert loss.tolist() == pytest.approx([2 * 0.25, 0.75, 0.5 * (2 * 0.25 + 0.75)], abs=1e-7)


def test_apo_zero_is_kto_without_a_reference_point() -> None:
    torch.manual_seed(0)
    ratio, label = torch.randn(9), torch.rand(9)
    weights = {"beta": BETA, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    zero = torch.zeros(())
    torch.testing.assert_close(apo_zero_unpaired(ratio, label, **weights), kto(ratio, label, z_ref=zero, **weights))


def test_the_reference_point_is_a_constant_that_is_not_negative() -> None:
    ratio = torch.tensor([1.0, 2.0], requires_grad=True)
    assert reference_point(ratio).item() == 1.5 and not reference_point(ratio).requires_grad
    assert reference_point(-ratio).item() == 0.0
    assert reference_point(torch.zeros(0)).item() == 0.0
