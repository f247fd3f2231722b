"""What the losses of pairs ask of a recipe beyond the types of its settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from align.catalogue import LOSSES
from align.recipe_base import strength_faults

if TYPE_CHECKING:
    from align.recipe import Recipe

NEEDS_NOISE = {
    "cdpo": "the share of preferences that are the wrong way round; without one it is dpo",
    "rdpo": "the share of preferences that are the wrong way round; without one it is dpo",
    "exo": "above 0, such as 1e-3: a label that is certain would cost infinitely much",
}


def preference_faults(recipe: Recipe) -> list[str]:
    """Contradictions between the loss, the labels and the reference; each line begins with its key."""
    training, loss = recipe.training, recipe.training.loss
    if loss.name is not None and loss.name not in training.trainer.losses:
        return []  # said elsewhere
    facts = training.loss_facts
    wrong = _reference_faults(recipe)
    for key in ("beta", "d2o_alpha"):
        if key in facts.options:
            wrong += strength_faults(f"training.loss.{key}", getattr(loss, key))
    if facts.family != "preference":
        return wrong
    if loss.label_smoothing >= 0.5:
        wrong.append(
            f"training.loss.label_smoothing: {loss.label_smoothing:g} says that the labels are no better than "
            "a coin; give a number below 0.5"
        )
    if facts.name in NEEDS_NOISE and loss.label_smoothing == 0.0:
        wrong.append(f"training.loss.label_smoothing: {facts.name} needs {NEEDS_NOISE[facts.name]}")
    if not facts.soft and recipe.pairs.labels == "soft":
        why = "with a noise of its own per pair it would diverge; " if facts.name == "rdpo" else ""
        wrong.append(f"pairs.labels: {facts.name} takes no soft label per pair; {why}set pairs.labels: hard")
    if "divergence_alpha" in loss.changed() and loss.divergence != "alpha":
        wrong.append(f"training.loss.divergence_alpha: read with divergence: alpha only, and this is {loss.divergence}")
    return wrong


def _reference_faults(recipe: Recipe) -> list[str]:
    training, facts = recipe.training, recipe.training.loss_facts
    sync = training.reference_sync
    wrong: list[str] = []
    if facts.reference and training.reference == "none":
        free = ", ".join(f.name for f in LOSSES.values() if f.family == facts.family and not f.reference)
        other = f", or take a loss without one: {free}" if free else ""
        wrong.append(f"training.reference: {facts.name} compares with a reference; set initial or round{other}")
    if facts.family in ("preference", "supervised") and not facts.reference and training.reference == "round":
        wrong.append(f"training.reference: {facts.name} knows no reference; set none")
    if sync is None:
        return wrong
    if facts.family != "preference" or not facts.reference:
        wrong.append(f"training.reference_sync: {training.algorithm}/{facts.name} does not read it; take it out")
    elif training.reference != "initial":
        wrong.append("training.reference_sync: the reference already moves with each round; set reference: initial")
    if recipe.policy.lora is not None:
        wrong.append(
            "training.reference_sync: with policy.lora the reference is the model without its adapter, "
            "which cannot follow; take one of them out"
        )
    return wrong
