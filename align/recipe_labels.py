"""Labels that the ensemble may see: their block of the recipe; and what does not go together in `ensemble`.

Only pydantic is imported here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from align.recipe_base import Block

if TYPE_CHECKING:
    from align.recipe import Recipe


READ_BY = {"covariance_shrinkage": "gaussian_full", "ridge": "logistic", "clusters": "weaver"}
"""Settings of `ensemble` that one method reads and no other."""


class Labels(Block):
    """Responses of which it is known whether they are good: they choose the label model and calibrate it."""

    file: str | None = None
    """JSONL, CSV or Parquet file with the columns prompt, response and label (1 or 0), perhaps answer."""
    prompts: Annotated[int, Field(ge=0)] = 0
    """Of each round's prompts, on how many the ensemble sees the verdicts of `evaluation.gold`; chosen by hash."""


def label_faults(recipe: Recipe) -> list[str]:
    """One line per contradiction, each beginning with the key."""
    labels, gold = recipe.ensemble.labels, recipe.evaluation.gold
    block, wrong = recipe.ensemble, []
    for key, method in READ_BY.items():
        if getattr(block, key) != type(block).model_fields[key].default and block.method != method:
            wrong.append(f"ensemble.{key}: is read by `method: {method}` only, not by {block.method}; take it out")
    if labels.prompts and gold is None:
        wrong.append("ensemble.labels.prompts: there is no evaluation.gold whose verdicts could be seen; name one")
    elif labels.prompts and gold is not None and gold.output != "binary":
        wrong.append(f"ensemble.labels.prompts: evaluation.gold gives scores ({gold.kind}), not yes or no")
    if labels.prompts > recipe.rounds.prompts_per_round:
        wrong.append(f"ensemble.labels.prompts: a round has {recipe.rounds.prompts_per_round} prompts only")
    return wrong
