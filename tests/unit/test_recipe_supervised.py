"""What `algorithm: sft` refuses: each fault by its key, with the way out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from align.catalogue import ALGORITHMS, LOSSES
from align.errors import RunError
from align.recipe import Recipe
from align.recipe_supervised import READS, Supervised
from align.stages import _empty_round
from align.training.trainers import learned_per_prompt, steps_per_round


def recipe(loss: str, supervised: dict[str, Any] | None = None, **blocks: Any) -> Recipe:
    training = {"algorithm": "sft", "loss": {"name": loss}, "supervised": supervised or {}}
    training |= blocks.pop("training", {})
    return Recipe.model_validate(
        {"name": "t", "policy": {"model": "m", **blocks.pop("policy", {})}, "training": training,
         "verifiers": [{"kind": "noise", "name": "coin"}], **blocks}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "supervised", "said"),
    [
        ("filter", {"best": 2}, "training.supervised.best: filter does not read it"),
        ("best_of_n", {"threshold": 0.9}, "training.supervised.threshold: best_of_n does not read it"),
        ("filter", {"score": "reward"}, "training.supervised.threshold: a reward has no natural middle"),
        ("best_of_n", {"best": 2, "best_fraction": 0.5}, "training.supervised.best_fraction: says the same"),
        ("best_of_n", {"best": 9}, "training.supervised.best: more than sampling.samples_per_prompt"),
        ("mml", {"mml_beta": 1e30}, "training.supervised.mml_beta: 1e+30 times a log-ratio leaves"),
        ("poft", {}, "training.supervised.aligned: poft compares with aligned models"),
        ("poft", {"aligned": ["m"], "aligned_verifier": "coin"}, "training.supervised.aligned_verifier: and `aligned`"),
        ("poft", {"aligned_verifier": "judge"}, "no verifier is called 'judge'; there are coin"),
        ("conditional", {"control": ["a", "b", "c"]}, "training.supervised.control: conditional takes two texts"),
        ("reward_conditioning", {"control": ["a"]}, "training.supervised.control: give at least two texts"),
        ("conditional", {"control": ["a", "a"]}, "training.supervised.control: every text must be different"),
        ("conditional", {"control": ["", "a"]}, "training.supervised.control: every text must be different"),
    ],
)
def test_a_fault_is_refused_by_its_key(loss: str, supervised: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match="training") as caught:
        recipe(loss, supervised)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("loss", "blocks", "said"),
    [
        ("quark", {"training": {"zero_stage": 3}}, "training.supervised.kl_weight: the exact KL needs a whole head"),
        ("quark", {"training": {"reference": "round"}}, "training.reference: quark's KL is from the initial policy"),
        ("filter", {"training": {"reference": "round"}}, "training.reference: filter knows no reference; set none"),
        ("filter", {"training": {"loss": {"name": "filter", "beta": 0.3}}}, "training.loss.beta: filter does not read"),
        ("filter", {"policy": {"lora": {}}, "training": {"freeze": "half"}}, "training.freeze: adapters leave all"),
        ("filter", {"pairs": {"k": 3}}, "pairs: sft learns from scores"),
        ("filter", {"training": {"pairs_per_step": 3}}, "training.pairs_per_step: sft learns from scores"),
        ("filter", {"training": {"algorithm": "dpo"}}, "training.loss.name: filter is a loss of algorithm sft"),
    ],
)
def test_a_contradiction_between_blocks_is_refused(loss: str, blocks: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=r"training|pairs") as caught:
        recipe(loss, **blocks)
    assert said in str(caught.value)


def test_a_threshold_of_zero_counts_as_said() -> None:
    assert recipe("filter", {"score": "reward", "threshold": 0.0}).training.supervised.threshold == 0.0


def test_the_table_of_what_is_read_names_every_loss_and_every_field() -> None:
    assert set(READS) == set(ALGORITHMS["sft"].losses) == {f.name for f in LOSSES.values() if f.family == "supervised"}
    assert {field for fields in READS.values() for field in fields} == set(Supervised.model_fields)


@pytest.mark.parametrize(
    ("loss", "supervised", "each"),
    [("best_of_n", {}, 1), ("best_of_n", {"best": 3}, 3), ("best_of_n", {"best_fraction": 0.5}, 4),
     ("sharpening", {}, 1), ("filter", {}, 8)],
)  # fmt: skip
def test_the_schedule_counts_what_is_learned(loss: str, supervised: dict[str, Any], each: int) -> None:
    """8 samples to each of 512 prompts; a step holds 256 responses of those that are kept."""
    found = recipe(loss, supervised)
    assert learned_per_prompt(found) == each
    assert steps_per_round(found) == -(-512 // (256 // each))


def test_a_round_that_nobody_passes_stops_or_is_passed_over_as_the_recipe_says() -> None:
    """The message names the key that left the responses out, and the way on."""
    said: list[str] = []
    counts = {"below training.supervised.threshold": 40, "cut at sampling.max_new_tokens": 0}
    for on_empty in ("stop", "continue"):
        run: Any = SimpleNamespace(recipe=recipe("filter", rounds={"on_empty": on_empty}), say=said.append)
        if on_empty == "stop":
            with pytest.raises(RunError, match=r"40 below training\.supervised\.threshold.*rounds\.on_empty: continue"):
                _empty_round(run, 0, counts)
        else:
            _empty_round(run, 0, counts)
    assert len(said) == 1 and "nothing is trained" in said[0] and "cut at" not in said[0]
