"""Packed equals padded equals one by one, gradients included, on real architectures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from align.training import attention
from align.training.logps import HeadOptions, per_response
from align.training.model import PolicyNetwork, load_network
from align.training.packing import Group, pack

GROUPS = [
    Group((3, 4, 5, 6, 7), ((8, 9, 1), (10, 1), (8, 9, 9, 9, 1))),
    Group((5, 5), ((4, 4, 4), (6, 1))),
    Group((9,), ((1,), (3, 8))),
]


@pytest.fixture(scope="module", params=["qwen3", "llama", "qwen2", "mistral", "olmo2"])
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A grouped-query model of each kind, loaded as the engine loads one; olmo2 has layers that are never trimmed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = dict(
        vocab_size=24, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    no_window = {"sliding_window": None} if request.param == "mistral" else {}
    tied = request.param == "qwen3"
    config = AutoConfig.for_model(request.param, tie_word_embeddings=tied, **shape, **no_window)
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp(request.param)
    fresh = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in fresh.parameters():  # no bias of 0 and no scale of 1: each has to be applied
            parameter += 0.1 * torch.randn_like(parameter)
    fresh.save_pretrained(directory)
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


def test_the_last_layer_computes_only_what_the_head_reads(network: Any) -> None:
    """12 of 22 positions are read: not the beginnings of the prompts, and not the last token of any response."""
    (batch,) = pack(GROUPS[:2], 1000)
    seen: list[torch.Size] = []
    layers = network.base_model.layers
    hooks = [layer.mlp.register_forward_hook(lambda m, inputs, out: seen.append(inputs[0].shape)) for layer in layers]
    PolicyNetwork(network)(batch, HeadOptions(chunk=4))
    for hook in hooks:
        hook.remove()
    read = len({*batch.read_from.tolist()})
    positions = batch.input_ids.numel()
    trimmed = network.config.model_type != "olmo2"
    assert read == 12
    assert [shape[:-1].numel() for shape in seen] == [positions, read if trimmed else positions]


def test_gradient_checkpointing_changes_nothing(network: Any) -> None:
    (batch,) = pack(GROUPS, 1000)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            network.gradient_checkpointing_enable({"use_reentrant": False})
            network.train()
        network.zero_grad()
        logprobs, *_ = PolicyNetwork(network)(batch, HeadOptions(chunk=4))
        logprobs.square().sum().backward()
        found.append([p.grad.clone() for p in network.parameters()])
    network.gradient_checkpointing_disable()
    network.eval()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
