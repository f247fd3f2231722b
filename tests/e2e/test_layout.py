"""Every loss of every family under DeepSpeed: the same loss and gradient whatever the ranks and the token budget."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from align.catalogue import ALGORITHMS, LOSSES
from align.recipe import Scratch
from align.training.scratch import create_model
from tests.e2e.jobs import launch

pytestmark = pytest.mark.engine

LIMIT = 1e-5
"""Largest relative difference of a loss and of a whole gradient, in float32."""
WHOLE = "whole"
LAYOUTS = {WHOLE: (4096, 4096), "several": (40, 16), "single": (1, 5)}
"""By name, tokens_per_batch and logit_chunk_tokens: all in one forward and one chunk of logits, several forwards, and
one group or response at a time."""
Case = dict[str, Any]

# ---- the cases: every loss of the catalogue, and the settings that change how a loss is summed -----------------------

NOISY = ("cdpo", "rdpo", "exo")


def preference(name: str, **loss: Any) -> Case:
    settings = {"name": name, **({"label_smoothing": 0.1} if name in NOISY else {}), **loss}
    labels = "soft" if LOSSES[name].soft else "hard"
    return {"data": "preferences", "labels": labels, "training": {"loss": settings}}


def policy_gradient(algorithm: str, **training: Any) -> Case:
    return {"data": "rollouts", "training": {"algorithm": algorithm, "epochs": 2, **training}}


def group(name: str, **training: Any) -> Case:
    return {"data": "responses", "training": {"algorithm": "group", "loss": {"name": name}, **training}}


def negative(algorithm: str, **settings: Any) -> Case:
    off = {} if algorithm in ("psr", "w_reinforce") else {"preflight": {"mode": "off"}}
    return {"data": "responses", "training": {"algorithm": algorithm, "epochs": 2, "negative": {**off, **settings}}}


def supervised(name: str) -> Case:
    return {
        "data": "supervised",
        "training": {
            "algorithm": "sft",
            "loss": {"name": name, **({"beta": 0.5} if name in ("rwr", "awr", "rlhf_sharpening") else {})},
            "supervised": SUPERVISED.get(name, {}),
        },
    }


SUPERVISED: dict[str, Case] = {
    "best_of_n": {"best": 2},
    "quark": {"quantiles": 2, "kl_weight": 0.3},
    "masked_thought": {"threshold": 0.2, "mask_rate": 0.5},
    "conditional": {"control": ["q", "c"], "control_drop_rate": 0.3},
    "reward_conditioning": {"control": ["q", "r", "c"], "control_drop_rate": 0.3},
    "poft": {"threshold": 0.3},
}
PREFERENCE = {name: preference(name) for name, facts in LOSSES.items() if facts.family == "preference"}
PREFERENCE |= {
    "aot, LD": preference("aot", ld_alpha=0.4, label_smoothing=0.1),
    "dpo, all modifiers": preference("dpo", ld_alpha=0.3, wpo=True, nll_weight=0.5, divergence="js"),
    "dr_dpo, few count": preference("dr_dpo", dr_temperature=0.05, nll_weight=0.2),
    "simpo, WPO": preference("simpo", beta=2.0, wpo=True),
}
OTHERS = {name: policy_gradient(name) for name, facts in ALGORITHMS.items() if facts.family == "policy_gradient"}
OTHERS |= {name: group(name) for name, facts in LOSSES.items() if facts.family == "group"}
OTHERS["gpo"] = group("gpo", reference="round", epochs=2)  # in the first step every ratio to the reference is 1
OTHERS["ranklist_skip"]["training"]["loss"]["rank_margin"] = 0.5  # without one it is Plackett-Luce
OTHERS |= {name: negative(name) for name, facts in LOSSES.items() if facts.family == "negative"}
OTHERS |= {name: supervised(name) for name, facts in LOSSES.items() if facts.family == "supervised"}
OTHERS |= {
    "ppo, every term": policy_gradient(
        "ppo",
        rl={"entropy_bonus": 0.01, "importance_cap": 2.0, "dual_clip": 3.0, "aggregation": "sequence_sum_fixed"},
        reward={"truncated": "mask", "normalise": "initial"},
    ),
    "grpo, KL in the loss": policy_gradient(
        "grpo", rl={"kl": {"place": "loss"}, "aggregation": "sequence_mean", "clip_high": 0.28}
    ),
    "p3o, entropy": policy_gradient("p3o", rl={"entropy_bonus": 0.01}),
    "nsr, entropy": negative("nsr", entropy_bonus=0.01, clip=0.5),
    "w_reinforce, trained": negative("w_reinforce", form="probability", denominator="trained"),
}
CASES = PREFERENCE | OTHERS


@dataclass(frozen=True)
class Found:
    """What the trainer reported, and the gradients in the order of the optimizer steps, by case/layout."""

    reports: dict[str, Any]
    gradients: dict[str, list[torch.Tensor]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Found]:
    """By number of ranks."""
    where = tmp_path_factory.mktemp("layout")
    shape = Scratch(hidden_size=32, intermediate_size=64, layers=2, heads=2, kv_heads=1, head_dim=32, context=64)
    create_model(where / "model", shape, seed=1)
    cases = deepcopy(CASES)
    cases["poft"]["training"]["supervised"]["aligned"] = [str(where / "model")]
    by_ranks = {}
    for ranks, layouts in ((1, LAYOUTS), (2, {"several": LAYOUTS["several"]})):
        jobs = {"model": str(where / "model"), "layouts": layouts, "cases": cases}
        reports = launch(ranks, jobs, where, f"ranks{ranks}", script="layout_job.py")
        assert all(report == reports[0] for report in reports), "the ranks report different metrics"
        by_ranks[ranks] = Found(reports[0], torch.load(Path(where / f"ranks{ranks}.gradients")))
    return by_ranks


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_do_not_depend_on_the_layout(found: dict[int, Found], name: str) -> None:
    """Policy and critic, before and after the policy has moved."""
    whole, gradients = found[1].reports[f"{name}/{WHOLE}"]["steps"], found[1].gradients[f"{name}/{WHOLE}"]
    critic = ALGORITHMS[CASES[name]["training"].get("algorithm", "dpo")].critic
    assert len(whole) == CASES[name]["training"].get("epochs", 1) and len(gradients) == len(whole) * (1 + critic)
    for ranks, layout in ((1, "several"), (1, "single"), (2, "several")):
        others = found[ranks].reports[f"{name}/{layout}"]["steps"]
        for step, other in zip(whole, others, strict=True):
            for key in ("loss", "critic_loss") if critic else ("loss",):
                assert other[key] == pytest.approx(step[key], rel=LIMIT, abs=1e-6), (ranks, layout, key)
        for gradient, other in zip(gradients, found[ranks].gradients[f"{name}/{layout}"], strict=True):
            size = float(gradient.double().norm())
            difference = float((other.double() - gradient.double()).norm())
            assert size > 1e-4 and difference <= LIMIT * size, (ranks, layout, difference / size)


@pytest.mark.parametrize("name", PREFERENCE)
def test_what_is_told_of_pairs_does_not_depend_on_the_layout(found: dict[int, Found], name: str) -> None:
    (whole,) = found[1].reports[f"{name}/{WHOLE}"]["steps"]
    for ranks, layout in ((1, "several"), (1, "single"), (2, "several")):
        report = found[ranks].reports[f"{name}/{layout}"]
        assert report["steps"][0]["margin"] == pytest.approx(whole["margin"], abs=1e-5), (ranks, layout)
        remembered = found[1].reports[f"{name}/{WHOLE}"]["state"]
        assert report["state"] == pytest.approx(remembered, abs=1e-6), (ranks, layout)


def test_bco_remembers_the_mean_reward_of_all_pairs(found: dict[int, Found]) -> None:
    """20 pairs of mean 0.3 before, 15 pairs now; the loss of this step saw the mean before it."""
    report = found[1].reports[f"bco/{WHOLE}"]
    assert report["steps"][0]["reward_shift"] == 0.3 and report["state"]["rewards"] == 35
    now = (35 * report["state"]["mean_reward"] - 20 * 0.3) / 15
    assert -1.0 < now < 1.0 and now != 0.0


def test_the_cases_reach_what_they_are_about(found: dict[int, Found]) -> None:
    """Ratios on both sides of the clip, KTO's z above 0, a policy away from its reference, responses masked."""
    last = {name: found[1].reports[f"{name}/{WHOLE}"]["steps"][-1] for name in OTHERS}
    assert last["kto"]["z_ref"] > 0.1 and last["quark"]["divergence"] > 0.1 and last["grpo, KL in the loss"]["kl"] > 0.1
    assert last["ppo, every term"]["responses"] < last["ppo"]["responses"]
    clipped = [last[name]["clip_fraction"] for name in OTHERS if CASES[name]["data"] == "rollouts"]
    clipped += [last[name]["moved"] for name in ("nsr", "psr", "w_reinforce", "nsr, entropy")]
    assert 0.0 < min(clipped) and max(clipped) < 1.0, clipped


def test_the_losses_of_a_family_differ(found: dict[int, Found]) -> None:
    """No two names stand for one loss on these examples."""
    last = {name: found[1].gradients[f"{name}/{WHOLE}"][-1] for name in CASES}
    alike = [(a, b) for a in CASES for b in CASES if a < b and CASES[a]["data"] == CASES[b]["data"]]
    assert [(a, b) for a, b in alike if torch.allclose(last[a], last[b], rtol=1e-3)] == []
