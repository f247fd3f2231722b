"""The critic: a second network under DeepSpeed that predicts, in front of every response token, the reward to come.

It has its own weights, optimizer and learning rate.  From the policy it starts with a head of zeros, from a reward
model with that model's head, so that its first guess is what it would say if the response ended there.

Memory per rank: as much again as the policy's weights, gradients and optimizer.

Legend: R rows, S positions of a row, N response tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from align.errors import InputError
from align.model_files import resolve_model
from align.recipe import Recipe
from align.training import attention, model, trunk
from align.training.logps import TokenLogProbs
from align.training.packing import PackedBatch
from align.training.sharded import Sequence_, ShardedModel
from align.verifiers.reward_model import check_scorer

if TYPE_CHECKING:
    from align.distributed import Ranks

KEY = "training.rl.critic.model"


class ValueNetwork(nn.Module):
    """What DeepSpeed wraps: packed batch in, the value in front of each of its response tokens out."""

    def __init__(self, backbone: Any, head: nn.Linear) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.head = head

    def forward(self, batch: PackedBatch) -> tuple[Tensor]:
        """[N] float32: a response token is read one position before it, so the value does not know the token."""
        return (self.head(trunk.states(self.backbone, batch)).squeeze(-1).float(),)


class CriticEngine(ShardedModel):
    """One rank's share of the critic."""

    def __init__(self, policy_dir: Path, recipe: Recipe, ranks: Ranks, device: torch.device, total_steps: int) -> None:
        self._settings = recipe.training.rl.critic
        super().__init__(_load(policy_dir, recipe), recipe, ranks, device, total_steps)

    @property
    def peak_learning_rate(self) -> float:
        """What the schedule multiplies."""
        return self._settings.learning_rate

    def forward(self, batch: PackedBatch, **options: Any) -> TokenLogProbs:
        """Values [N] in the place of log-probabilities, so that the driver of optimizer steps need not know."""
        return TokenLogProbs(*self.engine(batch.to(self.device)))

    def values(self, sequences: Sequence[Sequence_]) -> list[np.ndarray]:
        """Per sequence [T] float32 values, without gradients.  Collective; each rank asks for its own sequences."""
        with model.frozen(self._wrapped):
            return self.visit(sequences, self.engine, 1)[0]


def _load(policy_dir: Path, recipe: Recipe) -> ValueNetwork:
    settings, dtype = recipe.training.rl.critic, recipe.policy.dtype
    checkpointing = recipe.training.gradient_checkpointing
    if settings.model is None:
        network = model.load_network(policy_dir, dtype, checkpointing)
        width = network.get_input_embeddings().embedding_dim
        head = nn.Linear(width, 1, bias=False, dtype=model.DTYPES[dtype])
        nn.init.zeros_(head.weight)
        return ValueNetwork(network.base_model, head)
    path = resolve_model(settings.model, settings.revision, key=KEY)
    check_critic(path, policy_dir)

    from transformers import AutoModelForSequenceClassification

    attention.register()
    classifier = AutoModelForSequenceClassification.from_pretrained(
        path, dtype=model.DTYPES[dtype], attn_implementation=attention.ATTENTION, use_safetensors=True
    )
    model.remove_noise(classifier)
    if checkpointing:
        classifier.gradient_checkpointing_enable({"use_reentrant": False})
    return ValueNetwork(classifier.base_model, classifier.score)


def check_critic(path: Path, policy_dir: Path) -> None:
    """Refuse a reward model that cannot read the policy's tokens one by one."""
    check_scorer(path, KEY)

    from transformers import AutoTokenizer

    mine, its = (AutoTokenizer.from_pretrained(p).get_vocab() for p in (policy_dir, path))
    if mine != its:
        raise InputError(
            f"{KEY}: {path} has another tokenizer than the policy, so it cannot read the policy's tokens; "
            "use it as a verifier and leave the critic to start from the policy"
        )
