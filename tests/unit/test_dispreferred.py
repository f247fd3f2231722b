"""Bad answers that come with the prompts: read, tokenised as responses are, refused by name, counted where too long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from align.errors import InputError
from align.memory import batch_tokens
from align.prompts import PromptSet, load_prompts
from align.recipe import Recipe, Scratch
from align.records import Given
from align.training.scratch import build_tokenizer

TOKENIZER = build_tokenizer(Scratch(context=24))
ROWS = [{"prompt": f"{i}+1=", "bad": f"{i}?", "split": "train" if i < 8 else "eval"} for i in range(1, 10)]
KEY = "training.negative.dispreferred_column"


def recipe(source: str, algorithm: str = "d2o", prompts: dict[str, Any] | None = None, **negative: Any) -> Recipe:
    negative = {"dispreferred_column": "bad", "preflight": {"mode": "off"}, **negative}
    return Recipe.model_validate(
        {
            "name": "n",
            "policy": {"model": "m"},
            "sampling": {"max_new_tokens": 4, "samples_per_prompt": 2},
            "prompts": {"source": source, "split_column": "split", **(prompts or {})},
            "verifiers": [{"kind": "noise", "name": "coin"}],
            "training": {"algorithm": algorithm, "negative": negative, "responses_per_step": 2, "tokens_per_batch": 1},
        }
    )


def load(folder: Path, rows: list[dict[str, Any]], **options: Any) -> PromptSet:
    file = folder / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_prompts(recipe(str(file), **options), TOKENIZER, 24)


def refusal(folder: Path, rows: list[dict[str, Any]], **options: Any) -> str:
    with pytest.raises(InputError) as refused:
        load(folder, rows, **options)
    return str(refused.value).replace(str(folder / "p.jsonl"), "FILE")


def test_every_training_prompt_gets_its_answer_with_the_end_of_sequence(tmp_path: Path) -> None:
    found = load(tmp_path, ROWS)
    (asked,) = [p for p in found.train if p.text == "3+1="]
    three, question = TOKENIZER.convert_tokens_to_ids(["3", "?"])
    assert asked.dispreferred == Given("3?", (three, question, TOKENIZER.eos_token_id))
    assert all(p.dispreferred is not None for p in found.train) and all(p.dispreferred is None for p in found.eval)
    assert found.report["dispreferred_too_long"] == 0
    plain = load(tmp_path, ROWS, dispreferred_column=None)
    assert all(p.dispreferred is None for p in plain.train) and "dispreferred_too_long" not in plain.report
    other = load(tmp_path, [{**row, "bad": "0"} for row in ROWS])
    assert len({found.digest, plain.digest, other.digest}) == 3  # a resumed run refuses other answers


def test_an_answer_that_is_not_there_is_refused_by_its_line(tmp_path: Path) -> None:
    rows = [dict(row) for row in ROWS]
    rows[1]["bad"], rows[2]["bad"], rows[4]["bad"] = " ", 5, "ü"
    del rows[3]["bad"]
    message = refusal(tmp_path, rows).splitlines()
    assert message[:2] == ["FILE:2: bad: is empty", "FILE:3: bad: expected text, found 5"]
    assert message[2].startswith("FILE:4: no column 'bad'; ") and message[3].startswith(KEY) and len(message) == 4
    strange = refusal(tmp_path, [{**row, "bad": "ü"} if row["bad"] == "5?" else row for row in ROWS])
    assert strange.startswith("FILE:5: 'ü' is unknown to the tokenizer")
    assert load(tmp_path, [*ROWS[:-1], {**ROWS[-1], "bad": None}]).report["eval"] == 2  # held out: none is needed


def test_too_long_with_its_prompt_is_refused_or_left_out_and_counted(tmp_path: Path) -> None:
    """Four tokens of prompt and one for the end leave 19 of the context's 24 to the answer."""
    fits, over = ({**ROWS[0], "bad": "7" * n} for n in (19, 20))
    assert load(tmp_path, [fits, *ROWS[1:]]).report["train"] == 7
    message = refusal(tmp_path, [over, *ROWS[1:]])
    assert message.startswith(f"FILE:1: 25 tokens with its answer\n{KEY}: 1 of 7 training rows are longer than the")
    found = load(tmp_path, [over, *ROWS[1:]], prompts={"max_dropped_fraction": 0.2})
    assert found.report["train"] == 6 and found.report["dispreferred_too_long"] == 1
    assert "1+1=" not in {p.text for p in found.train}


def test_two_answers_to_one_prompt_contradict_each_other(tmp_path: Path) -> None:
    again = {**ROWS[0], "bad": "0"}
    assert refusal(tmp_path, [*ROWS, again]).startswith(
        "FILE:10: same prompt as FILE:1, but another dispreferred answer; keep one row"
    )
    assert load(tmp_path, [*ROWS, ROWS[0]]).report["duplicates"] == 1


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"algorithm": "nsr"}, f"{KEY}: nsr does not read it"),
        (
            {"source": "arithmetic", "prompts": {"split_column": None}},
            f"{KEY}: reads the column 'bad', and the built-in",
        ),
        ({"prompts": {"answer_column": "bad"}}, f"{KEY}: 'bad' is prompts.answer_column already"),
        ({"wrong_below": 0.3}, "training.negative.wrong_below: no one reads it with dispreferred_column"),
    ],
)
def test_what_would_not_be_read_is_refused_by_key(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ValidationError) as refused:
        recipe(**{"source": "p.jsonl", **options})
    lines = refused.value.errors()[0]["msg"].removeprefix("Value error, ").splitlines()
    assert len(lines) == 1 and lines[0].startswith(line)


def test_a_fallback_reads_the_threshold_again() -> None:
    made = recipe("p.jsonl", wrong_below=0.3, preflight={"mode": "fallback"})
    assert made.training.negative.wrong_below == 0.3


def test_the_plan_has_room_for_the_answer_beside_the_samples() -> None:
    """D2O splits no prompt: two samples and an answer of four tokens behind a prompt of six, whatever the budget."""
    assert batch_tokens(recipe("p.jsonl"), 1, 10) == (6 + 3 * 4, 6 + 3 * 4)
    assert batch_tokens(recipe("p.jsonl", dispreferred_column=None), 1, 10) == (6 + 2 * 4, 6 + 2 * 4)
