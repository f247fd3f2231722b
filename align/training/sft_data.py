"""Examples for the cold start: written for the built-in task, or read from a file, as token ids."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from align.errors import InputError
from align.prompt_sources import RowErrors, read_rows, text_of
from align.prompts import PromptSet, content_of
from align.recipe import Recipe
from align.rendering import Item, beyond_context, render, response_ids, tokenize
from align.tasks import arithmetic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Example(NamedTuple):
    """One training row.  Example: Example((4, 13, 5, 16), (6, 1)) is "1+2=" with response "3" and end-of-sequence."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]  # ends with the end-of-sequence id


def prepare(
    recipe: Recipe, prompt_set: PromptSet, tokenizer: PreTrainedTokenizerBase, model_dir: Path
) -> tuple[list[Example], dict[str, int]]:
    """The examples, and counts: examples, wrong_examples, too_long (left out, within prompts.max_dropped_fraction)."""
    settings = recipe.cold_start
    assert settings is not None
    if tokenizer.eos_token_id is None:
        raise InputError("cold_start: this model's tokenizer has no end-of-sequence token, so responses could not end")
    if settings.source == "prompts":
        examples, wrong = _written(recipe, prompt_set, tokenizer)
        return examples, {"examples": len(examples), "wrong_examples": wrong, "too_long": 0}
    if settings.error_rate > 0:
        raise InputError("cold_start.error_rate: only written solutions (source: prompts) can be made wrong; remove it")
    examples, too_long = _from_file(recipe, prompt_set, tokenizer, _context(model_dir))
    return examples, {"examples": len(examples), "wrong_examples": 0, "too_long": too_long}


def _written(recipe: Recipe, prompt_set: PromptSet, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Example], int]:
    """Solutions to the training prompts, in turn, `error_rate` of them wrong; and how many are wrong.

    No more are written than the steps will read.  Past the number of prompts each gets another solution, right or
    wrong on its own draw, so that a mistake is not learned as that problem's answer.
    """
    settings, style = recipe.cold_start, recipe.prompts.arithmetic.solution
    assert settings is not None
    rng = random.Random(f"solutions:{recipe.seed}")
    count = min(settings.examples, settings.steps * settings.batch_size)
    prompts = [prompt_set.train[i % len(prompt_set.train)] for i in range(count)]
    faulty = [rng.random() < settings.error_rate for _ in prompts]
    texts = [arithmetic.solution(p.text, style, bad, rng) for p, bad in zip(prompts, faulty, strict=True)]
    items = [Item(f"cold_start: solution {text!r} to {p.text!r}", text, None, None)
             for p, text in zip(prompts, texts, strict=True)]  # fmt: skip
    responses = tokenize(items, texts, tokenizer, special=False)
    examples = [Example(p.token_ids, (*ids, tokenizer.eos_token_id)) for p, ids in zip(prompts, responses, strict=True)]
    longest = max(len(e.response_ids) for e in examples)
    if longest > recipe.sampling.max_new_tokens:
        raise InputError(
            f"sampling.max_new_tokens: {recipe.sampling.max_new_tokens} cuts off cold-start solutions, the longest of "
            f"which has {longest} tokens with the end of sequence; raise it to at least {longest}"
        )
    return examples, sum(faulty)


def _from_file(
    recipe: Recipe, prompt_set: PromptSet, tokenizer: PreTrainedTokenizerBase, context: int | None
) -> tuple[list[Example], int]:
    """Rows of prompt and response; refuses any whose prompt is held out for evaluation."""
    settings = recipe.cold_start
    assert settings is not None
    columns = (settings.prompt_column, settings.response_column)
    rows = read_rows(settings.source, columns=columns, key="cold_start.source", limit=settings.examples)
    prompts = recipe.prompts.model_copy(update={"prompt_column": settings.prompt_column})
    errors = RowErrors()
    found: list[tuple[Item, str]] = []
    for row in rows:
        before = errors.count
        content = content_of(row, prompts, errors)
        response = text_of(row, settings.response_column, errors)
        if errors.count == before:
            assert content is not None and response is not None
            found.append((Item(row.where, content, None, None), response))
    errors.check("cold_start.prompt_column and response_column say which columns are read")
    items = [item for item, _ in found]
    texts = render(items, prompts, tokenizer)
    _refuse_held_out(items, texts, prompt_set)
    special = not prompts.chat_template
    prompt_ids = tokenize(items, texts, tokenizer, special=special)
    answers = response_ids(items, texts, prompt_ids, [response for _, response in found], tokenizer, special=special)
    examples = [Example(p, r) for p, r in zip(prompt_ids, answers, strict=True)]
    return _short_enough(items, examples, recipe, context)


def _refuse_held_out(items: Sequence[Item], texts: Sequence[str], prompt_set: PromptSet) -> None:
    """An evaluation prompt among the examples would be trained on before it is measured."""
    held_out = {p.text for p in prompt_set.eval}
    errors = RowErrors()
    for item, text in zip(items, texts, strict=True):
        if text in held_out:
            errors.add(f"{item.where}: this prompt is held out for evaluation; remove the row")
    errors.check("cold_start.source: evaluation prompts must not be trained on")


def _short_enough(
    items: Sequence[Item], examples: list[Example], recipe: Recipe, context: int | None
) -> tuple[list[Example], int]:
    """The examples that fit the model's context, and how many do not; refuses where those are too many."""
    lengths = [len(e.prompt_ids) + len(e.response_ids) for e in examples]
    named = ("cold_start.source", "rows", "response")
    too_long = beyond_context(items, lengths, context, recipe.prompts, named)
    kept = [e for i, e in enumerate(examples) if i not in too_long]
    if too_long and not kept:
        raise InputError("cold_start.source: no row fits the model's context; shorten them")
    return kept, len(too_long)


def _context(model_dir: Path) -> int | None:
    """The longest sequence that the model's configuration names."""
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    return config.get("max_position_embeddings")
