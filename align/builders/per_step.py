"""Per-step pairs: the step at which a wrong response goes wrong, against something that goes on well.

The first pit of a wrong response y with steps 1 … S is the first step with the lowest value; in the other mode the bad
step is the one with the lowest advantage.  The pair is

    prompt x:                     a correct response        against  y cut behind the bad step,
    shared prefix, x + y_1..c-1:  its best continuation     against  the bad step y_c alone.

Given pairs that share the prefix and are chosen by advantage, DPO on them is advantage-weighted reinforcement learning
(Setlur et al., arXiv 2406.14532).  The shared-prefix form leaves the steps that do not matter alone.  Where only the
first step of the continuation is set against the bad one, a handful of pairs teaches less than whole responses do,
because each pair says less.

Legend: S steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from align.builders.steps import Stepped, part
from align.builders.values import Valued, begin_at
from align.recipe_steps import Steps
from align.records import PrefixValue, Sample, Score

ALL_ZERO, UNJUDGED, NO_CORRECT, NO_LOSS, REPEATED = "all_zero", "unjudged", "no_correct", "no_loss", "repeated"


@dataclass
class Candidates:
    """What may become pairs: (better, worse) by prompt, the samples made for them, and what was left out.

    Example: Candidates(pairs={"3f…": [(Score(…), Score(…))]}, samples={"a0…": Sample(…)}, counts={"all_zero": 1})
    """

    pairs: dict[str, list[tuple[Score, Score]]] = field(default_factory=dict)
    samples: dict[str, Sample] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    seen: set[tuple[tuple[int, ...], ...]] = field(default_factory=set)

    def add(self, prompt_id: str, better: tuple[Sample, float], worse: tuple[Sample, float]) -> None:
        """Propose a pair: each side a sample and its P(good).  The same tokens again are counted, not proposed."""
        ids = (better[0].prompt_ids, better[0].response_ids, worse[0].response_ids)
        if ids in self.seen:
            return self.leave_out(REPEATED)
        self.seen.add(ids)
        sides = []
        for sample, p_good in (better, worse):
            self.samples[sample.id] = sample
            sides.append(Score(sample.id, sample.prompt_id, p_good, p_good, 0.0, 1))
        self.pairs.setdefault(prompt_id, []).append((sides[0], sides[1]))

    def leave_out(self, reason: str) -> None:
        """Count something that becomes no pair."""
        self.counts[reason] = self.counts.get(reason, 0) + 1


def step_values(response: Stepped, values: Mapping[str, PrefixValue], begin: int) -> list[float] | None:
    """Q of the prefixes of `begin`, `begin + 1`, … S steps; None where one could not be judged.

    Behind a pruned prefix all values are 0, and so is that of the whole response, which is wrong.
    """
    found: list[float] = []
    for i in range(begin, len(response.ends)):
        value = values.get(response.prefix(i).id)
        if value is None:
            assert found and found[-1] == 0.0, "only what follows a value of 0 is pruned"
            found.append(0.0)
        elif not value.rollouts:
            return None
        else:
            found.append(value.value)
    return [*found, 0.0]


def first_pit(values: Sequence[float]) -> int:
    """The first step with the lowest value; values[i] is that after step i + 1.  Steps count from 1.

    Example: first_pit([0.8, 0.2, 0.5, 0.2]) == 2.
    """
    return min(range(len(values)), key=lambda i: values[i]) + 1


def worst_advantage(values: Sequence[float]) -> int:
    """The first step with the lowest advantage; values[i] is that after step i, values[0] the prompt's.

    Example: worst_advantage([0.9, 0.8, 0.2, 0.0]) == 2, where A = (-0.1, -0.6, -0.2).
    """
    return min(range(1, len(values)), key=lambda i: values[i] - values[i - 1])


def bad_step(response: Stepped, values: Mapping[str, PrefixValue], settings: Steps) -> int | str:
    """The bad step, counted from 1, or why the response has none."""
    begin = begin_at(settings)
    found = step_values(response, values, begin)
    if found is None:
        return UNJUDGED
    after = found[1 - begin :]  # after[i]: behind step i + 1
    if not any(after):
        return ALL_ZERO
    if settings.mode == "first_pit":
        return first_pit(after)
    step = worst_advantage(found)
    return step if found[step] < found[step - 1] else NO_LOSS


def per_step(
    wrong: Sequence[Stepped],
    correct: Sequence[Score],
    samples: Mapping[str, Sample],
    valued: Valued,
    settings: Steps,
    out: Candidates,
) -> None:
    """One prompt's candidates.  `correct` come best first; the wrong responses take them in turn."""
    turn = 0
    for response in wrong:
        step = bad_step(response, valued.values, settings)
        if isinstance(step, str):
            out.leave_out(step)
            continue
        sample, begin, end = response.sample, response.ends[step - 2] if step > 1 else 0, response.ends[step - 1]
        after = valued.values.get(response.prefix(step).id)
        worth = after.value if after is not None and step < len(response.ends) else 0.0
        if settings.shared_prefix:
            place = response.prefix(step - 1).id
            if place not in valued.best:
                out.leave_out(NO_CORRECT)
                continue
            better = valued.best[place], valued.values[place].best
            worse = part(sample, begin, end, response.pieces[step - 1])
        elif correct:
            score = correct[turn % len(correct)]
            turn += 1
            better = samples[score.sample_id], score.p_good
            worse = part(sample, 0, end, "".join(response.pieces[:step]))
        else:
            out.leave_out(NO_CORRECT)
            continue
        out.add(sample.prompt_id, better, (worse, worth))
