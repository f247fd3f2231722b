"""Preference recipes that cannot mean what they say are refused by key."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from align.recipe import Recipe

HARD = {"pairs": {"labels": "hard"}}


def recipe(training: dict[str, Any], **blocks: Any) -> Recipe:
    base = {
        "name": "test",
        "policy": {"model": "somewhere"},
        "verifiers": [{"kind": "repetition", "name": "filler"}],
        "training": training,
    }
    return Recipe.model_validate(base | blocks)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a reference is needed": ({"reference": "none"}, {}, "training.reference: dpo compares with a reference"),
    "no reference is read": (
        {"loss": {"name": "simpo"}, "reference": "round"}, {}, "training.reference: simpo knows no reference",
    ),
    "beta overflows": ({"loss": {"beta": 1e30}}, {}, r"training.loss.beta: 1e\+30 times a log-ratio leaves"),
    "beta is infinite": ({"loss": {"beta": float("inf")}}, {}, "training.loss.beta: inf times"),
    "D2O's alpha overflows": (
        {"algorithm": "d2o", "loss": {"d2o_alpha": 1e30}}, {}, r"training.loss.d2o_alpha: 1e\+30 times a log-ratio",
    ),
    "its inverse overflows": ({"loss": {"name": "ipo", "beta": 1e-30}}, {}, "training.loss.beta: 1e-30"),
    "noise of a half": (
        {"loss": {"name": "rdpo", "label_smoothing": 0.5}}, HARD, "training.loss.label_smoothing: 0.5 says",
    ),
    "noise of nothing": ({"loss": {"name": "rdpo"}}, HARD, "training.loss.label_smoothing: rdpo needs the share"),
    "a certain label": ({"loss": {"name": "exo"}}, {}, "training.loss.label_smoothing: exo needs above 0"),
    "noise per pair": (
        {"loss": {"name": "rdpo", "label_smoothing": 0.1}}, {},
        "pairs.labels: rdpo takes no soft label per pair; .* diverge; set pairs.labels: hard",
    ),
    "soft labels": ({"loss": {"name": "aot"}}, {}, "pairs.labels: aot takes no soft label .* set pairs.labels: hard"),
    "not read": ({"loss": {"name": "ipo", "label_smoothing": 0.1}}, {}, "training.loss.label_smoothing: ipo does not"),
    "no weight of its own": ({"loss": {"name": "dr_dpo", "wpo": True}}, {}, "training.loss.wpo: dr_dpo does not read"),
    "no divergence": ({"loss": {"name": "nca", "divergence": "js"}}, {}, "training.loss.divergence: nca does not read"),
    "k of nothing": ({}, {"pairs": {"k": 3}}, "pairs.k: best_worst does not read it"),
    "alpha of nothing": ({"loss": {"divergence_alpha": 0.3}}, {}, "training.loss.divergence_alpha: read with"),
    "moves twice": ({"reference_sync": {}, "reference": "round"}, {}, "training.reference_sync: .* already moves"),
    "nothing to move": (
        {"reference_sync": {}, "loss": {"name": "simpo"}}, {}, "training.reference_sync: dpo/simpo does not read it",
    ),
    "cannot move": ({"reference_sync": {}}, {"policy": {"model": "x", "lora": {}}}, "training.reference_sync: .*lora"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_key(name: str) -> None:
    training, blocks, message = REFUSED[name]
    with pytest.raises(ValidationError, match=message):
        recipe(training, **blocks)


def test_all_faults_are_said_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        recipe({"loss": {"name": "rdpo", "label_smoothing": 0.6, "beta": 1e9}, "reference": "none"})
    for key in ("training.reference:", "training.loss.beta:", "training.loss.label_smoothing:", "pairs.labels:"):
        assert key in str(caught.value)


def test_what_hangs_together_is_accepted() -> None:
    assert recipe({"loss": {"name": "simpo", "beta": 2.0}, "reference": "none"}).training.loss_facts.name == "simpo"
    assert recipe({"loss": {"name": "simpo"}}).training.loss.simpo_gamma == 0.5
    noisy = recipe({"loss": {"name": "rdpo", "label_smoothing": 0.2}}, **HARD)
    assert noisy.training.loss_facts.arguments(noisy.training.loss) == {"beta": 0.1, "label_smoothing": 0.2}
    assert recipe({"reference_sync": {"every_steps": 8, "mix": 1.0}}).training.reference_sync is not None
