"""Chunked log-probabilities against torch's log_softmax, gradients included."""

from __future__ import annotations

import pytest
import torch

from align.training.logps import HeadOptions, TokenLogProbs, per_response, token_logprobs


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
        lambda h, w, b: token_logprobs(h, w, b, targets, HeadOptions(chunk)).logprobs,
    ):
        mine = [t.clone().requires_grad_() if t is not None else None for t in leaves]
        out = function(*mine)
        (out * upstream).sum().backward()
        results.append([out, *(t.grad for t in mine if t is not None)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_frozen_head_gets_no_gradient_and_the_hidden_state_does() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(6, 4)
    token_logprobs(hidden, weight, None, torch.tensor([0, 1, 2]), HeadOptions(2)).logprobs.sum().backward()
    expected = torch.autograd.grad(full(hidden, weight, None, torch.tensor([0, 1, 2])).sum(), hidden)[0]
    torch.testing.assert_close(hidden.grad, expected, rtol=0, atol=1e-6)


def test_entropy_by_hand() -> None:
    """A head that says (1/2, 1/4, 1/4) has an entropy of 1.5 ln 2."""
    weight = torch.tensor([[0.5], [0.25], [0.25]]).log()
    found = token_logprobs(torch.ones(1, 1), weight, None, torch.tensor([1]), HeadOptions(4, entropy=True))
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
        token_logprobs(hidden, weight, None, targets, HeadOptions(4)).logprobs, expected, rtol=0, atol=1e-5
    )


def test_per_response_sums_and_its_gradient() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], requires_grad=True)
    sums = per_response(values, torch.tensor([2, 3]))
    assert sums.tolist() == [3.0, 12.0]
    (sums * torch.tensor([10.0, -1.0])).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [10.0, 10.0, -1.0, -1.0, -1.0]


def plain(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, y: torch.Tensor, tau: float) -> TokenLogProbs:
    """All fields by torch's own functions on whole logits."""
    logs = (torch.nn.functional.linear(h, w, b) / tau).log_softmax(-1)
    return TokenLogProbs(
        logs.gather(1, y[:, None]).squeeze(1), -(logs.exp() * logs).sum(-1), (2.0 * logs).logsumexp(-1)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [2, 3, 100])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_temperature_entropy_and_squares_equal_plain_torch_gradients_included(
    dtype: torch.dtype, chunk: int, with_bias: bool, temperature: float
) -> None:
    torch.manual_seed(1)
    leaves = [torch.randn(7, 5).to(dtype), torch.randn(11, 5).to(dtype), torch.randn(11).to(dtype)]
    targets, of_logprob, of_entropy = torch.randint(0, 11, (7,)), torch.randn(7), torch.randn(7)
    options = HeadOptions(chunk, temperature, entropy=True, squares=True)
    results = []
    for function in (
        lambda h, w, b: plain(h, w, b, targets, temperature),
        lambda h, w, b: token_logprobs(h, w, b, targets, options),
    ):
        mine = [t.clone().requires_grad_() if with_bias or t.ndim > 1 else None for t in leaves]
        out = function(*mine)
        assert out.entropies is not None
        (out.logprobs * of_logprob + out.entropies * of_entropy).sum().backward()
        results.append([out.logprobs, out.entropies, out.squares, *(t.grad for t in mine if t is not None)])
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    for expected, found in zip(*results, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk", [2, 100])
def test_the_gradient_of_the_entropy_alone_and_of_a_certain_token(chunk: int) -> None:
    """One logit far above the others: its entropy and the gradient are 0, not nan."""
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[2000.0, 0.3], [0.0, 1.1], [-2000.0, -0.4]], dtype=torch.float64)
    targets = torch.tensor([0, 1, 2])
    found = token_logprobs(hidden, weight, None, targets, HeadOptions(chunk, entropy=True, squares=True))
    assert found.entropies is not None and found.squares is not None
    assert found.entropies[0] == 0 and found.squares[0] == 0
    assert not found.squares.requires_grad
    found.entropies[:2].sum().backward()
    copy = hidden.detach()[1:2].clone().requires_grad_()
    reference = plain(copy, weight, None, targets[1:2], 1.0).entropies
    assert reference is not None
    reference.sum().backward()
    assert hidden.grad is not None and copy.grad is not None
    assert hidden.grad[0].tolist() == [0, 0] and hidden.grad[2].tolist() == [0, 0]
    torch.testing.assert_close(hidden.grad[1], copy.grad[0], rtol=1e-12, atol=1e-12)


def test_double_precision_passes_torchs_gradient_check() -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3), (6, 3), (6,))]
    options = HeadOptions(2, temperature=0.7, entropy=True)

    def values(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = token_logprobs(h, w, b, torch.tensor([0, 4, 2, 2, 5]), options)
        assert found.entropies is not None
        return found.logprobs, found.entropies

    assert torch.autograd.gradcheck(values, leaves, eps=1e-6, atol=1e-7)


def test_squares_by_hand() -> None:
    """A head that says (1/2, 1/4, 1/4): two draws agree with probability 3/8, and at temperature 1/2 with 1/2."""
    weight = torch.tensor([[0.5], [0.25], [0.25]]).log()
    for temperature, expected in ((1.0, 3 / 8), (0.5, 1 / 2)):  # at 1/2: (4, 1, 1)/6, squares (16 + 1 + 1)/36
        options = HeadOptions(4, temperature, squares=True)
        found = token_logprobs(torch.ones(1, 1), weight, None, torch.tensor([1]), options)
        assert found.entropies is None and found.squares is not None
        assert found.squares.exp().item() == pytest.approx(expected, abs=1e-6)
