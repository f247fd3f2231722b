"""A chain of eight steps of which two matter, small enough to know everything about it, for the per-step builders.

A response has one token per step.  At steps 3 and 6 token 0 is right and has probability .2345; everywhere else any
token will do.  So a response is correct with probability .055, and a wrong one is lost at the first of the two steps
that goes wrong.

Legend: S steps, V tokens of a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from align.builders.per_step import Candidates, bad_step, per_step
from align.builders.steps import Prefix, Stepped, cut
from align.builders.values import Drawn, Valued, value_prefixes
from align.pairs import keep_pairs
from align.recipe import Pairs
from align.recipe_steps import Steps
from align.records import Pair, Sample, Score, content_id

S, V, CRITICAL, RIGHT = 8, 8, (2, 5), 0.055**0.5


def letters(ids: Sequence[int]) -> str:
    return "".join("abcdefghij"[i] for i in ids)


def base_policy() -> np.ndarray:
    """[S, V] probability of each token at each step."""
    policy = np.full((S, V), 1.0 / V)
    policy[CRITICAL, :] = (1.0 - RIGHT) / (V - 1)
    policy[CRITICAL, 0] = RIGHT
    return policy


def is_correct(ids: Sequence[int]) -> bool:
    return all(ids[c] == 0 for c in CRITICAL)


class Chain:
    """Draws responses and continuations with a generator of its own, as the sampler would."""

    def __init__(self, seed: int, best_of: int, rollouts: int, **settings: object) -> None:
        self.rng = np.random.default_rng(seed)
        self.policy = base_policy()
        made = {"rule": "tokens", "tokens_per_step": 1, "best_of": best_of, "rollouts": rollouts, **settings}
        self.settings = Steps(**made)

    def tokens(self, begin: int, count: int) -> np.ndarray:
        """[count, S - begin] tokens of the steps from `begin` on."""
        edges = self.policy[begin:, :-1].cumsum(axis=1)  # [S - begin, V - 1]
        return (self.rng.random((count, S - begin, 1)) > edges).sum(axis=2)

    def response(self, prompt: str, index: int, correct: bool) -> Sample:
        while True:
            ids = tuple(self.tokens(0, 1)[0].tolist())
            if is_correct(ids) == correct:
                return make_sample(content_id(prompt, index), prompt, ids, index=index)

    def draw(self, prefixes: Sequence[Prefix]) -> list[list[Drawn]]:
        """The sampler and the verifier of the chain."""
        found = []
        n = self.settings.rollouts * self.settings.best_of
        for prefix in prefixes:
            rows = self.tokens(len(prefix.ids), n).tolist()
            judged = [float(is_correct((*prefix.ids, *row))) for row in rows]
            last = {good: tuple(row) for row, good in zip(rows, judged, strict=True)}  # one of each is enough
            sample = {
                good: make_sample(content_id(prefix.id, good), prefix.id, row, (9, *prefix.ids))
                for good, row in last.items()
            }
            found.append([Drawn(sample[good], good) for good in judged])
        return found

    def pit(self, response: Sample) -> int:
        """Where the response is really lost, counted from 1."""
        return next(c + 1 for c in CRITICAL if response.response_ids[c] != 0)

    def hit_rate(self, count: int) -> float:
        """How often the first pit is found, over `count` wrong responses."""
        responses = [cut(self.response(f"p{i}", 0, correct=False), self.settings, letters) for i in range(count)]
        valued = value_prefixes(responses, self.draw, self.settings)
        return float(np.mean([bad_step(r, valued.values, self.settings) == self.pit(r.sample) for r in responses]))

    def pairs(self, count: int) -> tuple[list[Pair], dict[str, Sample]]:
        """`count` pairs, each of a prompt with one correct and one wrong response."""
        out, number = Candidates(), 0
        samples: dict[str, Sample] = {}
        while len(out.pairs) < count:
            prompt, number = f"p{number}", number + 1
            correct, wrong = self.response(prompt, 0, True), self.response(prompt, 1, False)
            samples |= {correct.id: correct, wrong.id: wrong}
            response: Stepped = cut(wrong, self.settings, letters)
            valued: Valued = value_prefixes([response], self.draw, self.settings)
            per_step([response], [Score(correct.id, prompt, 1.0, 1.0, 0.0, 1)], samples, valued, self.settings, out)
        everything = {**samples, **out.samples}
        settings = Pairs(builder="per_step", labels="hard", steps=self.settings)
        return list(keep_pairs(list(out.pairs.values()), everything, settings, {}).pairs), everything


def make_sample(
    identity: str, prompt: str, ids: tuple[int, ...], prompt_ids: tuple[int, ...] = (9,), index: int = 0
) -> Sample:
    return Sample(
        identity, prompt, index, 0, 0, prompt_ids, ids, (-1.0,) * len(ids), letters(ids), "stop", 1.0, 1.0, 0, S
    )
