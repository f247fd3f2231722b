"""Columns of the prompt source that verifiers read: they travel with the prompt, and contradictions are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from align.errors import InputError
from align.prompts import PromptSet, load_prompts
from align.recipe import Recipe, Scratch
from align.training.scratch import build_tokenizer
from align.verifiers.base import Abstain, Item


def load(folder: Path, rows: list[dict[str, Any]], *verifiers: dict[str, Any]) -> PromptSet:
    file = folder / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    block = {"name": "n", "policy": {"model": "m"}, "sampling": {"max_new_tokens": 4}}
    block |= {"prompts": {"source": str(file), "eval_fraction": 0.5}, "verifiers": list(verifiers)}
    return load_prompts(Recipe.model_validate(block), build_tokenizer(Scratch(context=60)), 60)


RULES = {"kind": "instructions", "name": "rules", "column": "checks"}
TESTS = {"kind": "code_tests", "name": "unit"}
ROWS: list[dict[str, Any]] = [
    {"prompt": f"{i}+1=", "checks": [{"check": "json"}], "tests": f"assert {i}"} for i in range(8)
]


def test_columns_travel_as_text_and_belong_to_the_run(tmp_path: Path) -> None:
    found = load(tmp_path, ROWS, RULES, TESTS)
    by_text = {p.text: dict(p.columns) for p in (*found.train, *found.eval)}
    assert by_text["3+1="] == {"checks": '[{"check": "json"}]', "tests": "assert 3"}
    changed = load(tmp_path, [{**row, "tests": "assert 0"} for row in ROWS], RULES, TESTS)
    plain = load(tmp_path, ROWS, {"kind": "noise", "name": "coin"})
    assert len({found.digest, changed.digest, plain.digest}) == 3
    assert all(p.columns == () for p in plain.train)


def test_a_prompt_without_the_column_is_no_error_but_an_abstention(tmp_path: Path) -> None:
    found = load(tmp_path, [{**row, "tests": None} for row in ROWS], TESTS)
    item = Item("s", "p", "q", "r", None, 1, "stop", found.train[0].columns)
    with pytest.raises(Abstain, match="no text in column tests"):
        item.column("tests")


def test_contradictions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not the same in the verifiers' columns"):
        load(tmp_path, [*ROWS, {**ROWS[0], "tests": "assert 9"}], TESTS)
    with pytest.raises(ValidationError, match="verifiers.0: reads the column 'tests', and the built-in task has no"):
        Recipe.model_validate({"name": "n", "policy": {"model": "m"}, "verifiers": [TESTS]})
    judge = {"kind": "judge", "name": "j", "model": "m", "show_answer": True}
    with pytest.raises(ValidationError, match="verifiers.0: 'j' needs reference answers"):
        load(tmp_path, ROWS, judge)
