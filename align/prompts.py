"""Prompts as the policy sees them: read, rendered, counted, split into training and evaluation.

Which split a prompt falls into depends on its own text only, so adding rows or sorting the file moves nothing.
Every row is either used, counted in the report, or named in an error.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align.dispreferred import given_answers
from align.errors import InputError
from align.prompt_sources import Row, RowErrors, read_rows, text_of, text_problem
from align.recipe import Prompts, Recipe
from align.records import Given, Prompt, content_id
from align.rendering import Item, render, tokenize, turns_of
from align.tasks import arithmetic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPLITS = {"train": "train", "eval": "eval", "test": "eval", "validation": "eval"}
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a run.  Both tuples are in the order of the prompts' ids, whatever the file's order."""

    train: tuple[Prompt, ...]
    eval: tuple[Prompt, ...]
    digest: str  # sha256 over split, id, token ids and answer of every prompt
    report: Mapping[str, int]  # rows: read, duplicates, too_long, dispreferred_too_long; prompts: train, eval


def load_prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, context: int | None) -> PromptSet:
    """Read the recipe's prompt source.  `context` is the model's longest sequence in tokens, None where unknown.

    `Prompt.token_ids` is what the policy gets.  `Prompt.text` is the rendered prompt that people and verifiers
    read: it lacks special tokens that only the tokenizer adds (such as a leading `<s>`).
    """
    settings = recipe.prompts
    _check_settings(settings, tokenizer)
    if settings.source == "arithmetic":
        items = _read_arithmetic(settings, recipe.seed)
    else:
        items = _read_source(settings, recipe.verifier_columns(), recipe.training.negative.dispreferred_column)
    texts = render(items, settings, tokenizer)
    token_ids = tokenize(items, texts, tokenizer, special=not settings.chat_template)
    keep = _short_enough(items, token_ids, recipe, context)
    counts = {"read": len(items), "duplicates": 0, "too_long": len(items) - len(keep)}
    given: dict[int, Given | None] = {}
    if recipe.training.negative.dispreferred_column is not None:
        train_rows = [i for i in keep if _split_of(items[i], texts[i], settings) == "train"]
        found = given_answers(
            [items[i] for i in train_rows], [texts[i] for i in train_rows], [token_ids[i] for i in train_rows],
            recipe, tokenizer, context,
        )  # fmt: skip
        given = dict(zip(train_rows, found, strict=True))
        keep = [i for i in keep if i not in given or given[i] is not None]
        counts["dispreferred_too_long"] = list(given.values()).count(None)
    prompts, counts["duplicates"] = _unique(
        [items[i] for i in keep], [texts[i] for i in keep], [token_ids[i] for i in keep],
        [given.get(i) for i in keep], settings,
    )  # fmt: skip
    train = tuple(p for p in prompts if p.split == "train")
    held_out = tuple(p for p in prompts if p.split == "eval")
    _check_splits(train, held_out, settings)
    return PromptSet(train, held_out, _digest(prompts), {**counts, "train": len(train), "eval": len(held_out)})


def round_prompts(prompts: Sequence[Prompt], round: int, count: int, seed: int) -> tuple[Prompt, ...]:
    """The prompts of one round, counted from 0.

    Rounds cut an endless sequence of epochs into pieces of `count`, each epoch a new seeded order of all prompts, so
    over an epoch every prompt comes exactly once even where `count` does not divide it.  A round that straddles two
    epochs still has no prompt twice: what it took at the end of one epoch comes later in the next.
    """
    if not 1 <= count <= len(prompts):
        raise InputError(
            f"rounds.prompts_per_round: {count} prompts wanted, but there are only {len(prompts)} training prompts; "
            f"lower it to at most {len(prompts)} or add prompts"
        )
    epoch, offset = divmod(round * count, len(prompts))
    this: list[int] = []
    for e in range(epoch + 1):
        this = _epoch_order(this, e, len(prompts), count, seed)
    following = _epoch_order(this, epoch + 1, len(prompts), count, seed)
    return tuple(prompts[i] for i in (this + following)[offset : offset + count])


def _epoch_order(previous: list[int], epoch: int, size: int, count: int, seed: int) -> list[int]:
    """The order of one epoch, given that of the epoch before."""
    order = list(range(size))
    random.Random(f"prompts:{seed}:{epoch}").shuffle(order)
    tail = size * epoch % count  # how much of the round that straddles the border lies before it
    used = set(previous[size - tail :])
    first = [i for i in order if i not in used][: count - tail]
    chosen = set(first)
    return first + [i for i in order if i not in chosen]


def _check_settings(settings: Prompts, tokenizer: PreTrainedTokenizerBase) -> None:
    """Keys that would have no effect, and a chat template that is not there."""
    if settings.source == "arithmetic":
        for name in ("answer_column", "split_column", "limit"):
            if getattr(settings, name) is not None:
                raise InputError(f"prompts.{name}: has no meaning with source: arithmetic; remove it")
    if settings.revision is not None and not settings.source.startswith("hub:"):
        raise InputError("prompts.revision: only a hub:<dataset> source has revisions; remove it")
    if settings.system_prompt is not None and not settings.chat_template:
        raise InputError("prompts.system_prompt: needs `chat_template: true`; plain text has no system message")
    if settings.chat_template and not tokenizer.chat_template:
        raise InputError(
            "prompts.chat_template: this model's tokenizer has no chat template; set it to false or use a chat model"
        )


def _read_arithmetic(settings: Prompts, seed: int) -> list[Item]:
    drawn = arithmetic.problems(settings.arithmetic, seed)
    return [Item(f"arithmetic:{i}", p.question, p.answer, None) for i, p in enumerate(drawn, 1)]


def _read_source(settings: Prompts, wanted: Sequence[str], dispreferred: str | None) -> list[Item]:
    """Rows of a file or hub dataset, each checked; all bad rows are told together.  Verifiers ask for `wanted`.

    The column of dispreferred answers is looked at later: rows that are held out need none.
    """
    named = (settings.prompt_column, settings.answer_column, settings.split_column, dispreferred)
    columns = [c for c in named if c is not None]
    columns += [c for c in wanted if c not in columns]
    rows = read_rows(
        settings.source, columns=tuple(columns), key="prompts.source", limit=settings.limit, revision=settings.revision
    )
    errors = RowErrors()
    items = []
    for row in rows:
        before = errors.count
        content = content_of(row, settings, errors)
        answer, split = None, None
        if settings.answer_column is not None:
            answer = text_of(row, settings.answer_column, errors, integers=True)
        if settings.split_column is not None:
            split = _named_split(row, settings.split_column, errors)
        if errors.count == before:
            assert content is not None
            kept = row if dispreferred is not None else None
            items.append(Item(row.where, content, answer, split, columns_of(row, wanted), kept))
    errors.check("prompts.prompt_column, answer_column and split_column say which columns are read")
    return items


def columns_of(row: Row, wanted: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The columns that verifiers read: text as it is, lists and objects as JSON, nothing where the row has none."""
    found = {name: row.values.get(name) for name in wanted}
    return tuple(
        (name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=True, default=str))
        for name, value in found.items()
        if value is not None
    )


def content_of(row: Row, settings: Prompts, errors: RowErrors) -> str | list[dict[str, Any]] | None:
    """The prompt column: text, or with a chat template also a list of messages."""
    value = row.values.get(settings.prompt_column)
    if not isinstance(value, list):
        return text_of(row, settings.prompt_column, errors)
    problem = _messages_problem(value, settings) if settings.chat_template else (
        "is a list of chat messages; set prompts.chat_template to true")  # fmt: skip
    if problem:
        errors.add(f"{row.where}: {settings.prompt_column}: {problem}")
        return None
    return value


def _messages_problem(messages: list[Any], settings: Prompts) -> str | None:
    """What keeps a list from being a conversation that the policy can answer, in words."""
    if not messages:
        return "is an empty list of chat messages"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            return f"message {number}: expected an object with role and content"
        if message["role"] not in _ROLES:
            return f"message {number}: role {message['role']!r} is none of {', '.join(_ROLES)}"
        problem = text_problem(message["content"])
        if problem:
            return f"message {number}: content: {problem}"
        if message["role"] == "system" and number > 1:
            return f"message {number}: a system message must come first"
    if messages[0]["role"] == "system" and settings.system_prompt is not None:
        return "has a system message of its own, and prompts.system_prompt gives another; remove one"
    if messages[-1]["role"] not in ("user", "tool"):
        return f"the last message is from {messages[-1]['role']!r}; the policy answers a user (or a tool)"
    return None


def _named_split(row: Row, column: str, errors: RowErrors) -> str | None:
    name = text_of(row, column, errors)
    if name is not None and name not in _SPLITS:
        errors.add(f"{row.where}: {column}: expected one of {', '.join(_SPLITS)}, found {name!r}")
        return None
    return _SPLITS[name] if name is not None else None


def _short_enough(
    items: Sequence[Item], token_ids: Sequence[tuple[int, ...]], recipe: Recipe, context: int | None
) -> list[int]:
    """Indices of the prompts that leave room for a response; refuses the source where too many do not."""
    settings, room = recipe.prompts, None
    if context is not None:
        room = context - recipe.sampling.max_new_tokens
        if room < 1:
            raise InputError(
                f"sampling.max_new_tokens: {recipe.sampling.max_new_tokens} leaves no room for a prompt in the model's "
                f"context of {context} tokens; lower it"
            )
    if room is not None and settings.max_tokens is not None and settings.max_tokens > room:
        raise InputError(
            f"prompts.max_tokens: {settings.max_tokens} plus sampling.max_new_tokens "
            f"({recipe.sampling.max_new_tokens}) is more than the model's context of {context} tokens; lower one"
        )
    longest = settings.max_tokens if settings.max_tokens is not None else room
    if longest is None:
        return list(range(len(items)))
    too_long = [i for i, ids in enumerate(token_ids) if len(ids) > longest]
    if len(too_long) > settings.max_dropped_fraction * len(items):
        named = "\n".join(f"{items[i].where}: {len(token_ids[i])} tokens" for i in too_long[:5])
        raise InputError(
            f"{named}\nprompts.max_dropped_fraction: {len(too_long)} of {len(items)} prompts are longer than {longest} "
            f"tokens, more than the share of {settings.max_dropped_fraction} that may be dropped; raise "
            f"it, or prompts.max_tokens, or lower sampling.max_new_tokens"
        )
    dropped = set(too_long)
    return [i for i in range(len(items)) if i not in dropped]


def _unique(
    items: Sequence[Item],
    texts: Sequence[str],
    token_ids: Sequence[tuple[int, ...]],
    given: Sequence[Given | None],
    settings: Prompts,
) -> tuple[list[Prompt], int]:
    """The prompts in order of their ids, and how many repetitions were left out.

    Rows that repeat a prompt with another answer, or put it into both splits, contradict each other: refused.
    """
    first: dict[str, tuple[Item, Prompt]] = {}
    errors = RowErrors()
    for item, text, ids, bad in zip(items, texts, token_ids, given, strict=True):
        split = _split_of(item, text, settings)
        turns = turns_of(item.content) if settings.chat_template else ()
        prompt = Prompt(content_id(text), text, ids, item.answer, split, item.columns, turns, bad)
        if text not in first:
            first[text] = (item, prompt)
            continue
        earlier, known = first[text]
        if known.split != split:
            errors.add(f"{item.where}: this {split} prompt is also a {known.split} prompt, at {earlier.where}")
        elif known.answer != item.answer:
            errors.add(f"{item.where}: same prompt as {earlier.where}, but its answer is {item.answer!r}, "
                       f"not {known.answer!r}")  # fmt: skip
        elif known.columns != item.columns:
            errors.add(f"{item.where}: same prompt as {earlier.where}, but not the same in the verifiers' columns")
        elif known.dispreferred != bad:
            errors.add(f"{item.where}: same prompt as {earlier.where}, but another dispreferred answer; keep one row")
        elif not settings.dedupe:
            errors.add(f"{item.where}: same prompt as {earlier.where}; set prompts.dedupe to true to drop repetitions")
    errors.check()
    prompts = sorted((prompt for _, prompt in first.values()), key=lambda p: p.id)
    return prompts, len(items) - len(prompts)


def _split_of(item: Item, text: str, settings: Prompts) -> str:
    """The split that the row names, or by whether the prompt's hash, in [0, 1), lies below the evaluation share."""
    below = int(content_id("split", text), 16) / 2**64 < settings.eval_fraction
    return item.split or ("eval" if below else "train")


def _check_splits(train: Sequence[Prompt], held_out: Sequence[Prompt], settings: Prompts) -> None:
    """Both splits need prompts: without held-out ones nothing could be measured."""
    total = len(train) + len(held_out)
    for name, prompts in (("training", train), ("evaluation", held_out)):
        if prompts:
            continue
        if settings.split_column is not None:
            wanted = " or ".join(k for k, v in _SPLITS.items() if v == ("train" if name == "training" else "eval"))
            raise InputError(
                f"prompts.split_column: no row's {settings.split_column!r} is {wanted}, so no {name} prompts are left; "
                f"mark some, or remove split_column and let prompts.eval_fraction split"
            )
        raise InputError(
            f"prompts.eval_fraction: {settings.eval_fraction} of {total} prompts leaves no {name} prompts; "
            f"{'lower' if name == 'training' else 'raise'} it or give more prompts"
        )


def _digest(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for p in prompts:
        more = [part for part in (p.columns, p.dispreferred) if part]
        digest.update(content_id(p.split, p.id, p.token_ids, p.answer is None, p.answer, *more).encode())
    return digest.hexdigest()
