"""Packed equals padded equals one by one, gradients included, on real architectures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from align.training import attention
from align.training.groups import Group, pack
from align.training.logps import HeadOptions, per_response
from align.training.model import PolicyNetwork, load_network

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
        logprobs, *_ = PolicyNetwork(network)(batch, HeadOptions(chunk=4))
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
