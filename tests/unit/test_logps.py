"""Chunked log-probabilities against torch's log_softmax, gradients included."""

from __future__ import annotations

import pytest
import torch

from align.training.logps import per_response, token_logprobs


def full(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(hidden, weight, bias).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("with_bias", [False, True])
def test_chunked_equals_full_gradients_included(chunk: int, with_bias: bool) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(7, 5), torch.randn(11, 5), torch.randn(11) if with_bias else None]
    targets, upstream = torch.randint(0, 11, (7,)), torch.randn(7)
    results = []
    for function in (
        lambda h, w, b: full(h, w, b, targets),
        lambda h, w, b: token_logprobs(h, w, b, targets, chunk=chunk).logprobs,
    ):
        mine = [t.clone().requires_grad_() if t is not None else None for t in leaves]
        out = function(*mine)
        (out * upstream).sum().backward()
        results.append([out, *(t.grad for t in mine if t is not None)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_frozen_head_gets_no_gradient_and_the_hidden_state_does() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(6, 4)
    token_logprobs(hidden, weight, None, torch.tensor([0, 1, 2]), chunk=2).logprobs.sum().backward()
    expected = torch.autograd.grad(full(hidden, weight, None, torch.tensor([0, 1, 2])).sum(), hidden)[0]
    torch.testing.assert_close(hidden.grad, expected, rtol=0, atol=1e-6)


def test_gradient_check_in_double_precision() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 3), torch.randn(5, 3)
    targets = torch.tensor([0, 4, 2, 2])
    step = 1e-2

    def value(h: torch.Tensor) -> float:
        return token_logprobs(h, weight, None, targets, chunk=3).logprobs.double().sum().item()

    hidden.requires_grad_()
    token_logprobs(hidden, weight, None, targets, chunk=3).logprobs.sum().backward()
    assert hidden.grad is not None
    bump = torch.zeros_like(hidden)
    bump[1, 2] = step
    with torch.no_grad():
        slope = (value(hidden + bump) - value(hidden - bump)) / (2 * step)
    assert hidden.grad[1, 2].item() == pytest.approx(slope, abs=1e-3)


def test_entropy_by_hand() -> None:
    """A head that says (1/2, 1/4, 1/4) has an entropy of 1.5 ln 2."""
    weight = torch.tensor([[0.5], [0.25], [0.25]]).log()
    found = token_logprobs(torch.ones(1, 1), weight, None, torch.tensor([1]), chunk=4, entropy=True)
    assert found.entropies is not None
    assert found.entropies.item() == pytest.approx(1.5 * torch.log(torch.tensor(2.0)).item(), abs=1e-6)
    assert found.logprobs.item() == pytest.approx(torch.log(torch.tensor(0.25)).item(), abs=1e-6)


def test_bfloat16_logits_are_normalised_in_float32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 16).bfloat16(), torch.randn(300, 16).bfloat16()
    targets = torch.randint(0, 300, (9,))
    logits = torch.nn.functional.linear(hidden, weight).float()
    expected = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(
        token_logprobs(hidden, weight, None, targets, chunk=4).logprobs, expected, rtol=0, atol=1e-5
    )


def test_per_response_sums_and_its_gradient() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], requires_grad=True)
    sums = per_response(values, torch.tensor([2, 3]))
    assert sums.tolist() == [3.0, 12.0]
    (sums * torch.tensor([10.0, -1.0])).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [10.0, 10.0, -1.0, -1.0, -1.0]
