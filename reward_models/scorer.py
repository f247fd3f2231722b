"""A sequence classifier with one logit: made from a language model, trained on soft labels, used to score.

Input is what `align.verifiers.reward_model` asks it in the end: prompt and response joined, in the classifier's own
tokens, read at the last one.  Batches are padded on the right with a token that is told apart from it by the mask.

Legend: B sequences, T tokens of the longest.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import InputError, RunError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

SCORED_AT_ONCE = 256  # sequences of similar length


@dataclass(frozen=True)
class Fitting:
    """How a classifier is trained.

    Example: Fitting(epochs=3, batch_size=64, learning_rate=1e-4, seed=0)
    """

    epochs: int = 3
    batch_size: int = 64
    learning_rate: float = 1e-4  # peak; a tenth of the steps warm up, then linear decay to 0
    weight_decay: float = 0.01
    seed: int = 0


def make_scorer(base: Path, layers: int | None = None, seed: int = 0) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A classifier with one fresh logit on the checkpoint in `base`, in float32, and its tokenizer.

    With `layers` only the first so many layers of the base are kept.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer, config = AutoTokenizer.from_pretrained(base), AutoConfig.from_pretrained(base)
    config.num_labels = 1
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise InputError(f"--layers {layers}: {base} has {config.num_hidden_layers}; give 1 to as many")
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(base, config=config, dtype=torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompt and response joined, as the `reward_model` verifier makes them."""
    return list(tokenizer(list(texts))["input_ids"]) if texts else []


def fit(
    model: nn.Module,
    inputs: Sequence[Sequence[int]],
    labels: Sequence[float],
    settings: Fitting,
    on_step: Callable[[], object] = lambda: None,
) -> list[float]:
    """Minimise the cross-entropy -p log s(x) - (1-p) log s(-x), p the soft label and s the sigmoid of the logit x.

    Returns the mean loss of each epoch.  Every batch counts each of its sequences alike.
    """
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits

    steps = settings.epochs * math.ceil(len(inputs) / settings.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, max(0.0, (steps - step) / max(1, steps - warm)))
    )
    losses = []
    model.train()
    for epoch in range(settings.epochs):
        total = 0.0
        for rows in _shuffled(len(inputs), settings.batch_size, f"{settings.seed}:{epoch}"):
            target = torch.tensor([labels[i] for i in rows], device=_device(model))
            loss = binary_cross_entropy_with_logits(_logits(model, [inputs[i] for i in rows]), target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += loss.item() * len(rows)
            on_step()
        if not math.isfinite(total):
            raise RunError(f"the loss is no number in epoch {epoch}; lower the learning rate")
        losses.append(total / len(inputs))
    return losses


def score(model: nn.Module, inputs: Sequence[Sequence[int]]) -> list[float]:
    """The logit of each sequence, in their order; those of similar length are scored together."""
    import torch

    order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
    found = [0.0] * len(inputs)
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(order), SCORED_AT_ONCE):
            rows = order[start : start + SCORED_AT_ONCE]
            for i, value in zip(rows, _logits(model, [inputs[i] for i in rows]).tolist(), strict=True):
                found[i] = value
    return found


def save(model: Any, tokenizer: Any, directory: Path) -> None:
    """As an ordinary Hugging Face checkpoint, safetensors."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _logits(model: Any, inputs: Sequence[Sequence[int]]) -> Tensor:
    """[B], from [B, T] padded on the right."""
    import torch

    width, pad = max(len(ids) for ids in inputs), model.config.pad_token_id
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in inputs], device=_device(model))
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in inputs], device=_device(model))
    logits: Tensor = model(input_ids=ids, attention_mask=mask).logits[:, 0]
    return logits.float()


def _device(model: nn.Module) -> Any:
    return next(model.parameters()).device


def _shuffled(count: int, size: int, seed: str) -> Iterator[list[int]]:
    """Batches of row numbers in a seeded order."""
    order = list(range(count))
    random.Random(f"scorer:{seed}").shuffle(order)
    for start in range(0, count, size):
        yield order[start : start + size]
