"""The run's own arithmetic, and what is shown when closing fails too."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.distributed import Ranks
from align.errors import InputError, RunError
from align.inputs import check_inputs
from align.pairs import pairs_per_prompt
from align.recipe import Recipe
from align.run import Run
from align.store import RunStore


def recipe(**changes: Any) -> Recipe:
    base = {"name": "run", "policy": {"model": "some/model"}, "verifiers": [{"kind": "noise", "name": "coin"}]}
    return Recipe.model_validate({**base, **changes})


def test_the_schedule_spans_the_steps_that_are_made() -> None:
    """65 pairs in steps of 64 are two steps an epoch, not one and a bit: 3 rounds of 4 epochs make 24."""
    made = recipe(rounds={"count": 3, "prompts_per_round": 65}, training={"epochs": 4, "pairs_per_step": 64})
    assert Run.total_steps(SimpleNamespace(recipe=made)) == 24  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pairs", "most"),
    [
        ({"builder": "best_worst"}, 1),
        ({"builder": "all_margin"}, 28),
        ({"builder": "top_bottom", "k": 3}, 9),
        ({"builder": "top_bottom", "k": 7}, 16),  # eight samples: four against four
        ({"builder": "all_margin", "max_per_prompt": 5}, 5),
    ],
)
def test_pairs_per_prompt_by_hand(pairs: dict[str, Any], most: int) -> None:
    assert pairs_per_prompt(recipe(pairs=pairs, sampling={"samples_per_prompt": 8})) == most


class Breaks:
    """A part that cannot be closed."""

    def close(self) -> None:
        raise RunError("second")


def opened(tmp_path: Path) -> Run:
    made = recipe(output_dir=str(tmp_path))
    run = Run(made, Ranks(), RunStore.open(made, Ranks(), identity={}))
    run._sampler = Breaks()  # type: ignore[assignment]
    return run


def test_an_error_while_closing_does_not_hide_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = opened(tmp_path)
    run.close(RunError("first"))
    assert "while stopping: second" in capsys.readouterr().out
    assert run.store.read_json(None, "summary") is not None
    RunStore.open(run.recipe, Ranks(), identity={}).close()  # the directory was let go


def test_an_error_while_closing_a_sound_run_is_raised(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="second"):
        opened(tmp_path).close(None)


def test_every_fault_of_the_inputs_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything starts: the shape that the sampler cannot run, an engine setting, two word lists."""
    monkeypatch.setattr("align.inputs.uses_gpu", lambda: False)
    made = recipe(
        policy={"from_scratch": {"head_dim": 20}},
        cold_start={"steps": 1},
        sampling={"max_new_tokens": 8, "engine": {"trust_remote_code": True}},
        verifiers=[{"kind": "vocabulary", "name": "words", "file": str(tmp_path / "absent.txt")}],
        evaluation={"gold": {"kind": "lexicon", "name": "mood", "file": str(tmp_path / "gone.txt")}},
    )
    with pytest.raises(InputError) as caught:
        check_inputs(made)
    lines = str(caught.value).splitlines()
    for start, key in enumerate(
        ("policy.from_scratch.head_dim", "sampling.engine.trust_remote_code", "verifiers.words.file", "evaluation.gold")
    ):
        assert lines[start].startswith(key)


def test_a_mistaken_verb_does_not_mark_the_run_as_failed(tmp_path: Path) -> None:
    run = opened(tmp_path)
    run.close(InputError("no such round"))
    assert run.store.read_json(None, "summary") is None
