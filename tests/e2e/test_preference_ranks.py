"""Every preference loss under DeepSpeed: the same loss and gradient whatever the ranks and the token budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from align.catalogue import LOSSES
from align.recipe import Scratch
from align.training.scratch import create_model
from tests.e2e.jobs import launch

pytestmark = pytest.mark.engine

NOISY = ("cdpo", "rdpo", "exo")
BUDGETS = (4096, 40, 1)  # everything in one forward, several, and one group at a time


def case(name: str, **loss: Any) -> dict[str, Any]:
    settings = {"name": name, **({"label_smoothing": 0.1} if name in NOISY else {}), **loss}
    return {"loss": settings, "labels": "soft" if LOSSES[name].soft else "hard"}


CASES = {name: case(name) for name, facts in LOSSES.items() if facts.family == "preference"}
CASES |= {
    "aot, LD": case("aot", ld_alpha=0.4, label_smoothing=0.1),
    "dpo, all modifiers": case("dpo", ld_alpha=0.3, wpo=True, nll_weight=0.5, divergence="js"),
    "dr_dpo, few count": case("dr_dpo", dr_temperature=0.05, nll_weight=0.2),
    "simpo, WPO": case("simpo", beta=2.0, wpo=True),
}


@dataclass(frozen=True)
class Found:
    """Metrics and gradients by case/budget."""

    metrics: dict[str, Any]
    gradients: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Found]:
    """By number of ranks."""
    where = tmp_path_factory.mktemp("preference")
    shape = Scratch(hidden_size=32, intermediate_size=64, layers=2, heads=2, kv_heads=1, head_dim=32, context=64)
    create_model(where / "model", shape, seed=1)
    by_ranks = {}
    for ranks, budgets in ((1, BUDGETS), (2, BUDGETS[1:2])):
        jobs = {"model": str(where / "model"), "budgets": budgets, "cases": CASES}
        metrics = launch(ranks, jobs, where, f"ranks{ranks}", script="preference_job.py")
        for report in metrics:
            for row in report.values():
                del row["seconds"]
        assert all(m == metrics[0] for m in metrics), "the ranks report different metrics"
        by_ranks[ranks] = Found(metrics[0], torch.load(Path(where / f"ranks{ranks}.gradients")))
    return by_ranks


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_do_not_depend_on_the_layout(found: dict[int, Found], name: str) -> None:
    """The relative difference of the loss and of the whole gradient is at most 1e-5, in float32."""
    whole = found[1].metrics[f"{name}/{BUDGETS[0]}"]
    gradient = found[1].gradients[f"{name}/{BUDGETS[0]}"].double()
    assert gradient.norm() > 1e-4
    others = [(1, BUDGETS[1]), (1, BUDGETS[2]), (2, BUDGETS[1])]
    for ranks, budget in others:
        other = found[ranks].metrics[f"{name}/{budget}"]
        assert other["loss"] == pytest.approx(whole["loss"], rel=1e-5), (ranks, budget)
        assert other["margin"] == pytest.approx(whole["margin"], abs=1e-5), (ranks, budget)
        assert other["mean_reward"] == pytest.approx(whole["mean_reward"], abs=1e-6), (ranks, budget)
        difference = (found[ranks].gradients[f"{name}/{budget}"].double() - gradient).norm() / gradient.norm()
        assert difference <= 1e-5, (ranks, budget, float(difference))


def test_bco_remembers_the_mean_reward_of_all_pairs(found: dict[int, Found]) -> None:
    """20 pairs of mean 0.3 before, 15 pairs now; the loss of this step saw the mean before it."""
    row = found[1].metrics["bco/4096"]
    assert row["reward_shift"] == 0.3 and row["rewards"] == 35
    now = (35 * row["mean_reward"] - 20 * 0.3) / 15
    assert -1.0 < now < 1.0 and now != 0.0


def test_the_preference_losses_differ(found: dict[int, Found]) -> None:
    """No two names stand for one loss on these pairs."""
    gradients = {name: found[1].gradients[f"{name}/4096"] for name in CASES}
    same = [(a, b) for a in CASES for b in CASES if a < b and torch.allclose(gradients[a], gradients[b], rtol=1e-3)]
    assert same == []
