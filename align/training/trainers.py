"""A round's data, and which trainer learns from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from align.pairs import pairs_per_prompt
from align.records import Given, Pair, Sample, Score

if TYPE_CHECKING:
    from align.recipe import Recipe
    from align.training.engine import PolicyEngine
    from align.training.steps import TrainReport

OnStep = Callable[[dict[str, Any]], None]


def _nothing(stage: str) -> list[Any]:
    return []


@dataclass(frozen=True)
class RoundData:
    """What a round has to learn from.

    Example: RoundData(0, samples={"9c…": Sample(…)}, pairs=[Pair(…)])
    """

    round: int
    samples: Mapping[str, Sample]  # by id; whatever pairs and scores name is in it
    scores: Sequence[Score] = ()
    pairs: Sequence[Pair] = ()
    dispreferred: Mapping[str, Given] = field(default_factory=dict)  # by prompt id, where the recipe names the column
    read: Callable[[str], list[Any]] = field(default=_nothing)  # another artifact of the round, such as "verdicts"


def train_round(engine: PolicyEngine, data: RoundData, recipe: Recipe, on_step: OnStep) -> TrainReport:
    """Train on a round with the recipe's trainer; `on_step` gets each step's metrics, on every rank.  Collective.

    Raises NotFiniteError on every rank, before the optimizer step, where a loss or a gradient is not finite on any.
    """
    engine.begin_round(data.round)
    report: TrainReport = import_module(recipe.training.trainer.module).train_round(engine, data, recipe, on_step)
    return report


def examples_per_round(recipe: Recipe) -> int:
    """Most pairs or responses that a round gives to its trainer."""
    each = pairs_per_prompt(recipe) if recipe.training.trainer.consumes == "pairs" else 0
    return recipe.rounds.prompts_per_round * (each or recipe.sampling.samples_per_prompt)


def steps_per_round(recipe: Recipe, examples: int | None = None) -> int:
    """Optimizer steps of a round at most: what the learning-rate schedule and the progress bar span."""
    training = recipe.training
    size = training.pairs_per_step if training.trainer.consumes == "pairs" else _whole_prompts(recipe)
    return training.epochs * math.ceil((examples_per_round(recipe) if examples is None else examples) / size)


def _whole_prompts(recipe: Recipe) -> int:
    """Responses of a step once its prompts are kept whole."""
    return prompts_per_step(recipe) * recipe.sampling.samples_per_prompt


def learned_per_prompt(recipe: Recipe) -> int:
    """Most responses to one prompt that a trainer learns from."""
    drawn, supervised = recipe.sampling.samples_per_prompt, recipe.training.supervised
    name = recipe.training.loss_facts.name
    if name == "best_of_n":
        share = supervised.best_fraction
        return min(drawn, supervised.best if share is None else math.ceil(share * drawn))
    return 1 if name == "sharpening" else drawn


def prompts_per_step(recipe: Recipe) -> int:
    """Prompts whose responses make up a step of a trainer that learns from scores."""
    return max(1, recipe.training.responses_per_step // learned_per_prompt(recipe))
