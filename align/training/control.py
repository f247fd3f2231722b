"""Control texts in front of a prompt: what conditional training learns behind and what the policy is sampled behind.

Pre-training with human feedback, arXiv 2302.08582: a response is learned behind a text that says how good it is, and
at sampling the text for good stands in front, with the control tokens themselves banned from the response.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from align.errors import InputError
from align.recipe_supervised import CONDITIONED
from align.records import Prompt, content_id

if TYPE_CHECKING:
    from align.recipe import Recipe

_KEY, _MASK_KEY = "training.supervised.control", "training.supervised.mask_token"


@dataclass(frozen=True, slots=True)
class Control:
    """The control texts as token ids.

    Example: Control(texts=((9,), (8,)), leading=None, first_version=1) puts 8 in front of a prompt from round 1 on.
    """

    texts: tuple[tuple[int, ...], ...] = ()  # from the worst to the best; empty where the loss has none
    leading: int | None = None  # begin-of-sequence id: a control text stands behind it
    first_version: int = 0  # versions of the policy before this one do not know the texts

    @property
    def banned(self) -> tuple[int, ...]:
        """Ids that a response must not contain: the control texts that are one token."""
        return tuple(ids[0] for ids in self.texts if len(ids) == 1)

    @property
    def longest(self) -> int:
        """Tokens that a prompt may grow by."""
        return max((len(ids) for ids in self.texts), default=0)

    def behind(self, prompt: Sequence[int], level: int) -> tuple[int, ...]:
        """A prompt without a control text, behind the one of this level (-1 is the best)."""
        start = 1 if self.leading is not None and prompt and prompt[0] == self.leading else 0
        return (*prompt[:start], *self.texts[level], *prompt[start:])

    def sampled(self, prompts: Sequence[Prompt], version: int) -> list[Prompt]:
        """The prompts as a version of the policy is given them: behind the best text, once it knows it."""
        if not self.texts or version < self.first_version:
            return list(prompts)
        return [replace(p, token_ids=self.behind(p.token_ids, -1)) for p in prompts]

    def bare(self, prompt: Sequence[int], version: int) -> tuple[int, ...]:
        """The prompt of a sample of this version without the text that `sampled` put there."""
        if not self.texts or version < self.first_version:
            return tuple(prompt)
        best = self.texts[-1]
        start = 1 if self.leading is not None and prompt and prompt[0] == self.leading else 0
        assert tuple(prompt[start : start + len(best)]) == best, "this sample was drawn behind the best control text"
        return (*prompt[:start], *prompt[start + len(best) :])


def control_of(recipe: Recipe, tokenizer: Any) -> Control:
    """The recipe's control texts, none where its loss has none.  Raises InputError where one is not usable."""
    if recipe.training.loss_facts.name not in CONDITIONED:
        return Control()
    settings = recipe.training.supervised
    found: list[tuple[int, ...]] = []
    for place, text in enumerate(settings.control):
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        unknown = tokenizer.unk_token_id
        if not ids or (unknown is not None and unknown in ids):
            what = "becomes the unknown token" if ids else "becomes no token at all"
            raise InputError(f"{_KEY}.{place}: {text!r} {what} under this model's tokenizer; choose another text")
        if ids in found:
            raise InputError(f"{_KEY}.{place}: {text!r} becomes the same tokens as another of the texts")
        found.append(ids)
    return Control(tuple(found), tokenizer.bos_token_id, 0 if settings.control_known else 1)


def dropped(seed: int, round_index: int, sample_id: str, rate: float) -> bool:
    """Whether this response is learned without its control text: drawn for itself, so on any rank the same."""
    return random.Random(content_id("control", seed, round_index, sample_id)).random() < rate


def mask_id(recipe: Recipe, tokenizer: Any) -> int | None:
    """The token that stands for a hidden one, None where the loss hides none.

    Raises InputError where the recipe's mask token is not one token, or the tokenizer has none of its own.
    """
    if recipe.training.loss_facts.name != "masked_thought":
        return None
    text = recipe.training.supervised.mask_token
    if text is None:
        found = tokenizer.mask_token_id if tokenizer.mask_token_id is not None else tokenizer.pad_token_id
        if found is None or found == tokenizer.eos_token_id:
            raise InputError(f"{_MASK_KEY}: this tokenizer has no mask token and no padding of its own; name a token")
        return int(found)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        what = f"becomes {len(ids)} tokens" if len(ids) != 1 else "becomes the unknown token"
        raise InputError(f"{_MASK_KEY}: {text!r} {what} under this model's tokenizer; name a text that is one token")
    return int(ids[0])
