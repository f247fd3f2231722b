"""A sequence classifier with one logit: made from a language model, trained on soft labels, used to score.

Input is what `align.verifiers.reward_model` asks it in the end: prompt and response joined, in the classifier's own
tokens, read at the last one.  Batches are padded on the right with a token that is told apart from it by the mask.

Legend: B sequences, T tokens of the longest.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
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

    Example: Fitting(epochs=10, batch_size=64, learning_rate=1e-4, pair_weight=1.0, patience=3, seed=0)
    """

    epochs: int = 10
    batch_size: int = 64  # responses in a step, at least: a prompt's responses are never parted
    learning_rate: float = 1e-4  # peak; a tenth of the steps warm up, then linear decay to 0
    pair_weight: float = 1.0  # of the comparisons within a prompt
    patience: int = 3  # epochs without a better choice on the validation prompts after which it stops
    weight_decay: float = 0.01
    seed: int = 0


@dataclass(frozen=True)
class Lesson:
    """A text to learn from.

    Example: Lesson(ids=(4, 5, 9, 6), begins=3, p_good=0.93, prompt="3f…")
    """

    ids: tuple[int, ...]
    begins: int  # tokens in front of the response
    p_good: float
    prompt: str  # texts of one prompt are compared with each other


@dataclass(frozen=True)
class Fitted:
    """How the training went.

    Example: Fitted(losses=(0.65, 0.41), checks=(0.71, 0.88), kept=2)
    """

    losses: tuple[float, ...]  # mean cross-entropy of each epoch, of the label at the last token
    checks: tuple[float, ...]  # what the check said after each epoch
    kept: int  # epochs behind the weights that were kept


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
        model = AutoModelForSequenceClassification.from_pretrained(
            base, config=config, dtype=torch.float32, use_safetensors=True
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompt and response joined, as the `reward_model` verifier makes them."""
    return list(tokenizer(list(texts))["input_ids"]) if texts else []


def lessons(tokenizer: Any, texts: Sequence[tuple[str, str, float, str]]) -> list[Lesson]:
    """From (prompt, response, P(good), name of the prompt); the response begins where the tokens leave the prompt's."""
    wholes = encode(tokenizer, [prompt + response for prompt, response, _, _ in texts])
    fronts = encode(tokenizer, [prompt for prompt, _, _, _ in texts])
    return [
        Lesson(tuple(ids), _common(ids, front), p_good, name)
        for ids, front, (_, _, p_good, name) in zip(wholes, fronts, texts, strict=True)
    ]


def fit(
    model: nn.Module,
    given: Sequence[Lesson],
    settings: Fitting,
    check: Callable[[], float],
    on_step: Callable[[], object] = lambda: None,
) -> Fitted:
    """Train on soft labels, and leave the weights of the epoch after which `check` was highest.

    With p the label and x the logit, a response's loss is the cross-entropy -p log s(x) - (1-p) log s(-x) at its last
    token, s the sigmoid, plus its mean over all tokens of the response (token-level verifiers, arXiv 2110.14168): a
    prefix that goes wrong is told so where it does.  Two responses of a prompt add `pair_weight` times Bradley-Terry's
    loss -w log s(x-y) - l log s(y-x) with w = p(1-q) and l = q(1-p), divided by the sum of w + l over the step.
    """
    import torch

    plan = [_batches(given, settings, epoch) for epoch in range(settings.epochs)]
    steps = sum(map(len, plan))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, max(0.0, (steps - step) / max(1, steps - warm)))
    )
    losses: list[float] = []
    checks: list[float] = []
    best: dict[str, Tensor] = {}
    for batches in plan:
        model.train()
        total = 0.0
        for rows in batches:
            last, loss = _losses(model, [given[i] for i in rows], settings.pair_weight)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += last * len(rows)
            on_step()
        if not math.isfinite(total):
            raise RunError(f"the loss is no number in epoch {len(losses)}; lower the learning rate")
        losses.append(total / len(given))
        checks.append(check())
        if checks[-1] == max(checks):
            best = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        elif checks.index(max(checks)) + settings.patience < len(checks):
            break
    model.load_state_dict(best)
    return Fitted(tuple(losses), tuple(checks), kept=_last_best(checks))


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


def _last_best(checks: Sequence[float]) -> int:
    return max(i for i, value in enumerate(checks, 1) if value == max(checks))


def _common(ids: Sequence[int], front: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (a, b) in enumerate(zip(ids, front, strict=False)) if a != b), min(len(ids), len(front)))


def _losses(model: Any, batch: Sequence[Lesson], pair_weight: float) -> tuple[float, Tensor]:
    """(mean cross-entropy at the last token, the loss to minimise) of a step."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

    target = torch.tensor([lesson.p_good for lesson in batch], device=_device(model))  # [B]
    ids, mask = _padded(model, [lesson.ids for lesson in batch])
    if not hasattr(model, "score"):  # a model that reads both ways at once judges no prefix
        logits = model(input_ids=ids, attention_mask=mask).logits[:, 0].float()
        last = loss = cross_entropy(logits, target)
    else:
        hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        by_token = model.score(hidden)[..., 0].float()  # [B, T]
        logits = by_token.gather(1, mask.sum(dim=1, keepdim=True) - 1)[:, 0]
        begins = torch.tensor([[lesson.begins] for lesson in batch], device=_device(model))
        inside = mask * (torch.arange(ids.shape[1], device=_device(model)) >= begins)
        each = cross_entropy(by_token, target[:, None].expand_as(by_token), reduction="none") * inside
        last = cross_entropy(logits, target)
        loss = last + (each.sum(dim=1) / inside.sum(dim=1).clamp(min=1)).mean()
    return last.item(), loss + pair_weight * _comparisons(logits, target, [lesson.prompt for lesson in batch])


def _comparisons(logits: Tensor, target: Tensor, prompts: Sequence[str]) -> Tensor:
    """The Bradley-Terry loss over every two responses of a prompt: [B], [B] -> one number, 0 where there are none."""
    import torch
    from torch.nn.functional import logsigmoid

    number = {name: i for i, name in enumerate(prompts)}
    names = torch.tensor([number[name] for name in prompts], device=logits.device)
    one, other = torch.triu((names[:, None] == names[None, :]).long(), diagonal=1).nonzero(as_tuple=True)
    wins, losses = target[one] * (1 - target[other]), target[other] * (1 - target[one])
    gap = logits[one] - logits[other]
    total = -(wins * logsigmoid(gap) + losses * logsigmoid(-gap)).sum()
    return total / (wins + losses).sum().clamp(min=1e-6)


def _logits(model: Any, inputs: Sequence[Sequence[int]]) -> Tensor:
    """[B], of the last token of each."""
    ids, mask = _padded(model, inputs)
    logits: Tensor = model(input_ids=ids, attention_mask=mask).logits[:, 0]
    return logits.float()


def _padded(model: Any, inputs: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask [B, T], padded on the right."""
    import torch

    width, pad = max(len(ids) for ids in inputs), model.config.pad_token_id
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in inputs], device=_device(model))
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in inputs], device=_device(model))
    return ids, mask


def _device(model: nn.Module) -> Any:
    return next(model.parameters()).device


def _batches(given: Sequence[Lesson], settings: Fitting, epoch: int) -> list[list[int]]:
    """Row numbers of each step: whole prompts in a seeded order."""
    prompts: dict[str, list[int]] = {}
    for i, lesson in enumerate(given):
        prompts.setdefault(lesson.prompt, []).append(i)
    order = list(prompts.values())
    random.Random(f"scorer:{settings.seed}:{epoch}").shuffle(order)
    batches: list[list[int]] = [[]]
    for rows in order:
        if len(batches[-1]) >= settings.batch_size:
            batches.append([])
        batches[-1] += rows
    return batches
