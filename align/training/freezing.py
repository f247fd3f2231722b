"""Half fine-tuning: every round trains another half of the network and leaves the rest bit for bit as it is.

Frozen are, drawn anew for every round (HFT, arXiv 2404.18466, category level): of each layer's attention 2 of the 4
matrices Q, K, V, O; of its feed-forward part 2 of the 3 matrices in half of the layers and 1 of 3 in the others; half
of the norms.  Embeddings and head are always trained.  Other architectures are cut alike: of n matrices floor(n / 2)
are frozen, and where n is odd one more in half of the layers.  A bias goes with its matrix.

The optimizer of a round holds state for what that round trains and for nothing else.  All of it begins at zero in
every round, also for a tensor that was trained in the round before: rounds are separate trainings to the optimizer,
as they are in the paper.  In half precision the float32 weights of the optimizer are made from the policy's at the
same moment, so what a round moved by less than their rounding is lost at its end.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

_LAYER = re.compile(r"^(.*?\.\d+)\.(.+)$")
_ATTENTION = re.compile(r"attn|attention")


def frozen_names(parameters: Mapping[str, int], always: frozenset[str], seed: int, round_index: int) -> frozenset[str]:
    """The parameters that a round leaves as they are.

    `parameters` are names and numbers of dimensions, `always` the names that every round trains.

    Example: of {"layers.0.attn.q.weight": 2, …k, …v, …o} two names.
    """
    modules: dict[str, list[str]] = {}
    for name in sorted(set(parameters) - always):
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    norms: list[str] = []
    blocks: dict[str, dict[str, list[str]]] = {"attention": {}, "feed_forward": {}}
    for module, names in modules.items():
        place = _LAYER.match(module)
        if all(parameters[name] < 2 for name in names):
            norms.append(module)
        elif place is not None:
            kind = "attention" if _ATTENTION.search(place[2]) else "feed_forward"
            blocks[kind].setdefault(place[1], []).append(module)
    rng = random.Random(f"freeze/{seed}/{round_index}")
    frozen = set(_half(norms, rng))
    for layers in blocks.values():
        more = set(_half(sorted(layers), rng))  # where the odd one is frozen too
        for layer in sorted(layers):
            members = layers[layer]
            odd_one = len(members) % 2 and layer in more
            frozen |= set(rng.sample(members, len(members) // 2 + bool(odd_one)))
    return frozenset(name for module in frozen for name in modules[module])


def _half(names: list[str], rng: random.Random) -> list[str]:
    """Half of the names; where their number is odd, a coin decides of which half the odd one is."""
    return rng.sample(names, len(names) // 2 + (len(names) % 2 and rng.randrange(2)))


def freeze_half(network: Any, seed: int, round_index: int) -> frozenset[str]:
    """Set `requires_grad` all over the network for one round; returns the names of what is frozen.

    Every rank draws the same.
    """
    ends = (network.get_input_embeddings(), network.get_output_embeddings())
    always = {id(p) for end in ends for p in end.parameters()}
    named = dict(network.named_parameters())
    chosen = frozen_names(
        {name: _dimensions(p) for name, p in named.items()},
        frozenset(name for name, p in named.items() if id(p) in always),
        seed,
        round_index,
    )
    for name, parameter in named.items():
        parameter.requires_grad_(name not in chosen)
    return chosen


def _dimensions(parameter: nn.Parameter) -> int:
    """Of the whole tensor; ZeRO-3 leaves a flat rest of it in place."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
