"""Half fine-tuning: which half, by hand on the names of a real architecture."""

from __future__ import annotations

from collections import Counter

import pytest

from align.training.freezing import frozen_names

ALWAYS = frozenset({"model.embed_tokens.weight"})


def shape(layers: int, mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")) -> dict[str, int]:
    """Names and dimensions of a small Llama-like network with biases on Q, K and V."""
    found = {"model.embed_tokens.weight": 2, "model.norm.weight": 1}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        found |= {f"{at}.self_attn.{m}_proj.weight": 2 for m in "qkvo"} | {f"{at}.mlp.{m}.weight": 2 for m in mlp}
        found |= {f"{at}.self_attn.{m}_proj.bias": 1 for m in "qkv"}
        found |= {f"{at}.{n}.weight": 1 for n in ("input_layernorm", "post_attention_layernorm")}
    return found


def per_layer(frozen: frozenset[str], part: str) -> Counter[str]:
    return Counter(n.split(".")[2] for n in frozen if f".{part}." in n and n.endswith("weight"))


@pytest.mark.parametrize("round_index", range(5))
def test_two_of_four_and_one_or_two_of_three(round_index: int) -> None:
    layers = 6
    frozen = frozen_names(shape(layers), ALWAYS, seed=0, round_index=round_index)
    assert per_layer(frozen, "self_attn") == {str(i): 2 for i in range(layers)}
    assert sorted(per_layer(frozen, "mlp").values()) == [1, 1, 1, 2, 2, 2]
    norms = [n for n in frozen if "norm" in n]
    assert len(norms) in (6, 7)  # of 13
    assert not frozen & ALWAYS


def test_a_bias_goes_with_its_matrix() -> None:
    frozen = frozen_names(shape(6), ALWAYS, 0, 0)
    for name in shape(6):
        if name.endswith(".bias"):
            assert (name in frozen) == (name.replace(".bias", ".weight") in frozen)


def test_an_odd_number_of_layers_and_a_plain_feed_forward_part() -> None:
    """Of 5 layers the odd third matrix is frozen in 2 or 3; of 2 matrices always one is."""
    more = {sorted(per_layer(frozen_names(shape(5), ALWAYS, 0, r), "mlp").values()).count(2) for r in range(20)}
    assert more == {2, 3}
    plain = frozen_names(shape(4, mlp=("fc1", "fc2")), ALWAYS, 0, 0)
    assert set(per_layer(plain, "mlp").values()) == {1} and len(per_layer(plain, "mlp")) == 4


def test_every_round_and_seed_draws_its_own_half_again_and_again_alike() -> None:
    halves = [frozen_names(shape(6), ALWAYS, seed, r) for seed in (0, 1) for r in range(3)]
    assert len(set(halves)) == 6
    assert halves == [frozen_names(shape(6), ALWAYS, seed, r) for seed in (0, 1) for r in range(3)]


def test_over_many_rounds_every_weight_has_its_turn() -> None:
    frozen = Counter(n for r in range(200) for n in frozen_names(shape(2), ALWAYS, 0, r))
    assert set(frozen) == set(shape(2)) - ALWAYS
    assert all(60 <= count <= 140 for count in frozen.values())
