"""The policy under DeepSpeed: forward, backward and step; log-probabilities; weights out; checkpoints.

This file drives DeepSpeed and knows no preference loss; `align.training.preference` knows the loss and no DeepSpeed.

Memory per rank beyond the sharded training state: the frozen initial model (in the policy's dtype, sharded under
ZeRO-3, absent with LoRA, loaded when it is first asked for), and once more with TR-DPO.

Legend: N response tokens of a batch, K responses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from align.recipe import Recipe
from align.training import checkpoint, freezing, model, moving_reference, weights_view
from align.training.deepspeed_config import reference_config
from align.training.exact_kl import OtherHead
from align.training.logps import HeadOptions, TokenLogProbs
from align.training.packing import PackedBatch
from align.training.sharded import FLEX_BLOCK, Sequence_, ShardedModel, dummy_batch, start_device

if TYPE_CHECKING:
    from align.distributed import Ranks
    from align.training.critic import CriticEngine

__all__ = ["FLEX_BLOCK", "PolicyEngine", "TokenStats", "dummy_batch"]


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Per sequence, in the order asked for: [T] float32 log-probabilities, and entropies in nats where asked for."""

    logprobs: list[np.ndarray]
    entropies: list[np.ndarray] | None


class PolicyEngine(ShardedModel):
    """One rank's share of the policy.

    `version` counts rounds of training and is the loop's to set; `step` counts optimizer steps over the whole run.
    Every method that computes is collective: all ranks call it, each with its own work.
    """

    def __init__(self, model_dir: Path, recipe: Recipe, ranks: Ranks, total_steps: int) -> None:
        device = start_device(recipe, ranks)
        self.model_dir = Path(model_dir)
        self.version = 0
        self.trainer_state: dict[str, Any] = {}  # what a trainer must remember over a restart; plain JSON
        training, policy = recipe.training, recipe.policy
        self._reference: Any = None
        self.moving_reference: Any = None  # TR-DPO's, once it has left the initial policy

        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(self.model_dir)
        torch.manual_seed(recipe.seed)  # adapters start alike on every rank
        network = model.load_network(self.model_dir, policy.dtype, training.gradient_checkpointing)
        base = policy.model or str(model_dir)  # as the recipe names it: an adapter travels, a local path does not
        self.peft = model.add_lora(network, policy.lora, base) if policy.lora is not None else None
        self.model = network
        self.vocabulary_size = network.get_input_embeddings().num_embeddings
        self.frozen: frozenset[str] = frozenset()  # names of weights that this round leaves as they are
        if training.freeze == "half":
            self._freeze(0, recipe.seed)
        super().__init__(model.PolicyNetwork(network), recipe, ranks, device, total_steps)
        self.critic: CriticEngine | None = None
        if training.trainer.critic:
            from align.training.critic import CriticEngine

            self.critic = CriticEngine(self.model_dir, recipe, ranks, device, total_steps)

    # ---- training --------------------------------------------------------------------------------------------

    def begin_round(self, round_index: int) -> None:
        """Before a round's first step: what it trains, where the recipe freezes half.  Collective.

        Another half means another optimizer, whose state begins at zero; see `align.training.freezing`.
        """
        if self.recipe.training.freeze == "half" and self.trainer_state["frozen_for"] != round_index:
            self._freeze(round_index, self.recipe.seed)
            self.restart()

    def _freeze(self, round_index: int, seed: int) -> None:
        self.frozen = freezing.freeze_half(self.model, seed, round_index)
        self.trainer_state["frozen_for"] = round_index

    def forward(
        self,
        batch: PackedBatch,
        *,
        entropy: bool = False,
        squares: bool = False,
        temperature: float = 1.0,
        divergence: bool = False,
    ) -> TokenLogProbs:
        """What the head says of a batch's response tokens under the policy; carries a gradient unless that is off.

        The temperature divides the logits; see TokenLogProbs for the rest.  `divergence` is from the initial policy.
        """
        batch = batch.to(self.device)
        other = self._initial_head(batch) if divergence else None
        options = HeadOptions(self.recipe.training.logit_chunk_tokens, temperature, entropy, squares, other)
        return TokenLogProbs(*self.engine(batch, options))

    def _initial_head(self, batch: PackedBatch) -> OtherHead:
        """The initial policy's next-token distributions, as hidden states and a head."""
        assert self.zero_stage != 3, "under ZeRO-3 no rank has a whole head"
        with self._evaluating(reference=True):
            network: Any = self._wrapped if self.peft is not None else self._reference
            return OtherHead(network.states(batch), network.head.weight.detach(), _detached(network.head.bias))

    # ---- looking at sequences ---------------------------------------------------------------------------------

    def token_logprobs(
        self,
        sequences: Sequence[Sequence_],
        reference: bool | Literal["moving"] = False,
        entropy: bool = False,
        temperature: float = 1.0,
    ) -> TokenStats:
        """Log-probabilities of each sequence's response under the policy, the initial policy or TR-DPO's reference.

        The temperature divides the logits of either.  Sequences with the same prompt share its computation.
        Collective; each rank asks for its own sequences.
        """
        options = HeadOptions(self.recipe.training.logit_chunk_tokens, temperature, entropy)
        with self._evaluating(reference) as evaluate:
            found = self.visit(sequences, lambda batch: evaluate(batch, options), 2 if entropy else 1)
        return TokenStats(found[0], found[1] if entropy else None)

    @contextmanager
    def _evaluating(
        self, reference: bool | Literal["moving"]
    ) -> Iterator[Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]]:
        """The policy, the policy as it was before the first round, or where that has moved to, without gradients."""
        if not reference:
            with model.frozen(self._wrapped):
                yield self.engine
        elif self.peft is not None:
            with model.frozen(self._wrapped), self.peft.disable_adapter():
                yield self.engine
        elif reference == "moving" and self.moving_reference is not None:
            with torch.no_grad():
                yield self.moving_reference
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

    def move_reference(self, mix: float) -> None:
        """Let TR-DPO's reference take a step of this size to the policy.  Collective."""
        if self.moving_reference is None:
            self.moving_reference = self._load_reference()
        moving_reference.move(self.moving_reference, self._wrapped, mix)

    def load_moving_reference(self, directory: Path) -> None:
        """Where a checkpoint's reference has moved to.  Collective."""
        self.moving_reference = self._load_reference()
        moving_reference.load(self.moving_reference, directory)

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
        for network in (self._reference, self.moving_reference):
            if hasattr(network, "destroy"):
                network.destroy()
        if self.critic is not None:
            self.critic.close()
        self._reference = self.moving_reference = None
        super().close()


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
