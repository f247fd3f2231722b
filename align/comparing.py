"""Asks the recipe's pairwise judge who of two responses is better; what it says is an artifact of the round.

Pairwise GRPO asks about every two of a prompt's responses, pairwise PPO about each and the prompt's greedy one, and
always in both orders: a judge that prefers what it reads first would otherwise be believed.  Where no answer can be
read there is none with the reason, never 0.  Committed shard by shard before the verifiers are asked, so that a judge
who is one of them, as it always is, answers no question twice.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby, permutations
from typing import TYPE_CHECKING, Any

from align.errors import AlignError
from align.faults import reach
from align.progress import track
from align.recipe_rl import questions_per_prompt
from align.records import Comparison, Prompt, Sample
from align.training.rewards import is_greedy
from align.verifiers.base import Abstain, Item, clean, describe_error
from align.verifiers.judge import PairwiseJudge

if TYPE_CHECKING:
    from align.run import Run

STAGE, REPORT = "comparisons", "comparing"


def compare(run: Run, round_index: int, prompts: dict[str, Prompt]) -> None:
    """Ask about the shards of samples that have no committed answers yet; nothing where no judge is named.

    Collective.
    """
    name = run.recipe.training.reward.judge
    if name is None:
        return
    store = run.store
    if not store.stage_done(round_index, STAGE):
        _ask_shards(run, round_index, name, prompts)
        reach("score.comparisons.after")
    if run.ranks.rank == 0 and store.read_json(round_index, REPORT) is None:
        told = report(name, run.read(round_index, STAGE), _sign(run, name))
        run.keep(round_index, REPORT, told)
        run.say(f"round {round_index}: {explain(told)}")
    if not store.stage_done(round_index, "verdicts"):
        sign = _sign(run, name)
        _judge(run, name).remember(
            {
                (c.first_id, c.second_id): Abstain(c.reason) if c.strength is None else sign * c.strength
                for c in run.read(round_index, STAGE)
            }
        )


def _ask_shards(run: Run, round_index: int, name: str, prompts: dict[str, Prompt]) -> None:
    from align.stages import items

    store, ranks, recipe = run.store, run.ranks, run.recipe
    samples, size = run.read(round_index, "samples"), run.samples_per_shard("samples")
    shards = [samples[i : i + size] for i in range(0, len(samples), size)]
    pending = ranks.broadcast([i for i in range(len(shards)) if not store.shard_done(round_index, STAGE, i)])
    most = len(prompts) * questions_per_prompt(recipe)
    run.say(f"round {round_index}: {name} is asked {most:,} questions about two responses (training.reward.judge)")
    with run.timed("compare"), ranks.stage(STAGE):
        judge = _judge(run, name)
        mine = pending[ranks.rank :: ranks.world_size]
        label, total = f"round {round_index}: {STAGE}", sum(len(shards[i]) for i in mine)
        with track(label, total=total, unit="samples") as bar:
            for i in mine:
                shown = dict(zip((s.id for s in shards[i]), items(shards[i], prompts), strict=True))
                asked = [(shown[a], shown[b]) for a, b in questions(recipe.training.algorithm, shards[i])]
                rows = comparisons(name, asked, answers(judge, asked), _sign(run, name))
                store.commit_shard(round_index, STAGE, i, rows)
                bar.advance(len(shards[i]))
                reach("score.comparisons.shard")
    store.commit_stage(round_index, STAGE, len(shards))


def _judge(run: Run, name: str) -> PairwiseJudge:
    judge = run.verifier_pool(gold=False).in_process(name)
    assert isinstance(judge, PairwiseJudge), "the recipe's checks let no other through"
    return judge


def _sign(run: Run, name: str) -> float:
    """-1 for a judge that is known to prefer the wrong end, 1 for any other."""
    return next(-1.0 if v.invert else 1.0 for v in run.recipe.verifiers if v.name == name)


def questions(algorithm: str, samples: Sequence[Sample]) -> list[tuple[str, str]]:
    """Who is compared with whom, by sample id in the order shown; prompt by prompt.

    A response without a token is never trained on and not asked about.
    """
    by_prompt: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.response_ids:
            by_prompt.setdefault(sample.prompt_id, []).append(sample)
    found: list[tuple[str, str]] = []
    for group in by_prompt.values():
        drawn, greedy = ([s.id for s in group if is_greedy(s) == wanted] for wanted in (False, True))
        if algorithm == "pairwise_grpo":
            found += permutations(drawn, 2)
        else:
            found += [pair for a in drawn for b in greedy for pair in ((a, b), (b, a))]
    return found


def answers(judge: PairwiseJudge, asked: Sequence[tuple[Item, Item]]) -> list[float | Abstain]:
    """The judge's word on each question, all at once, and prompt by prompt where that raises.

    An error meant for the user (`AlignError`) ends the stage; any other is the reason of its prompt's questions.
    """
    try:
        return judge.strengths(asked)
    except AlignError:
        raise
    except Exception as error:
        parts = [list(part) for _, part in groupby(asked, key=lambda pair: pair[0].prompt_id)]
        if len(parts) == 1:
            return [Abstain(describe_error(error))] * len(asked)
        return [answer for part in parts for answer in answers(judge, part)]


def comparisons(
    name: str, asked: Sequence[tuple[Item, Item]], said: Sequence[float | Abstain], sign: float
) -> list[Comparison]:
    """The rows to keep; what is not a number is none with the reason."""
    rows = []
    for (first, second), answer in zip(asked, said, strict=True):
        if isinstance(answer, Abstain):
            strength, reason = None, clean(str(answer)) or "abstained"
        elif not math.isfinite(answer):
            strength, reason = None, f"returned {answer}"
        else:
            strength, reason = sign * answer, None
        rows.append(Comparison(first.prompt_id, first.sample_id, second.sample_id, name, strength, reason))
    return rows


def report(name: str, rows: Sequence[Comparison], sign: float) -> dict[str, Any]:
    """What the summary tells: questions, unread answers by reason, and the liking for the first place.

    That liking is the mean of (D_ij + D_ji) / 2 over the pairs that were answered both ways, 0 for a fair judge; `sign`
    is -1 where the answers were turned.
    """
    known = {(row.first_id, row.second_id): row.strength for row in rows if row.strength is not None}
    both = [(value + known[j, i]) / 2 for (i, j), value in known.items() if i < j and (j, i) in known]
    reasons = Counter(row.reason for row in rows if row.reason is not None)
    return {
        "judge": name,
        "questions": len(rows),
        "unread": len(rows) - len(known),
        "pairs_both_ways": len(both),
        "first_place": sign * sum(both) / len(both) if both else None,
        "reasons": dict(reasons.most_common(10)),
    }


def explain(told: Mapping[str, Any]) -> str:
    """The report as one line."""
    read = told["questions"] - told["unread"]
    first = "" if told["first_place"] is None else f"; liking for the first place {told['first_place']:+.3f}"
    reasons = "".join(f", {count} x {reason}" for reason, count in list(told["reasons"].items())[:3])
    return f"{told['judge']} answered {read:,} of {told['questions']:,} questions about two responses{first}{reasons}"
