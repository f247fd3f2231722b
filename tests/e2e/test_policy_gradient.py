"""Policy gradients under DeepSpeed in real processes: every algorithm learns, and neither ranks, stages, budgets nor a
restart change what it learns over whole rounds.  All jobs run in three launches.

The gradient of a single step is compared in test_layout.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from align.recipe import Scratch
from align.training.scratch import create_model
from tests.e2e.jobs import launch_by_job

PPO = {
    "algorithm": "ppo",
    "epochs": 2,
    "rl": {"entropy_bonus": 0.01, "importance_cap": 2.0, "kl": {"target": 0.5}, "critic": {"learning_rate": 1e-2}},
    "reward": {"truncated": "mask", "normalise": "initial"},
}
GRPO = {"algorithm": "grpo", "rl": {"kl": {"place": "loss"}, "aggregation": "sequence_mean", "clip_high": 0.28}}
FREE = {"algorithm": "grpo", "reference": "none", "rl": {"kl": {"place": "none"}}}
P3O = {"algorithm": "p3o", "rl": {"kl": {"beta": 0.01}}}
OTHERS = ("rloo", "reinforce_pp", "remax", "pairwise_grpo", "pairwise_ppo")
SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}

pytestmark = pytest.mark.engine

Reports = dict[str, list[dict[str, Any]]]


def jobs_of(ranks: int, where: Path) -> dict[str, dict[str, Any]]:
    """Everything that starts from the initial model on this many ranks."""
    if ranks == 1:
        found: dict[str, dict[str, Any]] = {
            "ppo": {"training": PPO, "save": str(where / "ppo.save"), "weights": str(where / "ppo.weights")},
            "grpo": {"training": GRPO},
            "free": {"training": FREE},
            "p3o": {"training": P3O},
            "warm": {"training": {**PPO, "rl": {**PPO["rl"], "critic": {"learning_rate": 1e-2, "warmup_rounds": 1}}}},  # type: ignore[dict-item]
        }
        return found | {name: {"training": {"algorithm": name}, "rounds": 3} for name in OTHERS}
    files = {"save": str(where / "ppo2.save"), "weights": str(where / "ppo2.weights")}
    return {
        "ppo2": {"training": {**PPO, "zero_stage": 2}, **files},
        "ppo3": {"training": {**PPO, "zero_stage": 3, "deepspeed": SHARDED, "tokens_per_batch": 24}},
        "grpo2": {"training": {**GRPO, "tokens_per_batch": 24}},
    }


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rl")


@pytest.fixture(scope="module")
def reports(where: Path) -> Reports:
    """By job, what each rank reported; a resumed job is called `NAME again`."""
    shape = Scratch(hidden_size=32, intermediate_size=64, layers=2, heads=2, kv_heads=1, head_dim=32, context=64)
    create_model(where / "model", shape, seed=1)
    found: Reports = {}
    for ranks in (1, 2):
        first = jobs_of(ranks, where)
        found |= launch_by_job(ranks, first, where, f"first{ranks}", "rl_job.py")
    again = {
        "ppo again": {"training": PPO, "load": str(where / "ppo.save"), "weights": str(where / "ppo.weights again")}
    }
    found |= launch_by_job(1, again, where, "again", "rl_job.py")
    return found


def column(report: dict[str, Any], name: str) -> list[float]:
    return [row[name] for row in report["steps"]]


COMPARED = ("loss", "grad_norm", "approx_kl", "ratio_max", "clip_fraction")


def same(one: dict[str, Any], other: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        assert column(other, name) == pytest.approx(column(one, name), abs=1e-5, rel=1e-4), name
    assert other["weights"] == pytest.approx(one["weights"], abs=1e-3)


def test_ranks_stages_and_budgets_do_not_change_ppo(reports: Reports) -> None:
    """Losses of policy and critic, whitening over the round, the entropy bonus and importance weights included."""
    names = (*COMPARED, "critic_loss", "critic_grad_norm", "explained_variance", "kl", "kl_beta", "step_entropy")
    (one,) = reports["ppo"]
    for name in ("ppo2", "ppo3"):
        for report in reports[name]:
            same(one, report, names)
    assert reports["ppo2"][0]["weights"] == reports["ppo2"][1]["weights"]


def test_ranks_and_budgets_do_not_change_grpo(reports: Reports) -> None:
    for report in reports["grpo2"]:
        same(reports["grpo"][0], report, (*COMPARED, "kl_loss"))


def test_policy_and_critic_resume_bitwise(reports: Reports, where: Path) -> None:
    """Weights, optimizers, the adaptive coefficient and the reward's statistics go on as if nothing had happened."""
    (straight,), (again,) = reports["ppo"], reports["ppo again"]
    tail = straight["steps"][-len(again["steps"]) :]
    assert 0 < len(tail) < len(straight["steps"])
    for key in ("step", "loss", "critic_loss", "kl_beta", "grad_norm", "critic_learning_rate"):
        assert column(again, key) == [row[key] for row in tail], key
    assert again["state"] == straight["state"] and set(again["state"]) == {"kl_beta", "reward_mean", "reward_std"}
    expected, found = torch.load(where / "ppo.weights"), torch.load(where / "ppo.weights again")
    assert any(name.startswith("critic.") for name in expected)
    assert expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)


def test_the_first_step_starts_at_a_ratio_of_one(reports: Reports) -> None:
    """Old log-probabilities are the trainer's own, so nothing is clipped and the policy has not moved."""
    for name in ("ppo", "grpo", "p3o", *OTHERS):
        first = reports[name][0]["steps"][0]
        assert first["ratio_max"] == pytest.approx(1.0, abs=1e-5), name
        assert first["clip_fraction"] == 0.0 and first["approx_kl"] == pytest.approx(0.0, abs=1e-6)
        assert first["kl"] == pytest.approx(0.0, abs=1e-6)


def test_what_is_left_out_is_counted(reports: Reports) -> None:
    """One response has no score, the four of one prompt got the same; a mask is no loss, but a place in the count."""
    assert reports["grpo"][0]["counts"] == {"unscored": 1, "single": 0, "equal_reward": 4, "masked": 0}
    counts = reports["ppo"][0]["counts"]
    assert counts["unscored"] == 1 and counts["masked"] > 0 and "equal_reward" not in counts
    assert reports["remax"][0]["counts"] == {"unscored": 1, "no_greedy": 0, "masked": 0}


def test_without_a_kl_nobody_asks_a_reference(reports: Reports) -> None:
    assert reports["free"][0]["steps"] and not any("kl" in row for row in reports["free"][0]["steps"])


@pytest.mark.parametrize("name", ["ppo", "grpo", "free", "p3o", *OTHERS])
def test_the_policy_comes_to_prefer_the_better_responses(reports: Reports, name: str) -> None:
    assert reports[name][0]["gain"] > 0.05


def test_the_critic_learns_first(reports: Reports) -> None:
    """A warm-up round moves the critic and leaves the policy as it is."""
    (report,) = reports["warm"]
    warm = [row for row in report["steps"] if row["round"] == 0]
    assert warm and all("policy_loss" not in row for row in warm)
    after = next(row for row in report["steps"] if row["round"] == 1)
    assert after["kl"] == pytest.approx(0.0, abs=1e-6) and after["explained_variance"] > 0.1
    assert column(report, "step") == list(range(1, len(report["steps"]) + 1))
    assert warm[0]["explained_variance"] == 0.0


def test_a_critic_from_a_reward_model_says_what_it_says(tmp_path: Path, where: Path, reports: Reports) -> None:
    """Its value in front of a token is the reward model's score of what stands before."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from align.distributed import connect
    from align.training.engine import PolicyEngine
    from tests.e2e.rl_job import recipe_for

    judge = AutoModelForSequenceClassification.from_pretrained(where / "model", num_labels=1)
    judge.save_pretrained(tmp_path / "judge")
    AutoTokenizer.from_pretrained(where / "model").save_pretrained(tmp_path / "judge")
    training = {"algorithm": "ppo", "rl": {"critic": {"model": str(tmp_path / "judge")}}}
    engine = PolicyEngine(where / "model", recipe_for(str(where / "model"), training, {}), connect(60), total_steps=2)
    assert engine.critic is not None
    prompt, response = (4, 7, 9), (5, 6, 8)
    (values,) = engine.critic.values([(prompt, response)])
    engine.close()
    judge.config.pad_token_id = None
    with torch.no_grad():
        expected = [float(judge(torch.tensor([[*prompt, *response[:t]]])).logits[0, 0]) for t in range(len(response))]
    assert values.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_critic_must_be_a_reward_model_with_the_policys_tokens(tmp_path: Path, where: Path, reports: Reports) -> None:
    """Refused by its key before anything trains: a language model, and a reward model that reads other tokens."""
    from transformers import AutoModelForSequenceClassification

    from align.errors import InputError
    from align.inputs import check_inputs
    from align.training.critic import check_critic
    from tests.e2e.rl_job import recipe_for

    training = {"algorithm": "ppo", "rl": {"critic": {"model": str(where / "model")}}}
    with pytest.raises(InputError, match=r"training\.rl\.critic\.model: .*ForSequenceClassification"):
        check_inputs(recipe_for(str(where / "model"), training, {}))
    create_model(tmp_path / "other", Scratch(hidden_size=32, heads=2, kv_heads=1, characters="0123456789x"), seed=1)
    judge = AutoModelForSequenceClassification.from_pretrained(tmp_path / "other", num_labels=1)
    judge.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"training\.rl\.critic\.model: .* another tokenizer"):
        check_critic(tmp_path / "other", where / "model")
