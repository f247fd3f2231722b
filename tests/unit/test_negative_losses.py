"""Losses of wrong answers: gradients with respect to logits by formula, limits, and D2O on a toy of 200 responses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from align.training.losses.negative import TokenBatch, d2o, nsr, psr, unlikelihood, w_reinforce
from align.training.losses.pairs import PairBatch
from align.training.losses.pairwise import dpo

EXACT = 1e-12
SAMPLED = 2


def logits() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(7, dtype=torch.float64, requires_grad=True)


def token(z: Tensor, sign: float, old: float | None = None) -> TokenBatch:
    """One token, `SAMPLED`, of a right or wrong response; the old policy is the present one unless given."""
    logprob = z.log_softmax(0)[SAMPLED : SAMPLED + 1]
    before = logprob.detach() if old is None else torch.tensor([old], dtype=torch.float64)
    return TokenBatch(logprob, before, torch.tensor([sign], dtype=torch.float64))


def slope(loss: Tensor, z: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), z, retain_graph=True)[0]


def expected(z: Tensor, at_sampled: float, at_others: Tensor) -> Tensor:
    """[V] one number at the sampled token and the given ones elsewhere."""
    found = at_others.clone()
    found[SAMPLED] = at_sampled
    return found


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_probability_form_has_the_paper_s_gradient(sign: float) -> None:
    """-R π_y (1-π_y) at the sampled token and +R π_y π_v at the others."""
    z = logits()
    p = z.detach().softmax(0)
    loss = (psr if sign > 0 else nsr)(token(z, sign), form="probability", clip=0.2)
    assert loss.item() == pytest.approx(-sign * p[SAMPLED].item(), abs=EXACT)
    own = p[SAMPLED]
    torch.testing.assert_close(
        slope(loss, z), expected(z, float(-sign * own * (1 - own)), sign * own * p), rtol=0, atol=EXACT
    )


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_ratio_form_has_the_code_s_gradient(sign: float) -> None:
    """At ratio 1: -R (1-π_y) at the sampled token and +R π_v at the others, without the factor π_y."""
    z = logits()
    p = z.detach().softmax(0)
    loss = (psr if sign > 0 else nsr)(token(z, sign), form="ratio", clip=0.2)
    torch.testing.assert_close(
        slope(loss, z), expected(z, float(-sign * (1 - p[SAMPLED])), sign * p), rtol=0, atol=EXACT
    )


def test_unlikelihood_has_its_gradient() -> None:
    """π_y at the sampled token and -π_y π_v / (1-π_y) at the others."""
    z = logits()
    p = z.detach().softmax(0)
    own = p[SAMPLED]
    loss = unlikelihood(token(z, -1.0))
    assert loss.item() == pytest.approx(-math.log(1 - own), abs=EXACT)
    torch.testing.assert_close(slope(loss, z), expected(z, float(own), -own * p / (1 - own)), rtol=0, atol=EXACT)


def test_unlikelihood_of_a_certain_token_is_finite_and_still_pushes() -> None:
    """A probability that is cut off at the top would have no slope just where the wrong token is surest."""
    batch = TokenBatch(torch.zeros(1, requires_grad=True), torch.zeros(1), -torch.ones(1))
    loss = unlikelihood(batch)
    assert 0.9 * -math.log(1e-6) < loss.item() < 1.1 * (1.0 - math.log(1e-6))
    assert 1e5 < slope(loss, batch.logprobs).item() < 1e7


def mixed(z: Tensor) -> TokenBatch:
    """Four tokens of right and wrong responses, with an old policy that is a little different."""
    logprobs = z.log_softmax(0)[:4]
    return TokenBatch(logprobs, logprobs.detach() - 0.05, torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("form", ["probability", "ratio"])
def test_weighted_reinforce(form: str) -> None:
    """λ = 1 is REINFORCE with ±1; any other λ scales the right side alone, and PSR and NSR are its two halves."""
    z = logits()
    batch = mixed(z)
    value = batch.logprobs.exp() if form == "probability" else (batch.logprobs - batch.old).exp()
    reinforce = slope(-batch.sign * value, z)
    whole = slope(w_reinforce(batch, form=form, clip=0.2, positive_weight=1.0), z)
    torch.testing.assert_close(whole, reinforce, rtol=0, atol=EXACT)
    right, wrong = (slope(half(mixed(z), form=form, clip=0.2), z) for half in (psr, nsr))
    torch.testing.assert_close(right + wrong, reinforce, rtol=0, atol=EXACT)
    tenth = slope(w_reinforce(mixed(z), form=form, clip=0.2, positive_weight=0.1), z)
    torch.testing.assert_close(tenth, 0.1 * right + wrong, rtol=0, atol=EXACT)


def test_the_ratio_is_followed_up_to_the_clip() -> None:
    """A wrong token that has fallen by more than the clip, or a right one that has risen, is left alone."""
    z = logits()
    now = z.log_softmax(0)[SAMPLED].item()
    for sign, moved, still in ((-1.0, -0.3, True), (-1.0, 0.3, False), (1.0, 0.3, True), (1.0, -0.3, False)):
        side = psr if sign > 0 else nsr
        found = slope(side(token(z, sign, old=now - moved), form="ratio", clip=0.2), z)
        assert bool(found.abs().max() < EXACT) is still, (sign, moved)


# ---- D2O -------------------------------------------------------------------------------------------------------------


def test_d2o_is_at_most_the_mean_of_dpo() -> None:
    """Jensen: the mean inside the logistic; equal where all self-samples have one log-ratio, or there is one."""
    torch.manual_seed(1)
    for _ in range(50):
        own, bad = torch.randn(11, dtype=torch.float64) * 5, torch.randn(1, dtype=torch.float64) * 5
        ones, zeros = torch.ones(11, dtype=torch.float64), torch.zeros(11, dtype=torch.float64)
        each = dpo(PairBatch(own, bad.expand(11), zeros, zeros, ones, ones, ones, ones), beta=0.3)
        assert d2o(own.mean()[None], bad, beta=0.3, d2o_alpha=0.3).item() < each.mean().item()
        torch.testing.assert_close(d2o(own[:1], bad, beta=0.3, d2o_alpha=0.3), each[:1], rtol=0, atol=EXACT)


def test_d2o_s_gradient_has_one_weight() -> None:
    """σ(α Δ_l - β mean Δ_i), times β/K at each self-sample and α at the bad answer."""
    own = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    bad = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    d2o(own.mean()[None], bad, beta=0.4, d2o_alpha=0.2).sum().backward()
    weight = 1 / (1 + math.exp(0.4 * 0.5 - 0.2 * 0.7))
    assert own.grad is not None and bad.grad is not None
    assert own.grad.tolist() == pytest.approx([-0.4 / 3 * weight] * 3, abs=EXACT)
    assert bad.grad.item() == pytest.approx(0.2 * weight, abs=EXACT)


def train_toy(self_samples: int, strength: float, steps: int, benign: bool = False) -> tuple[float, float, float]:
    """(P(harm), entropy, entropy at the start) of 200 responses of which 40 harmful ones have half of the mass.

    Each step sets 32 draws of a harmful response against as many groups of self-samples from the reference.
    """
    torch.manual_seed(0)
    raw = torch.randn(200, dtype=torch.float64) * 1.7
    harmful = torch.arange(200) < 40
    start = torch.where(harmful, raw, -math.inf).softmax(0) / 2 + torch.where(harmful, -math.inf, raw).softmax(0) / 2
    reference = start.log()
    theta = reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.1)
    own_from = torch.where(harmful & torch.tensor(benign), 0.0, start)
    for _ in range(steps):
        own = torch.multinomial(own_from, 32 * self_samples, replacement=True).view(32, self_samples)
        bad = torch.multinomial(torch.where(harmful, start, 0.0), 32)
        ratio = theta.log_softmax(0) - reference
        loss = d2o(ratio[own].mean(1), ratio[bad], beta=strength, d2o_alpha=strength).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    policy = theta.detach().softmax(0)
    entropy = torch.special.entr(policy).sum().item()
    return policy[harmful].sum().item(), entropy, torch.special.entr(start).sum().item()


def test_d2o_drops_the_harm_and_keeps_an_entropy() -> None:
    harm, entropy, start = train_toy(11, 0.1, 300)
    assert 3.5 < start < 4.0
    assert harm < 0.05 and entropy > 1.0


def test_filtered_self_samples_keep_more() -> None:
    harm, entropy, _ = train_toy(11, 0.1, 300)
    filtered_harm, filtered_entropy, _ = train_toy(11, 0.1, 300, benign=True)
    assert filtered_harm < harm and filtered_entropy > entropy + 0.3


def test_more_self_samples_drop_the_harm_faster() -> None:
    many, one = train_toy(11, 1.0, 300)[0], train_toy(1, 1.0, 300)[0]
    assert many < one < 0.05


def test_without_a_stop_the_entropy_goes_on_falling() -> None:
    """Why `entropy_stop` exists: five times the steps cost a third of the entropy that was left."""
    assert train_toy(11, 0.1, 1500)[1] < 0.67 * train_toy(11, 0.1, 300)[1]
