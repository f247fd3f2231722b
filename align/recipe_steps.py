"""The `pairs.steps` block of the recipe: builders that look inside a response, step by step."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from align.recipe_base import Block, Count, Fraction, NonNegative, Positive


class Tree(Block):
    """How the tree of steps is searched."""

    actions: Annotated[int, Field(ge=2)] = 3
    """Continuations drawn from a place when it is expanded."""
    depth: Count = 3
    """Steps from the prompt to the deepest place."""
    iterations: Count = 5
    """Places expanded in each prompt's tree."""
    exploration: NonNegative = 1.0
    """Weight of the rarely visited in the selection score."""
    min_gap: NonNegative = 0.1
    """Least difference in value between the best and the worst continuation of a place."""
    max_similarity: Fraction = 0.95
    """Drop pairs whose two steps are more alike than this, 1 being equal tokens."""
    min_best: float = -0.3
    """Drop pairs whose better step is worth less than this; values lie in [-0.5, 0.5]."""
    temperature: Positive | None = None
    """Softmax temperature of the search. Default: `sampling.temperature`."""


class Steps(Block):
    """How responses are cut into steps, what each step is worth, and which steps become pairs."""

    rule: Literal["separator", "pattern", "tokens"] = "separator"
    """What ends a step: a text, a regular expression, or a number of tokens."""
    separator: Annotated[str, Field(min_length=1)] = "\n"
    """Text that ends a step, for `rule: separator`."""
    pattern: str | None = None
    """Regular expression whose every match ends a step, for `rule: pattern`."""
    tokens_per_step: Count = 32
    """Tokens of a step, for `rule: tokens`."""
    max_steps: Annotated[int, Field(ge=2)] = 16
    """Most steps of a response; further ones are joined to the last."""
    wrong_per_prompt: Count = 2
    """Most wrong responses of a prompt that are looked into."""
    good: Fraction = 0.5
    """A response counts as correct from this P(good) on."""
    judge: str | None = None
    """Name of the one binary verifier that says what is correct. Default: the ensemble of all of them."""
    rollouts: Count = 10
    """Rollouts from every prefix; the value of a prefix is the share of them that succeed."""
    best_of: Count = 5
    """Continuations drawn for one rollout, which succeeds where the best of them is correct."""
    mode: Literal["first_pit", "advantage"] = "first_pit"
    """The bad step: the first of the lowest value, or the one that loses most value."""
    shared_prefix: bool = False
    """Put the steps before the bad one into the prompt: a good continuation against the bad step alone."""
    against: Literal["continuation", "step"] = "continuation"
    """What stands against the bad step with `shared_prefix`: the good continuation to its end, or its first step."""
    prune: bool = True
    """Value prefixes one after another and stop behind the first that never succeeds."""
    state: str | None = None
    """Regular expression whose groups, found in a step, say where it has got to. Default: the step's text."""
    tree: Tree = Tree()
    """How the tree of steps is searched."""
    prompts_per_shard: Count = 16
    """Prompts valued and committed together: the unit that a resumed run repeats at most."""
    max_tokens: Count = 20_000_000
    """Refuse a round whose rollouts could take more tokens than this."""

    @model_validator(mode="after")
    def _rule_has_its_setting(self) -> Steps:
        for key in ("pattern", "state"):
            text = getattr(self, key)
            if text is not None:
                try:
                    re.compile(text)
                except re.error as error:
                    raise ValueError(f"{key}: {text!r} is no regular expression: {error}") from None
        if self.rule == "pattern" and self.pattern is None:
            raise ValueError("pattern: `rule: pattern` needs one")
        return self


SETTING_OF = {"separator": "separator", "pattern": "pattern", "tokens": "tokens_per_step"}
"""The field that each rule reads."""
_ROLLED = ("judge", "prompts_per_shard", "max_tokens")
READS: dict[str, tuple[str, ...]] = {
    "per_step": (
        "rule", "max_steps", "wrong_per_prompt", "good", "rollouts", "best_of", "mode", "shared_prefix", "against",
        "prune", *_ROLLED,
    ),
    "partial": ("rule", "max_steps", "wrong_per_prompt", "good", "judge", "state"),
    "tree": ("rule", "tree", *_ROLLED),
}  # fmt: skip
"""The fields of `pairs.steps` that each builder reads, beside the setting of its rule."""


def step_faults(builder: str, steps: Steps, outputs: Mapping[str, str]) -> list[str]:
    """Settings that this builder would not read, and a judge that cannot be one; each line begins with its key.

    `outputs` has the output, binary or score, of every verifier by name.
    """
    if builder not in READS:
        names = ", ".join(READS)
        return [f"pairs.steps: {builder} does not look at steps, only {names} do; take it out"] * bool(steps.changed())
    read = (*READS[builder], SETTING_OF[steps.rule])
    how = f"{builder} with rule {steps.rule}"
    wrong = [f"pairs.steps.{key}: {how} does not read it; take it out" for key in steps.changed() if key not in read]
    if builder == "per_step" and not steps.shared_prefix and "against" in steps.changed():
        wrong.append("pairs.steps.against: needs shared_prefix: true")
    if steps.judge is not None and outputs.get(steps.judge) != "binary":
        binary = ", ".join(name for name, output in outputs.items() if output == "binary") or "none here"
        wrong.append(f"pairs.steps.judge: {steps.judge!r} is no binary verifier of this recipe; there are: {binary}")
    return wrong
