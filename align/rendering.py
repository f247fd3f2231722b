"""Prompts and responses as text and as token ids: through the chat template, through the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from align.errors import InputError
from align.prompt_sources import Row, RowErrors
from align.recipe import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Item(NamedTuple):
    """A row that passed its own checks, before it is rendered.

    Example: Item("prompts.jsonl:12", "1+2=", "3", None)
    """

    where: str
    content: str | list[dict[str, Any]]  # text, or chat messages
    answer: str | None
    split: str | None  # None: by hash
    columns: tuple[tuple[str, str], ...] = ()  # those that verifiers read
    row: Row | None = None  # as the source has it, where a column of it is read later


def render(items: Sequence[Item], settings: Prompts, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each prompt, after the chat template where the recipe asks for it."""
    if not settings.chat_template:
        return [item.content for item in items if isinstance(item.content, str)]
    from jinja2 import TemplateError

    system = [{"role": "system", "content": settings.system_prompt}] if settings.system_prompt is not None else []
    texts, errors = [], RowErrors()
    for item in items:
        content = item.content
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
        try:
            text = tokenizer.apply_chat_template(system + messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError) as error:
            errors.add(f"{item.where}: the tokenizer's chat template refuses this prompt: {error}")
            continue
        texts.append(str(text))
    errors.check()
    return texts


def turns_of(content: str | list[dict[str, Any]]) -> tuple[tuple[str, str], ...]:
    """(role, text) of each message; a text alone is the user's."""
    if isinstance(content, str):
        return (("user", content),)
    return tuple((str(message["role"]), str(message["content"])) for message in content)


def tokenize(
    items: Sequence[Item], texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, special: bool
) -> list[tuple[int, ...]]:
    """Token ids of each text, with the tokenizer's own special tokens in front (Llama's `<s>`) if `special`.

    Plain prompts get them; a chat template writes its own, so none are added there.  An end-of-sequence token that
    the tokenizer puts behind the text goes: the response follows.  A character that the tokenizer does not know is
    an error, because the policy would not see it.
    """
    encoded = tokenizer(list(texts), add_special_tokens=special)["input_ids"]
    end, unknown = tokenizer.eos_token_id, tokenizer.unk_token_id
    found, errors = [], RowErrors()
    for item, text, ids in zip(items, texts, encoded, strict=True):
        if ids and ids[-1] == end and not text.endswith(tokenizer.eos_token):
            ids = ids[:-1]
        if not ids:
            errors.add(f"{item.where}: the tokenizer makes no tokens of {text[:40]!r}")
        elif unknown is not None and unknown in ids and tokenizer.unk_token not in text:
            errors.add(f"{item.where}: {_unknown_part(text, tokenizer)} is unknown to the tokenizer, in {text[:40]!r}")
        found.append(tuple(ids))
    errors.check()
    return found


def _unknown_part(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first character that alone becomes the unknown token, or "a part"."""
    for character in text:
        if tokenizer.unk_token_id in tokenizer(character, add_special_tokens=False)["input_ids"]:
            return repr(character)
    return "a part"


def response_ids(
    items: Sequence[Item],
    texts: Sequence[str],
    prompt_ids: Sequence[tuple[int, ...]],
    responses: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    special: bool,
) -> list[tuple[int, ...]]:
    """Token ids of each response as it follows its rendered prompt, with the end-of-sequence id behind.

    Prompt and response are read as one text; where that would take other tokens for the prompt, the response is read
    alone.  `special` as for `tokenize`.
    """
    whole = [text + response for text, response in zip(texts, responses, strict=True)]
    joined = tokenize(items, whole, tokenizer, special=special)
    alone = tokenize(items, responses, tokenizer, special=False)
    return [
        (*(j[len(p) :] if j[: len(p)] == p and len(j) > len(p) else a), tokenizer.eos_token_id)
        for p, j, a in zip(prompt_ids, joined, alone, strict=True)
    ]


def beyond_context(
    items: Sequence[Item], lengths: Sequence[int], context: int | None, settings: Prompts, named: tuple[str, str, str]
) -> set[int]:
    """Places of the rows of more tokens, prompt and answer together, than the model's context.

    `named` is (key, what the rows are, what the answer is) for the InputError where those are more than
    `prompts.max_dropped_fraction`.
    """
    too_long = [i for i, length in enumerate(lengths) if context is not None and length > context]
    allowed, (key, rows, answer) = settings.max_dropped_fraction, named
    if len(too_long) > allowed * len(items):
        shown = "\n".join(f"{items[i].where}: {lengths[i]} tokens with its {answer}" for i in too_long[:5])
        raise InputError(
            f"{shown}\n{key}: {len(too_long)} of {len(items)} {rows} are longer than the model's context of {context} "
            f"tokens; shorten or remove them, or raise prompts.max_dropped_fraction (now {allowed})"
        )
    return set(too_long)
