"""Chunked log-probabilities against log_softmax, gradients included; packed against padded against one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from align.training import attention
from align.training.groups import Group, pack
from align.training.logps import per_response, token_logprobs
from align.training.model import PolicyNetwork, load_network


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


GROUPS = [
    Group((3, 4, 5, 6, 7), ((8, 9, 1), (10, 1), (8, 9, 9, 9, 1))),
    Group((5, 5), ((4, 4, 4), (6, 1))),
    Group((9,), ((1,), (3, 8))),
]


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A grouped-query model of each of two architectures, loaded from disk as the engine loads one."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    shape = dict(
        vocab_size=24, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    config = (Qwen3Config if request.param == "qwen3" else LlamaConfig)(
        **shape, tie_word_embeddings=request.param == "qwen3"
    )
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return load_network(directory, "float32")


def packed_sums(network: Any, groups: list[Group], budget: int) -> dict[tuple[int, int], torch.Tensor]:
    sums = {}
    for batch in pack(groups, budget):
        logprobs, _ = PolicyNetwork(network)(batch, 4)
        sums.update(zip(batch.members, per_response(logprobs, batch.lengths), strict=True))
    return sums


def one_by_one_sums(network: Any, groups: list[Group]) -> dict[tuple[int, int], torch.Tensor]:
    """Each sequence alone through the model's own forward, with its own causal mask: the definition."""
    sums = {}
    network.set_attn_implementation("sdpa")
    for g, group in enumerate(groups):
        for r, response in enumerate(group.responses):
            ids = torch.tensor([group.prompt + response])
            logits = network(input_ids=ids, use_cache=False).logits[0, len(group.prompt) - 1 : -1].float()
            sums[g, r] = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()
    network.set_attn_implementation(attention.ATTENTION)
    return sums


def padded_sums(network: Any, groups: list[Group]) -> dict[tuple[int, int], torch.Tensor]:
    """All sequences in one right-padded batch, as TRL computes them."""
    network.set_attn_implementation("sdpa")
    members = [(g, r) for g, group in enumerate(groups) for r in range(len(group.responses))]
    rows = [groups[g].prompt + groups[g].responses[r] for g, r in members]
    width = max(map(len, rows))
    ids = torch.tensor([row + (0,) * (width - len(row)) for row in rows])
    kept = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    logprobs = network(input_ids=ids, attention_mask=kept, use_cache=False).logits.float().log_softmax(-1)
    network.set_attn_implementation(attention.ATTENTION)
    sums = {}
    for i, (g, r) in enumerate(members):
        start, response = len(groups[g].prompt) - 1, torch.tensor(groups[g].responses[r])
        sums[g, r] = logprobs[i, start : start + len(response)].gather(1, response[:, None]).sum()
    return sums


@pytest.mark.parametrize("budget", [1, 14, 30, 1000])
def test_packed_equals_padded_equals_one_by_one_gradients_included(network: Any, budget: int) -> None:
    weights = {(g, r): 0.3 * g - 0.5 * r + 0.1 for g, group in enumerate(GROUPS) for r in range(len(group.responses))}
    found = []
    for compute in (
        lambda: packed_sums(network, GROUPS, budget),
        lambda: one_by_one_sums(network, GROUPS),
        lambda: padded_sums(network, GROUPS),
    ):
        network.zero_grad()
        sums = compute()
        torch.stack([weights[k] * sums[k] for k in sorted(weights)]).sum().backward()
        found.append((sums, {n: p.grad.clone() for n, p in network.named_parameters()}))
    (sums, gradients), *others = found
    for other_sums, other_gradients in others:
        for member in weights:
            torch.testing.assert_close(sums[member], other_sums[member], rtol=0, atol=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, other_gradients[name], rtol=0, atol=1e-5, msg=name)


def test_a_response_does_not_change_its_neighbours(network: Any) -> None:
    group = GROUPS[0]
    alone = packed_sums(network, [Group(group.prompt, group.responses[:1])], 100)[0, 0]
    beside = packed_sums(network, [group, GROUPS[1]], 100)[0, 0]
    torch.testing.assert_close(alone, beside, rtol=0, atol=1e-5)
