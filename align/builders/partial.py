"""Partly-correct solutions, found by what they have worked out so far.

The state after a step is everything that the steps up to it have worked out.  A wrong response is partly correct up to
its last step whose state a correct response of the same prompt passes through too, however it was written down.  Cut
there, it joins the correct responses in the prompt's buffer, unless its tokens begin one that is in it already.

Ni et al., arXiv 2205.14318 (self-sampled correct and partially-correct solutions), made into pairs: a wrong response,
cut behind its first step off the right way, loses against a correct one and against a partial that got further.

Legend: S steps, m steps on the right way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from align.builders.per_step import NO_CORRECT, Candidates
from align.builders.steps import Stepped, part
from align.records import Sample, Score

State = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Partial:
    """A wrong response and how far it is right.

    Example: Partial(response, right=2) for a response of three steps that goes wrong in the last one.
    """

    response: Stepped
    right: int  # m

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens of the steps that are right."""
        return self.response.sample.response_ids[: self.response.ends[self.right - 1] if self.right else 0]


def states(response: Stepped, pattern: str | None) -> list[State]:
    """[S] what the response has worked out after each step.

    Example: with the pattern ":([0-9])(c[0-9])?" the columns "3+8:1c1,", "1:1," and "=11" give ("1c1",),
    ("1c1", "1") and ("1c1", "1", "=11"): a step without a match stands for itself.
    """
    found: list[State] = []
    for text in response.pieces:
        match = re.search(pattern, text) if pattern is not None else None
        step = "".join(group or "" for group in match.groups() or (match[0],)) if match else text
        found.append((*(found[-1] if found else ()), step))
    return found


def steps_right(response: Stepped, reached: set[State], pattern: str | None) -> int:
    """m: the last step whose state a correct response reaches, at most all but the last step."""
    passed = [i + 1 for i, state in enumerate(states(response, pattern)[:-1]) if state in reached]
    return max(passed, default=0)


def buffer(partials: Sequence[Partial], correct: Sequence[tuple[int, ...]]) -> list[Partial]:
    """The partials worth keeping, furthest first: none whose tokens begin a correct response or another partial."""
    kept: list[Partial] = []
    order = sorted((p for p in partials if p.right), key=lambda p: (-len(p.ids), p.response.sample.id))
    for candidate in order:
        longer = [*correct, *(p.ids for p in kept)]
        if not any(ids[: len(candidate.ids)] == candidate.ids for ids in longer):
            kept.append(candidate)
    return sorted(kept, key=lambda p: (-p.right, p.response.sample.id))


def partly_correct(
    wrong: Sequence[Stepped],
    correct: Sequence[tuple[Score, Stepped | None]],
    samples: Mapping[str, Sample],
    pattern: str | None,
    out: Candidates,
) -> None:
    """One prompt's candidates.  The worth of a part is the share of its own steps that are right.

    `correct` come best first, with their steps where the rule finds any; wrong responses take them in turn.
    """
    if not correct:
        return out.leave_out(NO_CORRECT)
    reached = {state for _, stepped in correct if stepped is not None for state in states(stepped, pattern)}
    partials = [Partial(response, steps_right(response, reached, pattern)) for response in wrong]
    kept = buffer(partials, [samples[score.sample_id].response_ids for score, _ in correct])
    for turn, loser in enumerate(partials):
        response, m = loser.response, loser.right
        worse = part(response.sample, 0, response.ends[m], "".join(response.pieces[: m + 1])), _share(loser)
        score = correct[turn % len(correct)][0]
        out.add(response.sample.prompt_id, (samples[score.sample_id], score.p_good), worse)
        further = next((p for p in kept if p.right > m and _share(p) > _share(loser)), None)
        if further is not None:
            text = "".join(further.response.pieces[: further.right])
            cut = part(further.response.sample, 0, len(further.ids), text)
            out.add(response.sample.prompt_id, (cut, _share(further)), worse)


def _share(partial: Partial) -> float:
    return partial.right / len(partial.response.ends)
