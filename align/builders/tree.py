"""A search over steps: each place in the tree is a prefix of a response, and its children are ways to go on.

From the prompt downwards the child with the highest

    value / (n + 1)  +  w * p * sqrt(ln N / (n + 1))

is followed to a place that was not expanded, where value is the sum of the rewards below the child, n its visits, N
those of its parent and p the policy's own probability of the step, per token.  There some continuations are drawn to
their end: the first step of each is a child, and P(good) - 0.5 of the whole response its reward, which every place
above it gets too.  A place whose best and worst child are far apart in value, and not alike, gives a pair.

The selection score is that of iTool (arXiv 2501.09766); the usual one has 2 ln N / n under the root.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher

from align.builders.per_step import UNJUDGED, Candidates
from align.builders.steps import Prefix, Stepped, part
from align.recipe_steps import Tree
from align.records import PrefixValue, Sample

TOO_CLOSE, TOO_ALIKE, TOO_BAD, ONE_CHILD = "too_close", "too_alike", "too_bad", "one_child"


@dataclass
class Place:
    """A place in the tree.

    Example: Place(prefix, sample, prior=0.4, value=0.9, visits=3): three responses went through it, worth 0.3 each.
    """

    prefix: Prefix
    step: Sample | None  # the step that leads here, as a sample that continues its parent; None at the root
    prior: float = 1.0  # p, the policy's probability of that step per token: exp of the mean log-probability
    ended: bool = False  # the response ends with this step
    value: float = 0.0
    visits: int = 0
    children: list[Place] = field(default_factory=list)
    expanded: bool = False

    @property
    def mean(self) -> float:
        """Reward per visit."""
        return self.value / self.visits if self.visits else 0.0

    def walk(self) -> Iterator[Place]:
        """This place and all below it."""
        yield self
        for child in self.children:
            yield from child.walk()


def selection_score(child: Place, parent_visits: int, exploration: float) -> float:
    """value / (n + 1) + w p sqrt(ln N / (n + 1)); N = 0 counts as 1.

    Example: value 0.5, n = 1, p = 0.5, N = 4, w = 1 give 0.25 + 0.5 * sqrt(ln 4 / 2) = 0.6663.
    """
    n = child.visits + 1
    return child.value / n + exploration * child.prior * math.sqrt(math.log(max(parent_visits, 1)) / n)


def select(root: Place, settings: Tree) -> list[Place] | None:
    """The places from the root to the one to expand; None where nothing is left to expand."""
    if not _open(root, settings):
        return None
    path = [root]
    while path[-1].expanded:
        here = path[-1]
        going = [child for child in here.children if _open(child, settings)]
        path.append(max(going, key=lambda c: selection_score(c, here.visits, settings.exploration)))
    return path


def _open(place: Place, settings: Tree) -> bool:
    """Whether there is a place at or below this one that can be expanded."""
    if place.expanded:
        return any(_open(child, settings) for child in place.children)
    return not place.ended and place.prefix.steps < settings.depth


def expand(path: Sequence[Place], drawn: Sequence[tuple[Stepped, float | None]]) -> None:
    """Add the first steps of these continuations of the last place of the path as its children.

    Each comes with P(good) of the response that it completes.  Continuations with the same first step are one child;
    one that nobody could judge gives no child.
    """
    here = path[-1]
    here.expanded = True
    known = {child.prefix.id: child for child in here.children}
    for continuation, p_good in drawn:
        if p_good is None:
            continue
        child = _child(here, continuation)
        child = known.setdefault(child.prefix.id, child)
        for place in (*path, child):
            place.visits += 1
            place.value += p_good - 0.5
    here.children = list(known.values())


def _child(parent: Place, continuation: Stepped) -> Place:
    end = continuation.ends[0]
    step = part(continuation.sample, 0, end, continuation.pieces[0])
    prefix = parent.prefix.then(step)
    prior = math.exp(sum(step.logprobs) / len(step.logprobs))
    return Place(prefix, step, prior, ended=end == len(continuation.sample.response_ids))


def records(root: Place) -> tuple[list[PrefixValue], list[Sample]]:
    """The values of all places below the root, and the steps that lead to them."""
    places = [place for place in root.walk() if place.step is not None]
    steps = [place.step for place in places if place.step is not None]
    values = [
        PrefixValue(
            id=place.prefix.id,
            prompt_id=root.prefix.id,
            sample_id=step.id,
            step=place.prefix.steps,
            tokens=len(place.prefix.ids),
            rollouts=place.visits,
            value=place.mean,
            best=max(0.0, min(1.0, place.mean + 0.5)),
        )
        for place, step in zip(places, steps, strict=True)
    ]
    return values, steps


def similarity(a: Sequence[int], b: Sequence[int]) -> float:
    """2 M / T: M tokens in matching blocks of T in all; 1 where the two are the same.

    Example: (1, 2, 3, 4) and (1, 2, 5, 4) give 2 * 3 / 8 = 0.75.
    """
    return SequenceMatcher(None, a, b, autojunk=False).ratio()


def tree_pairs(
    prompt_id: str, values: Sequence[PrefixValue], steps: Sequence[Sample], settings: Tree, out: Candidates
) -> None:
    """One prompt's candidates: the best against the worst child of every place; values[i] is that of steps[i]."""
    places: dict[str, list[tuple[PrefixValue, Sample]]] = {}
    for value, step in zip(values, steps, strict=True):
        places.setdefault(step.prompt_id, []).append((value, step))
    if not places:
        return out.leave_out(UNJUDGED)
    for children in places.values():
        best = min(children, key=lambda c: (-c[0].value, c[1].id))
        worst = min(children, key=lambda c: (c[0].value, c[1].id))
        if len(children) < 2:
            out.leave_out(ONE_CHILD)
        elif best[0].value - worst[0].value < settings.min_gap:
            out.leave_out(TOO_CLOSE)
        elif best[0].value < settings.min_best:
            out.leave_out(TOO_BAD)
        elif similarity(best[1].response_ids, worst[1].response_ids) > settings.max_similarity:
            out.leave_out(TOO_ALIKE)
        else:
            out.add(prompt_id, (best[1], best[0].best), (worst[1], worst[0].best))
