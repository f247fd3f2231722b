"""The policy under DeepSpeed: forward, backward and step; log-probabilities; weights out; checkpoints.

This file drives DeepSpeed and knows no preference loss; `align.training.preference` knows the loss and no DeepSpeed.

Memory per rank beyond the sharded training state: the frozen initial model (in the policy's dtype, sharded under
ZeRO-3, absent with LoRA, loaded when it is first asked for).

Legend: N response tokens of a batch, K responses.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from align.errors import InputError
from align.recipe import Recipe
from align.training import checkpoint, model, weights_view
from align.training.deepspeed_config import deepspeed_config, effective_stage, reference_config
from align.training.groups import Group, PackedBatch, lay_out, plan_batches
from align.training.logps import HeadOptions, TokenLogProbs
from align.training.schedule import factor

if TYPE_CHECKING:
    from align.distributed import Ranks

Sequence_ = tuple[Sequence[int], Sequence[int]]  # prompt ids, response ids
FLEX_BLOCK = 128  # FlexAttention works in blocks of this many positions


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Per sequence, in the order asked for: [T] float32 log-probabilities, and entropies in nats where asked for."""

    logprobs: list[np.ndarray]
    entropies: list[np.ndarray] | None


class PolicyEngine:
    """One rank's share of the policy.

    `version` counts rounds of training and is the loop's to set; `step` counts optimizer steps over the whole run.
    Every method that computes is collective: all ranks call it, each with its own work.
    """

    def __init__(self, model_dir: Path, recipe: Recipe, ranks: Ranks, total_steps: int) -> None:
        self.recipe, self.ranks, self.total_steps = recipe, ranks, total_steps
        self.model_dir = Path(model_dir)
        self.version = 0
        self.step = 0
        self.trainer_state: dict[str, Any] = {}  # what a trainer must remember over a restart; plain JSON
        if recipe.policy.dtype == "float16" and not torch.cuda.is_available():
            raise InputError("policy.dtype: DeepSpeed does not train in float16 on a CPU; use bfloat16 or float32")
        _start_process_group(ranks)
        self.device = torch.device("cuda", ranks.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        training, policy = recipe.training, recipe.policy
        self.zero_stage = effective_stage(training, policy.dtype)
        self._reference: Any = None

        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(self.model_dir)
        torch.manual_seed(recipe.seed)  # adapters start alike on every rank
        network = model.load_network(self.model_dir, policy.dtype, training.gradient_checkpointing)
        base = policy.model or str(model_dir)  # as the recipe names it: an adapter travels, a local path does not
        self.peft = model.add_lora(network, policy.lora, base) if policy.lora is not None else None
        self.model = network
        self.vocabulary_size = network.get_input_embeddings().num_embeddings
        self._wrapped = model.PolicyNetwork(network)
        self.engine = self._start_deepspeed()

    def _start_deepspeed(self) -> Any:
        import deepspeed

        training = self.recipe.training
        config = deepspeed_config(training, self.recipe.policy.dtype, self.ranks.world_size)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints memory tables
            engine, self.optimizer, _, _ = deepspeed.initialize(
                model=self._wrapped,
                optimizer=_adamw(self._wrapped, self.recipe),
                config=config,
                dist_init_required=False,
            )
        if self.ranks.world_size == 1 and self.zero_stage == 0:
            engine.enable_backward_allreduce = False  # nothing to average; it would copy every gradient twice
        engine.train()
        return engine

    # ---- training --------------------------------------------------------------------------------------------

    @property
    def token_multiple(self) -> int:
        """Rows are padded to a multiple of this."""
        return FLEX_BLOCK if self.device.type == "cuda" else 1

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next optimizer step."""
        training = self.recipe.training
        return training.learning_rate * factor(self.step, training.schedule, training.warmup_steps, self.total_steps)

    def forward(
        self, batch: PackedBatch, *, entropy: bool = False, squares: bool = False, temperature: float = 1.0
    ) -> TokenLogProbs:
        """What the head says of a batch's response tokens under the policy; carries a gradient unless that is off.

        The temperature divides the logits; see TokenLogProbs for the rest.
        """
        options = HeadOptions(self.recipe.training.logit_chunk_tokens, temperature, entropy, squares)
        return TokenLogProbs(*self.engine(batch.to(self.device), options))

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

    # ---- looking at sequences ---------------------------------------------------------------------------------

    def token_logprobs(
        self,
        sequences: Sequence[Sequence_],
        reference: bool = False,
        entropy: bool = False,
        temperature: float = 1.0,
    ) -> TokenStats:
        """Log-probabilities of each sequence's response under the policy, or under the initial policy.

        The temperature divides the logits of either.  Sequences with the same prompt share its computation.
        Collective; each rank asks for its own sequences.
        """
        options = HeadOptions(self.recipe.training.logit_chunk_tokens, temperature, entropy)
        logprobs = [np.zeros(0, np.float32) for _ in sequences]
        entropies = [np.zeros(0, np.float32) for _ in sequences] if entropy else None
        groups, places = _group_by_prompt(sequences, self.recipe.training.tokens_per_batch)
        missing = self._missing_forwards(groups)  # asked before the first forward: ZeRO-3 gathers weights inside each
        with self._evaluating(reference) as evaluate:
            for batch in self._batches(groups):
                found = evaluate(batch.to(self.device), options)[:2]
                cuts = np.cumsum(batch.lengths.numpy())[:-1]
                for values, out in zip(found, (logprobs, entropies), strict=True):
                    if values is not None and out is not None:
                        for (g, r), part in zip(batch.members, np.split(values.cpu().numpy(), cuts), strict=True):
                            out[places[g][r]] = part
            for _ in range(missing):
                evaluate(dummy_batch().to(self.device), options)
        return TokenStats(logprobs, entropies)

    def _batches(self, groups: Sequence[Group]) -> Iterator[PackedBatch]:
        for plan in plan_batches(groups, self.recipe.training.tokens_per_batch, self.token_multiple):
            yield lay_out(groups, plan)

    def _missing_forwards(self, groups: Sequence[Group]) -> int:
        """How many forwards the busiest rank makes more than this one; ZeRO-3 gathers weights in each of them."""
        if self.zero_stage != 3 or self.ranks.world_size == 1:
            return 0
        mine = len(plan_batches(groups, self.recipe.training.tokens_per_batch, self.token_multiple))
        return max(self.ranks.gather(mine, "forwards")) - mine

    @contextmanager
    def _evaluating(self, reference: bool) -> Iterator[Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]]:
        """The policy, or the policy as it was before the first round, without gradients."""
        if not reference:
            with model.frozen(self._wrapped):
                yield self.engine
        elif self.peft is not None:
            with model.frozen(self._wrapped), self.peft.disable_adapter():
                yield self.engine
        else:
            if self._reference is None:
                self._reference = self._load_reference()
            with torch.no_grad():
                yield self._reference

    def _load_reference(self) -> Any:
        """A frozen copy of the initial policy, sharded under ZeRO-3."""
        policy, training = self.recipe.policy, self.recipe.training
        network = model.PolicyNetwork(model.load_network(self.model_dir, policy.dtype)).eval().requires_grad_(False)
        if self.zero_stage != 3:
            return network.to(self.device)
        import deepspeed

        config = reference_config(training, policy.dtype, self.ranks.world_size)
        engine, *_ = deepspeed.initialize(model=network, config=config, dist_init_required=False)
        engine.eval()
        return engine

    # ---- weights and checkpoints ------------------------------------------------------------------------------

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor) of every weight as the policy stands, adapters merged.  Collective."""
        return weights_view.named_weights(self.model)

    def save(self, directory: Path) -> None:
        """Write everything that training needs to go on bitwise into an existing directory.  Collective."""
        checkpoint.save(self, Path(directory))

    def load(self, directory: Path) -> None:
        """Go on from what `save` wrote.  Collective.

        DeepSpeed's files are pickles: only a checkpoint of this run whose hashes were verified may come here.
        """
        checkpoint.load(self, Path(directory))

    def save_pretrained(self, directory: Path, lora: str = "merge") -> None:
        """Write a Hugging Face directory: safetensors, configurations, tokenizer.  Collective."""
        checkpoint.save_pretrained(self, Path(directory), lora)

    def close(self) -> None:
        """Free what DeepSpeed holds.  The process group stays: it belongs to the process, and others use it."""
        for engine in (self._reference, self.engine):
            if hasattr(engine, "destroy"):
                engine.destroy()
        self._reference = self.engine = self.optimizer = None


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


def _adamw(network: torch.nn.Module, recipe: Recipe) -> torch.optim.AdamW:
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
        lr=training.learning_rate,
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
