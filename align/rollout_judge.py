"""What is correct, in the eyes of the recipe: the ensemble of its verifiers, or one of them that it names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from align.labels import combine_told, told
from align.records import Prompt, Sample, Score, Verdict
from align.verifiers.base import Item
from align.verifiers.runner import VerifierPool, count_reasons

if TYPE_CHECKING:
    from align.run import Run


def judged_scores(run: Run, round_index: int) -> list[Score]:
    """The round's scores: those of the ensemble, or the verdicts of the one judge."""
    judge = run.recipe.pairs.steps.judge
    if judge is None:
        return list(run.read(round_index, "scores"))
    prompt_of = {s.id: s.prompt_id for s in run.read(round_index, "samples")}
    return [
        Score(v.sample_id, prompt_of[v.sample_id], v.value, v.value, 0.0, 1)
        for v in run.read(round_index, "verdicts")
        if v.verifier == judge and v.value is not None
    ]


class Judge:
    """P(good) of responses that a rollout completed.

    The label model sees them beside the round's own verdicts, so that it is fitted on at least those: what it makes
    of a rollout depends on the round and on the rollouts judged with it, never on which rank asks.
    """

    def __init__(self, run: Run, round_index: int) -> None:
        self._run, self._round = run, round_index
        name = run.recipe.pairs.steps.judge
        self._specs = tuple(v for v in run.recipe.verifiers if name in (None, v.name))
        self._alone = VerifierPool(self._specs, seed=run.recipe.seed) if name is not None else None
        self._told: set[str] = set()

    def p_good(self, rows: Sequence[Sample], questions: Sequence[Prompt], begun: Sequence[str]) -> list[float | None]:
        """One number per continuation, or None where too few verifiers spoke; begun[i] is the text before rows[i]."""
        pool = self._alone or self._run.verifier_pool(gold=False)
        verdicts = pool.verify([_item(*of) for of in zip(rows, questions, begun, strict=True)])
        self._tell(verdicts, len(rows))
        if self._alone is not None:
            return [v.value for v in verdicts]
        samples = self._run.read(self._round, "samples")
        everything = [*self._run.read(self._round, "verdicts"), *verdicts]
        known = told(self._run, self._round)
        found = combine_told(self._run, [*samples, *rows], everything, self._specs, known)
        least = self._run.recipe.ensemble.min_voters
        both = zip(found.p_good[len(samples) :], found.voters[len(samples) :], strict=True)
        return [float(p) if voters >= least else None for p, voters in both]

    def close(self) -> None:
        """End the process of the one judge."""
        if self._alone is not None:
            self._alone.close()

    def _tell(self, verdicts: Sequence[Verdict], count: int) -> None:
        """Say once, per verifier, why it abstained."""
        for name, reasons in count_reasons(verdicts).items():
            if name not in self._told:
                self._told.add(name)
                reason, times = reasons.most_common(1)[0]
                self._run.say(f"rollouts: {name} gave no verdict on {times} of {count}: {reason}")


def _item(row: Sample, question: Prompt, begun: str) -> Item:
    """The whole response, for a verifier; responses that go on from one prefix are judged beside each other."""
    return Item(
        sample_id=row.id,
        prompt_id=row.prompt_id,
        prompt=question.text,
        response=begun + row.text,
        answer=question.answer,
        response_tokens=len(row.prompt_ids) - len(question.token_ids) + len(row.response_ids),
        finish_reason=row.finish_reason,
        columns=question.columns,
        turns=question.turns,
    )
