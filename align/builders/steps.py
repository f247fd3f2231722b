"""Responses cut into steps, on token ids.

A step ends with the token that completes its separator, so every token belongs to one step and the steps put together
are the response.  The same cut serves the rollouts and the loss: nothing is tokenised a second time.

Legend: T response tokens, S steps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from align.recipe_steps import Steps
from align.records import Sample, content_id

TAIL = 8  # prompt tokens decoded in front of a response, so that its first blank is not lost
UNFINISHED = "\ufffd"  # what a decoder writes for a character whose bytes are not all there


@dataclass(frozen=True, slots=True)
class Stepped:
    """A response and its steps.

    Example: Stepped(sample, pieces=("3+8:1c1,", "1:1,", "=11"), ends=(8, 12, 16)); the last step has the
    end-of-sequence token, where there is one.
    """

    sample: Sample
    pieces: tuple[str, ...]  # [S] text of each step
    ends: tuple[int, ...]  # [S] token after the last of each step; the last is T

    def prefix(self, steps: int) -> Prefix:
        """The first `steps` steps; 0 is the prompt alone."""
        end = self.ends[steps - 1] if steps else 0
        ids = self.sample.response_ids[:end]
        name = prefix_id(self.sample.prompt_id, ids)
        return Prefix(name, self.sample, steps, ids, "".join(self.pieces[:steps]))


@dataclass(frozen=True, slots=True)
class Prefix:
    """A place from which a response can go on.

    Example: Prefix("5d…", sample, steps=1, ids=(7, 14, …), text="3+8:1c1,")
    """

    id: str  # the same for every response of the prompt that begins with these tokens
    sample: Sample  # a response that begins with it
    steps: int
    ids: tuple[int, ...]  # response tokens so far
    text: str

    def then(self, step: Sample) -> Prefix:
        """This prefix with one more step."""
        ids = self.ids + step.response_ids
        return Prefix(prefix_id(self.sample.prompt_id, ids), self.sample, self.steps + 1, ids, self.text + step.text)


def prefix_id(prompt_id: str, ids: Sequence[int]) -> str:
    """The name of a prompt with the first tokens of a response; without any it is the prompt's own."""
    if not ids:
        return prompt_id
    return content_id("prefix", prompt_id, ",".join(map(str, ids)))


def token_pieces(
    prompt_ids: Sequence[int], response_ids: Sequence[int], decode: Callable[[list[int]], str]
) -> tuple[str, ...]:
    """[T] the text that each token adds; "" for a special token, and for all but the last token of a character.

    Decoded a few tokens at a time, as a stream: the text of a token can depend on the token before it.
    """
    ids = [*prompt_ids[-TAIL:], *response_ids]
    pieces: list[str] = []
    start, read = 0, len(ids) - len(response_ids)
    for end in range(read + 1, len(ids) + 1):
        before, now = decode(ids[start:read]), decode(ids[start:end])
        if now.endswith(UNFINISHED) and end < len(ids):
            pieces.append("")
            continue
        pieces.append(now[len(before) :])
        if len(now) > len(before):
            start, read = read, end
    return tuple(pieces)


def step_ends(pieces: Sequence[str], rule: Steps) -> tuple[int, ...]:
    """[S] the token after each step.  Tokens without text (the end of sequence) belong to the step before them.

    Example: pieces ("a", ";", "b", ";", "") and separator ";" give (2, 5).
    """
    count = len(pieces)
    text_ends = list(accumulate(map(len, pieces)))
    if rule.rule == "tokens":
        ends = list(range(rule.tokens_per_step, count, rule.tokens_per_step))
    else:
        pattern = re.escape(rule.separator) if rule.rule == "separator" else rule.pattern
        assert pattern is not None
        ends, token = [], 0
        for found in re.finditer(pattern, "".join(pieces)):
            while token < count and text_ends[token] < found.end():
                token += 1
            if found.end():
                ends.append(token + 1)
    whole = next((i for i in range(count, 0, -1) if pieces[i - 1]), count)  # behind the last token that has text
    inner = [end for end in dict.fromkeys(ends) if 0 < end < whole]
    return (*inner[: rule.max_steps - 1], count)


def cut(sample: Sample, rule: Steps, decode: Callable[[list[int]], str]) -> Stepped:
    """The response in steps; a single one where the rule finds no end of a step inside it."""
    pieces = token_pieces(sample.prompt_ids, sample.response_ids, decode)
    ends = step_ends(pieces, rule)
    texts = tuple("".join(pieces[a:b]) for a, b in zip((0, *ends), ends, strict=False))
    return Stepped(sample, texts, ends)


def first_step(sample: Sample, rule: Steps, decode: Callable[[list[int]], str]) -> Sample:
    """The response's first step as a sample of its own."""
    stepped = cut(sample, rule, decode)
    return part(sample, 0, stepped.ends[0], stepped.pieces[0])


def part(sample: Sample, begin: int, end: int, text: str) -> Sample:
    """Response tokens [begin, end) as a sample of their own; what comes before them moves into the prompt.

    Nothing is appended: a part that stops before the end has no end-of-sequence token.
    """
    whole = end == len(sample.response_ids)
    return replace(
        sample,
        id=content_id("part", sample.id, begin, end),
        prompt_id=prefix_id(sample.prompt_id, sample.response_ids[:begin]),
        prompt_ids=sample.prompt_ids + sample.response_ids[:begin],
        response_ids=sample.response_ids[begin:end],
        logprobs=sample.logprobs[begin:end],
        text=text,
        finish_reason=sample.finish_reason if whole else "length",
    )
