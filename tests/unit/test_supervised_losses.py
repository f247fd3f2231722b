"""The supervised losses against hand-derived numbers, closed forms and autograd."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from align.training.exact_kl import OtherHead, exact_kl
from align.training.losses import supervised as losses
from align.training.losses.supervised import TokenBatch


def tokens(chances: list[float], score: float = 0.0, value: float = 0.0, good: bool = True) -> TokenBatch:
    """One response whose tokens have these probabilities."""
    n = len(chances)
    return TokenBatch(
        torch.tensor(chances, dtype=torch.float64).log(),
        torch.full((n,), score, dtype=torch.float64),
        torch.full((n,), value, dtype=torch.float64),
        torch.full((n,), good),
    )


# ---- weights --------------------------------------------------------------------------------------------------------


def test_rwr_weights_by_hand() -> None:
    """R = β ln 3 weighs 3; R = 0 is plain fine-tuning; above the cap it stays there, without overflow."""
    given = tokens([0.5, 0.25], score=0.2 * math.log(3))
    torch.testing.assert_close(losses.rwr(given, 0.2, 1000.0), 3 * losses.nll(given))
    assert torch.equal(losses.rwr(tokens([0.5]), 0.2, 1000.0), losses.nll(tokens([0.5])))
    assert losses.rwr(tokens([0.5], score=1e6), 0.2, 1000.0).item() == pytest.approx(1000 * math.log(2))


def test_rwr_on_scores_near_zero_is_nearly_plain_fine_tuning() -> None:
    """With β = 10 and R in [-1, 0], as published, all weights lie between .905 and 1."""
    weights = [losses.capped_exp(torch.tensor(r / 10.0), 1000.0).item() for r in (-1.0, 0.0)]
    assert weights == [pytest.approx(0.905, abs=5e-4), 1.0]


def test_awr_is_rwr_of_the_advantage() -> None:
    given = tokens([0.5, 0.1], score=0.9, value=0.6)
    torch.testing.assert_close(losses.awr(given, 0.3, 50.0), losses.rwr(tokens([0.5, 0.1], score=0.3), 0.3, 50.0))
    assert torch.equal(losses.awr(tokens([0.5], 0.6, 0.6), 0.3, 50.0), losses.nll(tokens([0.5])))


def test_unlikelihood_by_hand() -> None:
    """Good: -ln p.  Bad: -α ln(1 - p), so at p = 3/4 it costs ln 4."""
    assert losses.unlikelihood(tokens([0.75]), 1.0).item() == pytest.approx(math.log(4 / 3))
    assert losses.unlikelihood(tokens([0.75], good=False), 1.0).item() == pytest.approx(math.log(4))
    assert losses.unlikelihood(tokens([0.75], good=False), 0.01).item() == pytest.approx(0.01 * math.log(4))


def test_unlikelihood_stays_finite_and_still_pushes_where_the_policy_is_certain() -> None:
    """A clamp would give such a token no gradient; its logit must still go down."""
    logits = torch.tensor([40.0, 0.0, 0.0], requires_grad=True)
    loss = losses.minus_log1m(logits.log_softmax(0)[0])
    assert math.isfinite(loss.item()) and loss.item() > 13
    (slope,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(slope).all()
    certain = torch.zeros(1, requires_grad=True)  # p = 1
    assert torch.autograd.grad(losses.minus_log1m(certain).sum(), certain)[0].item() > 1e5


def test_unlikelihood_gradient_by_hand() -> None:
    x = torch.tensor([math.log(0.8)], dtype=torch.float64, requires_grad=True)
    losses.minus_log1m(x).sum().backward()
    assert x.grad is not None and x.grad.item() == pytest.approx(0.8 / 0.2)


# ---- PoFT -----------------------------------------------------------------------------------------------------------


def test_poft_gradient_is_the_weighted_cross_entropy() -> None:
    """∇L = ∇(-r_θ) e^r̄ / (e^r̄ + e^r_θ) for the mean token log-probability r_θ of a real softmax."""
    torch.manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    targets, aligned = torch.randint(7, (5,)), torch.tensor([-1.3], dtype=torch.float64)

    def mean_logprob() -> Tensor:
        return logits.log_softmax(-1).gather(1, targets[:, None]).mean()[None]

    (found,) = torch.autograd.grad(losses.poft(mean_logprob(), aligned).sum(), logits)
    (cross_entropy,) = torch.autograd.grad(-mean_logprob().sum(), logits)
    r = mean_logprob().item()
    weight = math.exp(-1.3) / (math.exp(-1.3) + math.exp(r))
    torch.testing.assert_close(found, weight * cross_entropy, rtol=0, atol=1e-12)


def test_poft_by_hand() -> None:
    assert losses.poft(torch.tensor([-1.0]), torch.tensor([-1.0])).item() == pytest.approx(math.log(2))
    far = losses.poft(torch.tensor([-300.0]), torch.tensor([0.0]))  # log(sigmoid()) would be -inf here
    assert far.item() == pytest.approx(300.0)


# ---- sharpening -----------------------------------------------------------------------------------------------------


def base_policy() -> Tensor:
    """[20] log-probabilities of a categorical policy with P(argmax) = 0.163."""
    return torch.randn(20, generator=torch.Generator().manual_seed(0)).double().log_softmax(0)


@pytest.mark.parametrize(("beta", "sharpened"), [(1.0, 0.289), (0.5, 0.402), (0.25, 0.577)])
def test_rlhf_sharpening_reaches_the_power_of_the_base_policy(beta: float, sharpened: float) -> None:
    """Minimised over a categorical policy, the regression gives π_base^(1 + 1/β) to 1e-3 in log-probability."""
    base = base_policy()
    logits = base.clone().requires_grad_()
    first, second = torch.tensor(list(combinations(range(20), 2))).t()
    weight = (base[first] + base[second]).exp()  # pairs drawn from the base policy
    optimizer = torch.optim.LBFGS([logits], max_iter=2000, tolerance_grad=1e-14, tolerance_change=1e-18)

    def closure() -> Tensor:
        optimizer.zero_grad()
        ratio = logits.log_softmax(0) - base
        found = losses.rlhf_sharpening(ratio[first] - ratio[second], base[first] - base[second], beta)
        loss = (weight * found).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    target = ((1 + 1 / beta) * base).log_softmax(0)
    assert (logits.log_softmax(0) - target).abs().max().item() <= 1e-3
    assert base.exp().max().item() == pytest.approx(0.163, abs=5e-4)
    assert logits.softmax(0).max().item() == pytest.approx(sharpened, abs=5e-4)


def test_rlhf_sharpening_by_hand() -> None:
    """β = 1/2, Δ_1 - Δ_2 = 3, s_1 - s_2 = 1: (1.5 - 1)² = 1/4."""
    found = losses.rlhf_sharpening(torch.tensor([3.0]), torch.tensor([1.0]), 0.5)
    assert found.item() == pytest.approx(0.25)


# ---- marginal likelihood --------------------------------------------------------------------------------------------

TOTALS = torch.tensor([[-1.0, -2.0, -4.0], [-3.0, 0.0, 0.0]], dtype=torch.float64)
COUNTED = torch.tensor([[True, True, True], [True, False, False]])


def test_mml_by_hand_is_below_the_least_cross_entropy() -> None:
    """-ln(e^-1 + e^-2 + e^-4) <= min(1, 2, 4), and one response alone costs its own cross-entropy for every β."""
    found = losses.mml(TOTALS, COUNTED, 1.0)
    assert found[0].item() == pytest.approx(-math.log(math.exp(-1) + math.exp(-2) + math.exp(-4)))
    assert found[0].item() < 1.0
    for beta in (0.1, 1.0, 30.0):
        assert losses.mml(TOTALS, COUNTED, beta)[1].item() == pytest.approx(3.0)


def test_mml_goes_from_the_mean_to_the_best_with_beta() -> None:
    """The gradient is softmax(β log π): equal shares at β near 0, the likeliest alone at large β."""
    for beta, shares in ((1e-6, [1 / 3] * 3), (50.0, [1.0, 0.0, 0.0])):
        totals = TOTALS.clone().requires_grad_()
        (slope,) = torch.autograd.grad(losses.mml(totals, COUNTED, beta).sum(), totals)
        assert slope[0].tolist() == pytest.approx([-s for s in shares], abs=1e-5)
        assert slope[1].tolist() == [-1.0, 0.0, 0.0]
    assert losses.mml(TOTALS, COUNTED, 1e3)[0].item() == pytest.approx(1.0, abs=1e-3)


# ---- Quark and the exact KL -----------------------------------------------------------------------------------------


def test_quark_without_kl_is_plain_fine_tuning() -> None:
    given = tokens([0.5, 0.1])
    assert torch.equal(losses.quark(given, 0.0), losses.nll(given))


def heads(bias: bool) -> tuple[list[Tensor], OtherHead, Tensor]:
    torch.manual_seed(1)
    own = [torch.randn(11, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)]
    own += [torch.randn(9, dtype=torch.float64)] if bias else []
    other = OtherHead(torch.randn(11, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64))
    return [t.requires_grad_() for t in own], other, torch.randn(11, dtype=torch.float64)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_exact_kl_is_the_plain_formula_gradient_included(bias: bool, chunk: int) -> None:
    own, other, pull = heads(bias)
    log_p = torch.nn.functional.linear(*own).log_softmax(-1)
    log_q = (other.hidden @ other.weight.t()).log_softmax(-1)
    plain = (log_p.exp() * (log_p - log_q)).sum(-1)
    found = exact_kl(own[0], own[1], own[2] if bias else None, other, chunk)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad((found * pull).sum(), own), torch.autograd.grad((plain * pull).sum(), own), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_exact_kl_of_a_policy_from_itself_is_zero_and_flat() -> None:
    own, _, _ = heads(bias=True)
    same = OtherHead(own[0].detach(), own[1].detach(), own[2].detach())
    found = exact_kl(own[0], own[1], own[2], same, 3)
    assert found.abs().max().item() < 1e-12
    assert all(g.abs().max().item() < 1e-12 for g in torch.autograd.grad(found.sum(), own))


def test_exact_kl_is_computed_in_float32_for_half_precision() -> None:
    own, other, _ = heads(bias=False)
    lean = OtherHead(other.hidden.bfloat16(), other.weight.bfloat16())
    hidden = own[0].detach().bfloat16().requires_grad_()
    found = exact_kl(hidden, own[1].detach().bfloat16(), None, lean, 4)
    assert found.dtype == torch.float32
    assert torch.autograd.grad(found.sum(), hidden)[0].dtype == torch.bfloat16
