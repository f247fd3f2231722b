"""Bad answers that the prompt source brings along: D2O's input as published, one to every training prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from align.errors import InputError
from align.prompt_sources import RowErrors, text_of
from align.recipe import Recipe
from align.records import Given
from align.rendering import Item, beyond_context, response_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "training.negative.dispreferred_column"


def given_answers(
    items: Sequence[Item],
    texts: Sequence[str],
    token_ids: Sequence[tuple[int, ...]],
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
) -> list[Given | None]:
    """The dispreferred answer to each of these training prompts; None where both are longer than the model's context.

    `texts` are the rendered prompts.  Raises InputError for a row without the column or with nothing in it, and where
    more than `prompts.max_dropped_fraction` of the rows are too long.
    """
    column = recipe.training.negative.dispreferred_column
    assert column is not None
    if tokenizer.eos_token_id is None:
        raise InputError(f"{KEY}: this model's tokenizer has no end-of-sequence token, so answers could not end")
    errors = RowErrors()
    found = [text_of(item.row, column, errors) for item in items if item.row is not None]
    errors.check(f"{KEY} says which column holds a bad answer to every training prompt")
    answers = [text for text in found if text is not None]
    special = not recipe.prompts.chat_template
    ids = response_ids(items, texts, token_ids, answers, tokenizer, special=special)
    lengths = [len(p) + len(r) for p, r in zip(token_ids, ids, strict=True)]
    too_long = beyond_context(items, lengths, context, recipe.prompts, (KEY, "training rows", "answer"))
    made = zip(answers, ids, strict=True)
    return [None if i in too_long else Given(text, answer) for i, (text, answer) in enumerate(made)]
