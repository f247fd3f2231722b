"""Pairwise GRPO with the real engines and a judge in this process: its answers are kept, and train as they should.

The judge is a tiny random model over bytes: it has opinions, and likes one place better than the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.conftest import TINY, read_summary
from tests.e2e.test_language_verifiers import make_language_model

pytestmark = pytest.mark.engine

JUDGE = "  - {{kind: judge, name: referee, mode: pairwise, least_mass: 0.0, model: {model}}}"
TRAINING = """
training:
  algorithm: {algorithm}
  learning_rate: 1e-3
  responses_per_step: 32
  tokens_per_batch: 256
  zero_stage: 2
  reward: {{judge: referee}}
"""


def write_recipe(folder: Path, model: Path, algorithm: str = "pairwise_grpo") -> Path:
    """The tiny recipe, one round, with the judge among its verifiers."""
    folder.mkdir()
    lines = TINY.format(output=folder / "runs").splitlines()
    kept = [line for line in lines if not line.startswith(("pairs:", "training:", "rounds:"))]
    kept.insert(kept.index("ensemble: {method: dawid_skene}"), JUDGE.format(model=model))
    file = folder / "tiny.yaml"
    file.write_text(
        "\n".join(kept) + TRAINING.format(algorithm=algorithm) + "rounds: {count: 1, prompts_per_round: 24}\n"
    )
    return file


def rows(run_dir: Path, stage: str) -> list[dict[str, Any]]:
    """The rows of a stage of the first round."""
    files = sorted(run_dir.glob(f"rounds/00000/{stage}-*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def steps(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The run directory of the same recipe on one rank and on two."""
    import subprocess
    import sys

    where = tmp_path_factory.mktemp("judge")
    model = make_language_model(where / "referee")
    found = {}
    for ranks in (1, 2):
        recipe = write_recipe(where / f"on{ranks}", model)
        command = [sys.executable, "-m", "align.cli", "run", str(recipe), "--ranks", str(ranks)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        asked = "round 0: referee is asked 288 questions about two responses (training.reward.judge)"
        for line in (asked, "plan: referee is asked 288 questions about two responses a round, 288 in all"):
            assert line in done.stdout + done.stderr
        found[ranks] = recipe.parent / "runs" / "tiny"
    return found


def test_every_two_responses_are_compared_in_both_orders_and_told(runs: dict[int, Path]) -> None:
    """24 prompts of 4 responses: 12 answers each."""
    answers = rows(runs[1], "comparisons")
    prompt_of = {row["id"]: row["prompt_id"] for row in rows(runs[1], "samples")}
    pairs = {(row["first_id"], row["second_id"]) for row in answers}
    assert len(answers) == len(pairs) == 24 * 12 and all((b, a) in pairs for a, b in pairs)
    assert all(prompt_of[row["first_id"]] == prompt_of[row["second_id"]] == row["prompt_id"] for row in answers)
    strengths = np.array([row["strength"] for row in answers])
    assert np.abs(strengths).max() <= 1.0 and strengths.std() > 1e-3
    (told,) = read_summary(runs[1])["comparing"]
    assert (told["judge"], told["questions"], told["unread"]) == ("referee", 288, 0)
    assert told["first_place"] == pytest.approx(strengths.mean())
    assert read_summary(runs[1])["seconds"]["compare"] > 0


def test_the_judge_answers_no_question_twice(runs: dict[int, Path]) -> None:
    """Its verdicts are made of the same answers: the mean half difference over a prompt's other responses."""
    strength = {(row["first_id"], row["second_id"]): row["strength"] for row in rows(runs[1], "comparisons")}
    said = {row["sample_id"]: row["value"] for row in rows(runs[1], "verdicts") if row["verifier"] == "referee"}
    assert len(said) == 96
    for name, value in said.items():
        gains = [(strength[a, b] - strength[b, a]) / 2 for a, b in strength if a == name]
        assert value == pytest.approx(sum(gains) / 3, abs=1e-12)
    counted = read_summary(runs[1])["verifiers"]["referee"]["counted"]
    before = 8 * 2  # the evaluation of round 0: 8 prompts of 2 responses
    assert counted["requests"] == 2 * (288 + before)  # a request a word
    assert counted["compared"] == (288 + before) / 2


def test_the_advantages_follow_the_judge_and_not_p_good(runs: dict[int, Path]) -> None:
    """`score` is the rating, which adds up to 0 over a prompt; P(good) does not."""
    made = steps(runs[1])
    assert made and all(row["score"] == pytest.approx(0.0, abs=1e-9) and row["score_std"] > 0 for row in made)
    report = json.loads((runs[1] / "rounds" / "00000" / "training.json").read_text())
    assert report["counts"]["unread_preferences"] == report["counts"]["uncompared"] == 0


def test_two_ranks_are_one(runs: dict[int, Path]) -> None:
    one, two = ({(r["first_id"], r["second_id"]): r["strength"] for r in rows(runs[n], "comparisons")} for n in (1, 2))
    assert one.keys() == two.keys() and [two[k] for k in one] == pytest.approx(list(one.values()), abs=1e-5)
    for key in ("loss", "grad_norm", "score_std", "advantage_std"):
        assert [row[key] for row in steps(runs[2])] == pytest.approx([row[key] for row in steps(runs[1])], abs=1e-4), (
            key
        )


def test_the_plan_counts_the_questions(runs: dict[int, Path], align: Callable) -> None:
    recipe = runs[1].parents[1] / "tiny.yaml"
    done = align("plan", recipe)
    assert done.status == 0, done.err
    assert "288 questions" in done.out and "referee is asked 288 questions about two responses a round" in done.out
