"""What a policy-gradient recipe may not say: each refused by its key."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from align.catalogue import ALGORITHMS
from align.recipe import Recipe
from align.recipe_rl import NEEDS_CRITIC, NEEDS_GREEDY, ONE_IS_ENOUGH, READS, PolicyGradient, questions_per_prompt
from align.training.kl import adapted
from align.training.rewards import GROUPS
from align.training.trainers import steps_per_round


def recipe(training: dict[str, Any], **more: Any) -> Recipe:
    base: dict[str, Any] = {
        "name": "x",
        "policy": {"model": "m"},
        "verifiers": [{"kind": "repetition", "name": "loops"}],
    }
    return Recipe.model_validate({**base, "training": training, **more})


JUDGES: list[dict[str, Any]] = [
    {"kind": "judge", "name": "yes", "model": "m"},
    {"kind": "judge", "name": "referee", "model": "m", "mode": "pairwise"},
]


@pytest.mark.parametrize(
    ("training", "more", "key"),
    [
        ({"algorithm": "ppo", "rl": {"kl": {"estimator": "k3"}}}, {}, "training.rl.kl.estimator: k3 in the reward"),
        ({"algorithm": "ppo", "rl": {"kl": {"estimator": "k2"}}}, {}, "training.rl.kl.estimator: k2 in the reward"),
        ({"algorithm": "grpo", "rl": {"kl": {"place": "loss", "estimator": "k1"}}}, {}, "training.rl.kl.estimator"),
        ({"algorithm": "p3o", "rl": {"kl": {"place": "loss"}}}, {}, "training.rl.kl.place: p3o"),
        ({"algorithm": "ppo", "rl": {"kl": {"place": "none", "beta": 0.1}}}, {}, "training.rl.kl: with place: none"),
        ({"algorithm": "ppo", "rl": {"kl": {"beta": 0.0, "target": 1.0}}}, {}, "training.rl.kl.beta: a coefficient"),
        ({"algorithm": "ppo", "rl": {"kl": {"horizon": 5.0}}}, {}, "training.rl.kl.horizon"),
        ({"algorithm": "ppo", "rl": {"kl": {"beta": 1e30}}}, {}, "training.rl.kl.beta: 1e+30 times a log-ratio leaves"),
        (
            {"algorithm": "ppo", "rl": {"kl": {"target": 6.0}}},
            {"rounds": {"prompts_per_round": 6250}, "sampling": {"samples_per_prompt": 8}},
            "training.rl.kl.horizon: a round has up to 50,000 responses",
        ),
        ({"algorithm": "grpo", "reference": "round"}, {}, "training.reference: the responses are the round's own"),
        (
            {"algorithm": "grpo", "reference": "round", "rl": {"kl": {"place": "loss", "target": 1.0}}},
            {},
            "training.rl.kl.target: the coefficient follows",
        ),
        ({"algorithm": "grpo", "rl": {"lam": 0.9}}, {}, "training.rl.lam: grpo does not read it"),
        ({"algorithm": "rloo", "rl": {"by_std": False}}, {}, "training.rl.by_std: rloo does not read it"),
        ({"algorithm": "grpo", "rl": {"critic": {"learning_rate": 1e-3}}}, {}, "training.rl.critic: grpo"),
        ({"algorithm": "p3o", "rl": {"aggregation": "sequence_mean"}}, {}, "training.rl.aggregation: p3o"),
        ({"algorithm": "ppo", "rl": {"fixed_length": 9}}, {}, "training.rl.fixed_length"),
        ({"algorithm": "ppo", "rl": {"importance_cap": 2.0}}, {"sampling": {"temperature": 0.7}}, "rl.importance_cap"),
        ({"algorithm": "ppo", "rl": {"importance_cap": 2.0}}, {"sampling": {"top_p": 0.9}}, "rl.importance_cap"),
        ({"algorithm": "ppo"}, {"sampling": {"top_k": 5}}, "sampling.top_k: ppo needs samples of the policy itself"),
        ({"algorithm": "ppo"}, {"policy": {"model": "m", "lora": {}}}, "policy.lora: ppo trains a critic"),
        ({"algorithm": "ppo", "rl": {"critic": {"revision": "abc"}}}, {}, "training.rl.critic.revision"),
        ({"algorithm": "ppo", "rl": {"critic": {"warmup_rounds": 3}}}, {}, "training.rl.critic.warmup_rounds"),
        ({"algorithm": "ppo", "reward": {"source": "verifier"}}, {}, "training.reward.verifier: name the verifier"),
        ({"algorithm": "ppo", "reward": {"source": "verifier", "verifier": "rm"}}, {}, "no verifier is called 'rm'"),
        ({"algorithm": "ppo", "reward": {"verifier": "loops"}}, {}, "training.reward.verifier: only"),
        ({"algorithm": "ppo", "reward": {"shaping": "qwen_math"}}, {}, "training.reward.verifier: name the verifier"),
        (
            {"algorithm": "ppo", "reward": {"shaping": "qwen_math", "verifier": "loops", "source": "logit"}},
            {},
            "training.reward.source: qwen_math",
        ),
        ({"algorithm": "ppo", "reward": {"penalty": -2.0}}, {}, "training.reward.penalty"),
        ({"algorithm": "ppo", "reward": {"alpha": 0.1}}, {}, "training.reward.alpha"),
        ({"algorithm": "pairwise_grpo", "reward": {"source": "logit"}}, {}, "training.reward.source: pairwise_grpo"),
        ({"algorithm": "pairwise_ppo", "reward": {"truncated": "zero"}}, {}, "training.reward.truncated: pairwise_ppo"),
        ({"algorithm": "ppo", "reward": {"judge": "referee"}}, {}, "reward.judge: only pairwise_grpo and pairwise_ppo"),
        (
            {"algorithm": "pairwise_grpo", "reward": {"judge": "refree"}},
            {"verifiers": JUDGES},
            "training.reward.judge: no verifier is called 'refree'; of kind judge in mode pairwise there are: referee",
        ),
        (
            {"algorithm": "pairwise_ppo", "reward": {"judge": "yes"}},
            {"verifiers": JUDGES},
            "training.reward.judge: 'yes' compares no two responses",
        ),
        (
            {"algorithm": "pairwise_grpo", "reward": {"judge": "loops"}},
            {},
            "in mode pairwise, there are: none here",
        ),
        (
            {"algorithm": "pairwise_grpo", "reward": {"judge": "referee"}},
            {"verifiers": [{**JUDGES[1], "opponents": 2}]},
            "so its `opponents` would save nothing",
        ),
        ({"algorithm": "ppo"}, {"verifiers": [{"kind": "noise", "name": "coin"}]}, "verifiers: ppo maximises"),
        ({"algorithm": "ppo", "pairs_per_step": 8}, {}, "training.pairs_per_step: ppo"),
        ({"algorithm": "ppo", "reference": "none"}, {}, "training.reference"),
        ({"algorithm": "ppo", "reference_sync": {}}, {}, "training.reference_sync"),
        ({"algorithm": "dpo", "rl": {"lam": 0.9}}, {}, "training.rl: dpo does not read this block"),
        ({"algorithm": "dpo", "reward": {"clip": 1.0}}, {}, "training.reward: dpo does not read this block"),
        ({"algorithm": "grpo"}, {"sampling": {"samples_per_prompt": 1}}, "samples_per_prompt"),
        ({"algorithm": "rloo"}, {"ensemble": {"min_voters": 3}}, "ensemble.min_voters: rloo has no reward"),
        ({"algorithm": "ppo", "loss": {"beta": 0.2}}, {}, "training.loss.beta: ppo_clip does not read it"),
    ],
)
def test_refused_by_its_key(training: dict[str, Any], more: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError) as refused:
        recipe(training, **more)
    assert key in str(refused.value)


def test_every_algorithm_is_known_to_the_catalogue_and_stands_with_its_defaults() -> None:
    for name, reads in READS.items():
        assert ALGORITHMS[name].family == "policy_gradient" and ALGORITHMS[name].critic == (name in NEEDS_CRITIC)
        assert set(reads) < set(PolicyGradient.model_fields)
        assert recipe({"algorithm": name}).training.trainer.name == name
    assert set(READS) == {a.name for a in ALGORITHMS.values() if a.family == "policy_gradient"}
    assert set(NEEDS_GREEDY) < set(READS)


@pytest.mark.parametrize("algorithm", READS)
def test_who_compares_siblings_needs_two(algorithm: str) -> None:
    """One response a prompt is refused exactly where a prompt of one would be left out of the training."""
    assert (algorithm in ONE_IS_ENOUGH) == (algorithm not in GROUPS)
    if algorithm in ONE_IS_ENOUGH:
        assert recipe({"algorithm": algorithm}, sampling={"samples_per_prompt": 1}).sampling.samples_per_prompt == 1
        return
    with pytest.raises(ValidationError, match="samples_per_prompt: .* give at least 2"):
        recipe({"algorithm": algorithm}, sampling={"samples_per_prompt": 1})


@pytest.mark.parametrize("algorithm", READS)
def test_without_a_kl_no_reference_is_needed(algorithm: str) -> None:
    """With one it is asked for once, by its key."""
    free = recipe({"algorithm": algorithm, "reference": "none", "rl": {"kl": {"place": "none"}}})
    assert free.training.reference == "none"
    with pytest.raises(ValidationError) as refused:
        recipe({"algorithm": algorithm, "reference": "none"})
    assert str(refused.value).count("training.reference") == 1


def test_an_adaptive_coefficient_stays_positive() -> None:
    """One response fewer than five horizons a round is the most that the recipe takes."""
    made = recipe(
        {"algorithm": "ppo", "rl": {"kl": {"target": 6.0, "horizon": 10001.0}}},
        sampling={"samples_per_prompt": 8},
        rounds={"prompts_per_round": 6250},
    )
    assert adapted(0.1, 0.0, 6.0, made.training.rl.kl.horizon, 50_000) > 0


@pytest.mark.parametrize(("name", "asked"), [("pairwise_grpo", 12), ("pairwise_ppo", 8)])
def test_a_judge_stands_and_is_asked_in_both_orders(name: str, asked: int) -> None:
    """Of four responses 4 x 3 ordered pairs, or each against the greedy one, twice."""
    made = recipe(
        {"algorithm": name, "reward": {"judge": "referee"}}, verifiers=JUDGES, sampling={"samples_per_prompt": 4}
    )
    assert questions_per_prompt(made) == asked
    assert questions_per_prompt(recipe({"algorithm": name})) == 0


def test_a_step_holds_whole_prompts() -> None:
    """100 responses a step at 8 a prompt are 12 prompts; 50 prompts make 5 steps, twice over."""
    made = recipe(
        {"algorithm": "ppo", "responses_per_step": 100, "epochs": 2},
        sampling={"samples_per_prompt": 8},
        rounds={"prompts_per_round": 50},
    )
    assert steps_per_round(made) == 10
