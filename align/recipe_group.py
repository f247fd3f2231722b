"""What the losses of whole groups ask of a recipe beyond the types of their settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from align.recipe import Recipe


def group_faults(recipe: Recipe) -> list[str]:
    """Contradictions between the loss of a group and the rest of the recipe; each line begins with its key."""
    training = recipe.training
    if training.loss.name is not None and training.loss.name not in training.trainer.losses:
        return []  # said elsewhere
    name, loss, wrong = training.loss_facts.name, training.loss, []
    if name == "gpo" and training.reference != "round":
        wrong.append(
            "training.reference: gpo regresses against the policy that drew the responses; set round, or take the loss "
            "reward_regression, whose optimum is that of any reference"
        )
    if name == "kto" and training.responses_per_step < 2 * recipe.sampling.samples_per_prompt:
        wrong.append(
            "training.responses_per_step: kto compares with responses of other prompts, so a step needs at least two "
            f"prompts, {2 * recipe.sampling.samples_per_prompt} responses"
        )
    if name == "kto" and recipe.rounds.prompts_per_round < 2:
        wrong.append(
            "rounds.prompts_per_round: kto compares with responses of other prompts, and a round of one prompt has "
            "none; draw two or more, or take the loss apo_zero_unpaired, which is kto without that comparison"
        )
    if "desirable_weight" in training.loss_facts.options and loss.desirable_weight == loss.undesirable_weight == 0:
        wrong.append("training.loss.desirable_weight: with both weights 0 there is nothing to learn")
    return wrong
