"""What a prefix is worth: the success rate of rollouts that go on from it.

A rollout draws `best_of` continuations and succeeds where the best of them is correct, so

    Q(x, y_1..i) = share of `rollouts` rollouts that succeed,    A_i = Q_i - Q_{i-1}.

With a policy that seldom succeeds, single continuations would give 0 nearly everywhere; the best of several tells
apart what can still be saved from what cannot.  Setlur et al., arXiv 2406.14532.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from align.builders.steps import Prefix, Stepped
from align.recipe_steps import Steps
from align.records import PrefixValue, Sample, Score


@dataclass(frozen=True, slots=True)
class Drawn:
    """A continuation of a prefix, and P(good) of the response that it completes; None where no verifier spoke."""

    sample: Sample
    p_good: float | None


Draw = Callable[[Sequence[Prefix]], Sequence[Sequence[Drawn]]]
"""`rollouts` x `best_of` continuations of each prefix."""


@dataclass(frozen=True, slots=True)
class Valued:
    """The values of some prefixes, and of each the best continuation, where it is correct.

    Example: Valued(values={"5d…": PrefixValue("5d…", …, value=0.4)}, best={"5d…": sample})
    """

    values: dict[str, PrefixValue]
    best: dict[str, Sample]


def begin_at(settings: Steps) -> int:
    """The shortest prefix that is valued: the prompt alone only where a pair could need it."""
    return 0 if settings.mode == "advantage" or settings.shared_prefix else 1


def prefixes_of(responses: Sequence[Stepped], settings: Steps) -> dict[str, Prefix]:
    """Every prefix to be valued, each once.  The whole response is not among them: its own verdict says it all."""
    return _each_once([r.prefix(i) for r in responses for i in range(begin_at(settings), len(r.ends))])


def _each_once(prefixes: Iterable[Prefix]) -> dict[str, Prefix]:
    """By name; of several, the first stands."""
    found: dict[str, Prefix] = {}
    for prefix in prefixes:
        found.setdefault(prefix.id, prefix)
    return found


def tokens_at_most(responses: Sequence[Stepped], settings: Steps) -> tuple[int, int]:
    """(prefixes, tokens) that valuing these responses can take; pruning and early ends make it less."""
    prefixes = prefixes_of(responses, settings).values()
    room = sum(p.sample.max_new_tokens - len(p.ids) for p in prefixes)
    return len(prefixes), room * settings.rollouts * settings.best_of


def value_prefixes(responses: Sequence[Stepped], draw: Draw, settings: Steps) -> Valued:
    """The values of the prefixes of wrong responses.

    With `prune` the prefixes of one length are valued together, then those of the next length of the responses that
    can still be saved; otherwise all at once, so that a longer prefix finds the shorter ones in the sampler's cache.
    """
    found = Valued({}, {})
    if not settings.prune:
        _value(list(prefixes_of(responses, settings).values()), draw, settings, found)
        return found
    alive = list(responses)
    step = begin_at(settings)
    while alive:
        _value(list(_each_once(r.prefix(step) for r in alive).values()), draw, settings, found)
        step += 1
        alive = [r for r in alive if step < len(r.ends) and _goes_on(found.values[r.prefix(step - 1).id])]
    return found


def _goes_on(value: PrefixValue) -> bool:
    """Whether longer prefixes are worth looking at; one that nobody could judge tells nothing, and ends it too."""
    return value.rollouts > 0 and value.value > 0.0


def _value(prefixes: Sequence[Prefix], draw: Draw, settings: Steps, found: Valued) -> None:
    """Draw from these prefixes and add their values to `found`."""
    for prefix, drawn in zip(prefixes, draw(prefixes), strict=True):
        if len(drawn) != settings.rollouts * settings.best_of:
            wanted = f"{settings.rollouts} x {settings.best_of}"
            raise ValueError(f"{len(drawn)} continuations of {prefix.id!r}, not {wanted}")
        groups = [drawn[i : i + settings.best_of] for i in range(0, len(drawn), settings.best_of)]
        judged = [[d.p_good for d in group if d.p_good is not None] for group in groups]
        best = [max(group) for group in judged if group]
        successes = sum(p >= settings.good for p in best)
        top = max((d for d in drawn if d.p_good is not None), key=lambda d: d.p_good or 0.0, default=None)
        found.values[prefix.id] = PrefixValue(
            id=prefix.id,
            prompt_id=prefix.sample.prompt_id,
            sample_id=prefix.sample.id,
            step=prefix.steps,
            tokens=len(prefix.ids),
            rollouts=len(best),
            value=successes / len(best) if best else 0.0,
            best=top.p_good or 0.0 if top is not None else 0.0,
        )
        if top is not None and successes and top.sample.response_ids:
            found.best[prefix.id] = top.sample


def wrong_responses(
    scores: Sequence[Score], samples: Mapping[str, Sample], settings: Steps
) -> tuple[list[Sample], list[Score]]:
    """One prompt's wrong responses that are looked into, in the order in which they were drawn, and its correct ones.

    Correct ones come best first.  Of equal responses one is enough.
    """
    correct = sorted((s for s in scores if s.p_good >= settings.good), key=lambda s: (-s.reward, s.sample_id))
    wrong: dict[tuple[int, ...], Sample] = {}
    bad = [samples[s.sample_id] for s in scores if s.p_good < settings.good]
    for sample in sorted(bad, key=lambda s: (s.index, s.id)):
        wrong.setdefault(sample.response_ids, sample)
    return list(wrong.values()), correct
