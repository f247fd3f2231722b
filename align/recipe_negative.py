"""The `training.negative` block of the recipe: what is wrong enough to learn from, and whether that has a chance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from align.recipe_base import Block, Count, Fraction, NonNegative, Positive

if TYPE_CHECKING:
    from align.recipe import Recipe

_SIGNED = ("right_from", "wrong_below", "denominator", "entropy_bonus", "entropy_stop")
_REINFORCED = (*_SIGNED, "form", "clip")
READS: dict[str, tuple[str, ...]] = {
    "d2o": ("wrong_below", "self_samples", "self_from", "dispreferred_column", "entropy_stop", "preflight"),
    "nsr": (*_REINFORCED, "preflight"),
    "psr": _REINFORCED,
    "w_reinforce": (*_REINFORCED, "positive_weight"),
    "unlikelihood": (*_SIGNED, "preflight"),
}
"""The fields of `training.negative` that each algorithm reads."""
NEGATIVE_ONLY = ("d2o", "nsr", "unlikelihood")
"""Algorithms that are told what is wrong and never what is right: they rest on what the model knows already."""
FALLBACK = "w_reinforce"
"""What the pre-flight falls back to."""
OWN_SAMPLES = ("nsr", "psr", "w_reinforce")
"""Algorithms whose gradient is an expectation under the policy itself."""


class Preflight(Block):
    """Before round 0: does the policy find right answers at all, so that it is enough to be told the wrong ones?

    Negative-only training moves probability to what the policy believes already.  It gets a chance where pass@k of the
    largest k is high and still rises; the thresholds are rules of thumb, not of a paper.
    """

    mode: Literal["refuse", "fallback", "off"] = "refuse"
    """Without a chance: stop the run, train with `w_reinforce` instead, or do not look."""
    prompts: Count = 200
    """Held-out prompts; fewer where the split has fewer."""
    samples_per_prompt: Annotated[int, Field(ge=2)] = 64
    """Responses to each: the largest k, unless more than a tenth of the prompts have fewer judged responses."""
    min_pass: Fraction = 0.9
    """pass@k of the largest k must reach this."""
    rise_from: Count = 8
    """And it must be above pass@k of this k, unless nearly all is found there already."""
    min_rise: NonNegative = 0.005
    """By at least this much."""
    judge: Literal["gold", "ensemble"] | None = None
    """Who says what is right. Default: the gold verifier where it answers yes or no, else the ensemble's P(good)."""


class Negative(Block):
    """Settings of the negative-sample trainers; one that the chosen algorithm does not read is refused."""

    right_from: Fraction = 0.5
    """A response is right, +1, where its P(good) reaches this."""
    wrong_below: Fraction = 0.5
    """A response is wrong, -1, where its P(good) is below this; between the two it is left out and counted."""
    form: Literal["ratio", "probability"] = "ratio"
    """The paper's code has PPO's ratio, its text the token probability, whose gradient has one more factor π."""
    clip: Positive = 0.2
    """How far from 1 the ratio of new to old probability is followed."""
    positive_weight: NonNegative = 0.1
    """λ of w_reinforce: what a right response counts against a wrong one; 1 is REINFORCE."""
    denominator: Literal["all", "trained"] = "all"
    """Divide by the tokens of all judged responses, or of those that train: then steps grow as accuracy rises."""
    entropy_bonus: NonNegative = 0.0
    """Factor of the mean token entropy that is taken off the loss; the paper's code has 0.001."""
    entropy_stop: Fraction | None = None
    """Stop training for good once the token entropy is below this share of the first step's; the run ends with that
    round. Default: 0.25 for d2o, never for the others."""
    self_samples: Count = 11
    """D2O: at most this many of the policy's own responses stand against a wrong one."""
    self_from: Fraction = 0.5
    """D2O: own responses with a lower P(good) are left out and counted; 0 keeps all."""
    dispreferred_column: str | None = None
    """D2O: column of `prompts.source` with a bad answer to each training prompt, the one that own responses stand
    against; a repetition of it among them is left out. Default: the worst own response, where that is wrong."""
    preflight: Preflight = Preflight()
    """A look at pass@k before negative-only training begins."""


def preflight_judge(recipe: Recipe) -> str:
    """Who says what is right before negative-only training: as the recipe says, or gold where it answers yes or no."""
    asked, gold = recipe.training.negative.preflight.judge, recipe.evaluation.gold
    return asked or ("gold" if gold is not None and gold.output == "binary" else "ensemble")


def looks_before(recipe: Recipe) -> bool:
    """Whether there is a pre-flight."""
    return recipe.training.algorithm in NEGATIVE_ONLY and recipe.training.negative.preflight.mode != "off"


def negative_faults(recipe: Recipe) -> list[str]:
    """What is wrong with `training.negative` in this recipe; each line begins with its key."""
    name, settings = recipe.training.algorithm, recipe.training.negative
    reads: tuple[str, ...] = READS[name]
    if name in NEGATIVE_ONLY and settings.preflight.mode == "fallback":
        reads = (*reads, *READS[FALLBACK])  # they may be read yet
    key = "training.negative"
    wrong = [f"{key}.{k}: {name} does not read it; take it out" for k in settings.changed() if k not in reads]
    if "right_from" in reads and settings.wrong_below > settings.right_from:
        wrong.append(f"{key}.wrong_below: is above right_from, so a response could be right and wrong at once")
    if "clip" in settings.changed() and settings.form == "probability":
        wrong.append(f"{key}.clip: only `form: ratio` reads it; take it out")
    if name in OWN_SAMPLES or name in NEGATIVE_ONLY and settings.preflight.mode == "fallback":
        cut = [k for k, plain in (("top_p", 1.0), ("top_k", 0)) if getattr(recipe.sampling, k) != plain]
        wrong += [
            f"sampling.{k}: {name} needs samples of the policy itself, and a cut-off draws from another distribution; "
            "take it out"
            for k in cut
        ]
    if not recipe.training.loss_facts.reference and recipe.training.reference == "round":
        wrong.append(f"training.reference: {name} knows no reference; take it out")
    if "preflight" in READS[name]:
        wrong += _preflight_faults(recipe)
    if name == "d2o" and settings.dispreferred_column is not None:
        wrong += _dispreferred_faults(recipe)
    return wrong


def _dispreferred_faults(recipe: Recipe) -> list[str]:
    settings, prompts = recipe.training.negative, recipe.prompts
    column, key = settings.dispreferred_column, "training.negative.dispreferred_column"
    wrong = []
    if prompts.source == "arithmetic":
        wrong.append(f"{key}: reads the column {column!r}, and the built-in task has no columns; name a file")
    wrong += [
        f"{key}: {column!r} is prompts.{other} already; name the column of the bad answers"
        for other in ("prompt_column", "answer_column", "split_column")
        if getattr(prompts, other) == column
    ]
    if "wrong_below" in settings.changed() and settings.preflight.mode != "fallback":
        wrong.append("training.negative.wrong_below: no one reads it with dispreferred_column, whose answers are wrong "
                     "whatever their P(good); take it out")  # fmt: skip
    return wrong


def _preflight_faults(recipe: Recipe) -> list[str]:
    look, key = recipe.training.negative.preflight, "training.negative.preflight"
    if look.mode == "off":
        return [f"{key}.{k}: is read by no one with mode: off; take it out" for k in look.changed() if k != "mode"]
    wrong = []
    if look.rise_from >= look.samples_per_prompt:
        wrong.append(f"{key}.rise_from: pass@k can only rise up to samples_per_prompt, {look.samples_per_prompt}")
    gold = recipe.evaluation.gold
    if look.judge == "gold" and gold is None:
        wrong.append(f"{key}.judge: there is no evaluation.gold; name one, or take `judge` out")
    if look.judge == "gold" and gold is not None and gold.output != "binary":
        wrong.append(f"{key}.judge: pass@k counts right answers, and {gold.name} gives scores; take `judge` out")
    if look.mode == "fallback" and recipe.training.negative.positive_weight == 0:
        wrong.append("training.negative.positive_weight: 0 would fall back to what had no chance; 0.1 is usual")
    return wrong
