"""Between the first forward of a step and its one reduction nothing waits for the device.

On a CPU there is no device to wait for, but the operations that would wait are the same: a scalar read out of a tensor,
and results whose size depends on values.  The CPU's own attention mask is cut on the host from the layout; a GPU's is
FlexAttention's, so the test takes the mask out of the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from align.recipe import Recipe
from align.records import Pair
from align.training import attention, trunk
from align.training.logps import HeadOptions, TokenLogProbs
from align.training.model import PolicyNetwork
from align.training.packing import Group, PackedBatch, pack
from align.training.preference import PairRow, PreferenceObjective
from align.training.rl_objectives import Columns, ResponseRow, TokenObjective
from align.training.rollouts import Estimates
from align.training.steps import Unit, train_step

aten = torch.ops.aten
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten.unique_dim}


class Refusing(TorchDispatchMode):
    """Fails on what a GPU would have to be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in WAITING, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def _refuse_numbers(tensor: torch.Tensor) -> Any:
    """The layout's whole numbers lie on the host; what the network computed does not."""
    assert not tensor.is_floating_point(), "numbers of the device are read back"
    return torch._C.TensorBase.tolist(tensor)


class Engine:
    """What `train_step` asks of an engine, around a real network, with the watch between forward and reduction."""

    def __init__(self, network: Any, budget: int) -> None:
        self.network = PolicyNetwork(network)
        self.recipe: Any = SimpleNamespace(training=SimpleNamespace(tokens_per_batch=budget))
        self.ranks = SimpleNamespace(world_size=1, rank=0)
        self.trainer_state: dict[str, Any] = {}
        self.device, self.token_multiple = torch.device("cpu"), 1
        self.step, self.learning_rate = 0, 1e-3
        self.watch: Refusing | None = None
        self.backwards = 0

    def forward(self, batch: PackedBatch, **options: Any) -> TokenLogProbs:
        if self.watch is None:
            self.watch = Refusing()
            self.watch.__enter__()
            torch.Tensor.tolist = _refuse_numbers  # type: ignore[method-assign]  # it copies without an operation
        return TokenLogProbs(*self.network(batch, HeadOptions(5, **options)))

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()
        self.backwards += 1

    def gradient_square_sum(self) -> torch.Tensor:
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        return torch.stack([g.double().square().sum() for g in gradients]).sum()

    def sum_over_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        self.end()
        return sums

    def end(self) -> None:
        """Stop watching."""
        if self.watch is not None:
            self.watch.__exit__(None, None, None)
            self.watch = None
            del torch.Tensor.tolist  # the one of its base class again

    def apply(self) -> bool:
        self.step += 1
        return True


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    attention.register()
    config = AutoConfig.for_model(
        "qwen3", vocab_size=24, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, attn_implementation=attention.ATTENTION)

    def on_the_host(build: Any) -> Any:
        @contextmanager
        def unwatched() -> Iterator[None]:
            with torch.utils._python_dispatch._disable_current_modes():
                yield

        def built(*args: Any) -> Any:
            with unwatched():
                return build(*args)

        return built

    monkeypatch.setattr(attention, "build_mask", on_the_host(attention.build_mask))
    monkeypatch.setattr(trunk, "_reading", on_the_host(trunk._reading))
    return made


GROUPS = [
    Group((3, 4, 5), ((6, 7, 1), (8, 1))),
    Group((9,), ((2, 1), (3, 1))),
    Group((5, 5), ((4, 1), (4, 4, 4, 1))),
]


def recipe_of(**training: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "n",
            "policy": {"model": "m", "dtype": "float32"},
            "verifiers": [{"kind": "repetition", "name": "r"}],
            "training": training,
        }
    )


def pairs_of(recipe: Recipe) -> tuple[Any, list[Unit[Any]]]:
    """The preference objective and a pair of each group."""
    samples: Any = {
        f"{g}-{r}": SimpleNamespace(response_ids=ids)
        for g, group in enumerate(GROUPS)
        for r, ids in enumerate(group.responses)
    }
    rows = [PairRow(Pair(f"{g}", f"p{g}", f"{g}-0", f"{g}-1", 0.9, 0.0, 1.0, 1.0, "test"), 0, 1) for g in range(3)]
    units = [Unit(group, (row,)) for group, row in zip(GROUPS, rows, strict=True)]
    return PreferenceObjective(recipe, {f"{g}": (-7.0, -8.0) for g in range(3)}, samples), units


def tokens_of(recipe: Recipe) -> tuple[Any, list[Unit[Any]]]:
    """The policy-gradient objective and every response."""
    lengths = [len(r) for group in GROUPS for r in group.responses]
    numbers = np.linspace(-3.0, -1.0, sum(lengths), dtype=np.float32)
    columns = Columns(numbers, numbers + 2.0, numbers, None, None, None)
    starts = np.cumsum(lengths) - lengths
    rows = [ResponseRow(str(k), k, int(starts[k])) for k in range(len(lengths))]
    units = [Unit(group, tuple(rows[2 * g : 2 * g + 2])) for g, group in enumerate(GROUPS)]
    result = Estimates(columns.advantages, None, np.zeros(len(lengths)))
    return TokenObjective(recipe, columns, result, 0.1, None), units


CASES = {
    "dpo": (pairs_of, {"loss": {"name": "dpo"}}),
    "dpo with wpo": (pairs_of, {"loss": {"name": "dpo", "wpo": True}}),
    "grpo": (tokens_of, {"algorithm": "grpo", "rl": {"kl": {"place": "loss"}, "entropy_bonus": 0.01}}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_reads_nothing_back_before_its_one_reduction(network: Any, case: str) -> None:
    make, training = CASES[case]
    recipe = recipe_of(**training)
    objective, units = make(recipe)
    engine: Any = Engine(network, budget=12)
    try:
        row = train_step(engine, units, objective, recipe)
    finally:
        engine.end()
    assert engine.backwards > 1 and row["step"] == 1


def test_the_watch_sees_a_scalar_that_is_read(network: Any) -> None:
    batch = pack(GROUPS, 100)[0]
    engine = Engine(network, budget=12)
    try:
        found = engine.forward(batch)
        with pytest.raises(AssertionError, match="waits for the device"):
            found.logprobs.sum().item()
        with pytest.raises(AssertionError, match="read back"):
            found.logprobs.tolist()
    finally:
        engine.end()
    assert len(found.logprobs.tolist()) == 15
