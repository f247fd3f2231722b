"""A network under DeepSpeed: what the policy and the critic have in common.

Sharding, backward, the gradient's norm, the optimizer step, and looking at sequences batch by batch.  What a network
computes is its owner's to say: `align.training.engine` the policy, `align.training.critic` the critic.

Legend: N response tokens of a batch.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from align.errors import InputError
from align.recipe import Recipe
from align.training.deepspeed_config import deepspeed_config, effective_stage
from align.training.host_memory import keep_freed_memory
from align.training.packing import Group, PackedBatch, lay_out, plan_batches
from align.training.schedule import factor

if TYPE_CHECKING:
    from align.distributed import Ranks

Sequence_ = tuple[Sequence[int], Sequence[int]]  # prompt ids, response ids
FLEX_BLOCK = 128  # FlexAttention works in blocks of this many positions


def start_device(recipe: Recipe, ranks: Ranks) -> torch.device:
    """Make sure of the process group, and say where this rank computes.  Comes before anything is loaded."""
    if recipe.policy.dtype == "float16" and not torch.cuda.is_available():
        raise InputError("policy.dtype: DeepSpeed does not train in float16 on a CPU; use bfloat16 or float32")
    _start_process_group(ranks)
    if torch.cuda.is_available():
        return torch.device("cuda", ranks.local_rank)
    keep_freed_memory()
    return torch.device("cpu")


class ShardedModel:
    """One rank's share of a network that is trained; `step` counts its optimizer steps over the whole run.

    Every method that computes is collective: all ranks call it, each with its own work.
    """

    def __init__(
        self, network: torch.nn.Module, recipe: Recipe, ranks: Ranks, device: torch.device, total_steps: int
    ) -> None:
        self.recipe, self.ranks, self.device, self.total_steps = recipe, ranks, device, total_steps
        self.step = 0
        self.zero_stage = effective_stage(recipe.training, recipe.policy.dtype)
        self._wrapped = network
        self.engine = self._start_deepspeed()

    @property
    def peak_learning_rate(self) -> float:
        """What the schedule multiplies."""
        return self.recipe.training.learning_rate

    def _start_deepspeed(self) -> Any:
        import deepspeed

        training = self.recipe.training
        config = deepspeed_config(training, self.recipe.policy.dtype, self.ranks.world_size)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints memory tables
            engine, self.optimizer, _, _ = deepspeed.initialize(
                model=self._wrapped,
                optimizer=_adamw(self._wrapped, self.recipe, self.peak_learning_rate),
                config=config,
                dist_init_required=False,
            )
        if self.ranks.world_size == 1 and self.zero_stage == 0:
            engine.enable_backward_allreduce = False  # nothing to average; it would copy every gradient twice
        engine.train()
        return engine

    def restart(self) -> None:
        """Go on from the weights as they are with a new optimizer for what is trained now."""
        self.engine.destroy()
        self.engine = self._start_deepspeed()

    # ---- training --------------------------------------------------------------------------------------------

    @property
    def token_multiple(self) -> int:
        """Rows are padded to a multiple of this."""
        return FLEX_BLOCK if self.device.type == "cuda" else 1

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next optimizer step."""
        training = self.recipe.training
        return self.peak_learning_rate * factor(self.step, training.schedule, training.warmup_steps, self.total_steps)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add this micro-batch's gradient; `last` averages the sum over the ranks and makes it ready for `apply`.

        DeepSpeed divides by the number of ranks, so a loss that is a share of a global mean must be multiplied by it.
        Every rank must make the same number of calls.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    def gradient_square_sum(self) -> Tensor:
        """This rank's share of the squared norm of the averaged gradient, before clipping, as a float64 scalar.

        The shares add up to the whole over the ranks; not finite where any gradient is not.
        """
        squares = [g.double().square().sum() for g in self._averaged_gradients() if g is not None and g.numel()]
        total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
        replicated = self.ranks.world_size if self.zero_stage == 0 else 1
        return total.to(self.device) / replicated / self._loss_scale() ** 2

    def _loss_scale(self) -> float:
        return float(getattr(self.optimizer, "loss_scale", 1.0)) if self.recipe.policy.dtype == "float16" else 1.0

    def _averaged_gradients(self) -> Iterator[Tensor | None]:
        """Where DeepSpeed keeps the reduced gradient between the last backward and the step, by stage."""
        if self.zero_stage == 0:
            yield from (p.grad for p in self._wrapped.parameters())
        elif hasattr(self.optimizer, "fp32_groups_gradient_flat_partition"):  # DeepSpeed's BF16_Optimizer
            yield from self.optimizer.fp32_groups_gradient_flat_partition
        elif self.recipe.training.offload != "none":
            flat = "fp32_partitioned_groups_flat" if self.zero_stage == 3 else "single_partition_of_fp32_groups"
            yield from (p.grad for p in getattr(self.optimizer, flat))
        else:
            for part in self.optimizer.averaged_gradients.values():
                yield from ([part] if isinstance(part, Tensor) else part or ())

    def apply(self) -> bool:
        """Clip, step and clear the gradients; False where float16 overflowed and DeepSpeed skipped the step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.engine.step()
        self.step += 1
        return bool(self.engine.was_step_applied())

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The element-wise sum of every rank's values."""
        if self.ranks.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    def max_over_ranks(self, values: Tensor) -> Tensor:
        """The element-wise maximum of every rank's values."""
        if self.ranks.world_size > 1:
            torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
        return values

    # ---- looking at sequences ---------------------------------------------------------------------------------

    def visit(
        self, sequences: Sequence[Sequence_], compute: Callable[[PackedBatch], Sequence[Tensor | None]], columns: int
    ) -> list[list[np.ndarray]]:
        """[columns][sequence] what `compute` says of the tokens of each sequence's response, in the order asked for.

        Sequences with the same prompt share its computation.  `compute` is called as often on every rank.
        """
        found = [[np.zeros(0, np.float32) for _ in sequences] for _ in range(columns)]
        groups, places = _group_by_prompt(sequences, self.recipe.training.tokens_per_batch)
        missing = self._missing_forwards(groups)  # asked before the first forward: ZeRO-3 gathers weights inside each
        for batch in self._batches(groups):
            cuts = np.cumsum(batch.lengths.numpy())[:-1]
            for values, out in zip(compute(batch.to(self.device))[:columns], found, strict=True):
                if values is not None:
                    for (g, r), part in zip(batch.members, np.split(values.cpu().numpy(), cuts), strict=True):
                        out[places[g][r]] = part
        for _ in range(missing):
            compute(dummy_batch().to(self.device))
        return found

    def _batches(self, groups: Sequence[Group]) -> Iterator[PackedBatch]:
        for plan in plan_batches(groups, self.recipe.training.tokens_per_batch, self.token_multiple):
            yield lay_out(groups, plan)

    def _missing_forwards(self, groups: Sequence[Group]) -> int:
        """How many forwards the busiest rank makes more than this one; ZeRO-3 gathers weights in each of them."""
        if self.zero_stage != 3 or self.ranks.world_size == 1:
            return 0
        mine = len(plan_batches(groups, self.recipe.training.tokens_per_batch, self.token_multiple))
        return max(self.ranks.gather(mine, "forwards")) - mine

    def close(self) -> None:
        """Free what DeepSpeed holds.  The process group stays: it belongs to the process, and others use it."""
        if hasattr(self.engine, "destroy"):
            self.engine.destroy()
        self.engine = self.optimizer = None


def dummy_batch() -> PackedBatch:
    """The smallest batch: what a rank without work computes so that the collectives of ZeRO stay in step."""
    groups = [Group((0,), ((0,),))]
    return lay_out(groups, plan_batches(groups, 2)[0])


def _group_by_prompt(sequences: Sequence[Sequence_], token_budget: int) -> tuple[list[Group], list[list[int]]]:
    """Groups of sequences that share a prompt, and for each group the places of its sequences in the input.

    A prompt's responses are split over several groups where together they exceed the budget.  A sequence without a
    response has no log-probabilities and is left out.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, (prompt, response) in enumerate(sequences):
        if len(response):
            by_prompt.setdefault(tuple(prompt), []).append(i)
    groups: list[Group] = []
    places: list[list[int]] = []
    for prompt, members in by_prompt.items():
        start, used = 0, len(prompt)
        for end, i in enumerate(members):
            size = len(sequences[i][1])
            if end > start and used + size > token_budget:
                places.append(members[start:end])
                start, used = end, len(prompt)
            used += size
        places.append(members[start:])
    for members in places:
        prompt = tuple(sequences[members[0]][0])
        groups.append(Group(prompt, tuple(tuple(sequences[i][1]) for i in members)))
    return groups, places


def _adamw(network: torch.nn.Module, recipe: Recipe, learning_rate: float) -> torch.optim.AdamW:
    """AdamW over what is trained; vectors (norms, biases) are not decayed."""
    training = recipe.training
    trained = [p for p in network.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": trained, "weight_decay": 0.0}]
    if training.weight_decay > 0:
        matrices = [p for p in trained if p.ndim > 1]
        groups = [
            {"params": matrices, "weight_decay": training.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=learning_rate,
        betas=training.adam_betas,
        eps=training.adam_epsilon,
        fused=True,
    )


def _start_process_group(ranks: Ranks) -> None:
    """Make sure that torch.distributed and DeepSpeed's view of it exist.

    One process alone gets a group without any network address: DeepSpeed wants a group, and nobody is to be reached.
    It lives as long as the process, because DeepSpeed remembers it, and is destroyed at exit, where a ZeRO-3 process
    aborts otherwise.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed looks when it is imported
    if not torch.distributed.is_initialized():
        assert ranks.world_size == 1, "align.distributed.connect makes the process group of several ranks"
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
        atexit.register(_destroy_process_group)
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed 0.19 calls collectives under names that torch 2.13 is about to drop, once per tensor.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))  # deepspeed.initialize insists on it
    # DeepSpeed would compile a shared-memory all-reduce for inference here, and fail where there is no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False)


def _destroy_process_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
