"""The cold start through the real TRL: against plain PyTorch, on one rank and on two, and with bad input."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from align.distributed import Ranks
from align.errors import InputError, RunError
from align.prompts import load_prompts
from align.recipe import Recipe, Scratch
from align.training.scratch import create_model
from align.training.sft import _batching, _row_order, cold_start
from align.training.sft_data import Example, prepare
from tests.e2e.jobs import on_ranks

JOB = Path(__file__).with_name("sft_job.py")
CONTEXT = 64
SHAPE = Scratch(hidden_size=64, intermediate_size=128, layers=2, heads=2, kv_heads=1, head_dim=32, context=CONTEXT)

pytestmark = [
    pytest.mark.engine,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(torch|trl|transformers|accelerate|datasets)"),
    pytest.mark.filterwarnings("ignore::FutureWarning:(torch|trl|transformers|accelerate)"),
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sft") / "model"
    create_model(directory, SHAPE, seed=2)
    return directory


def recipe_of(cold: dict[str, Any] | None = None, *, prompts: dict[str, Any] | None = None, **blocks: Any) -> Recipe:
    task = {"arithmetic": {"digits": 1, "count": 60}, "eval_fraction": 0.2}
    settings = {"steps": 6, "batch_size": 8, "warmup_steps": 2, "learning_rate": 5e-3, "error_rate": 0.5}
    return Recipe.model_validate(
        {
            "name": "cold",
            "policy": {"from_scratch": SHAPE.model_dump(), "dtype": "float32"},
            "cold_start": {**settings, **(cold or {})},
            "prompts": {**task, **(prompts or {})},
            "sampling": {"max_new_tokens": 8},
            "verifiers": [{"kind": "noise", "name": "coin"}],
            **blocks,
        }
    )


def run(recipe: Recipe, model_dir: Path, directory: Path) -> dict[str, Any]:
    prompts = load_prompts(recipe, AutoTokenizer.from_pretrained(model_dir), CONTEXT)
    return cold_start(model_dir, recipe, prompts, directory, Ranks())


def examples_of(recipe: Recipe, model_dir: Path) -> tuple[list[Example], dict[str, int]]:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return prepare(recipe, load_prompts(recipe, tokenizer, CONTEXT), tokenizer, model_dir)


# ---- the mathematics ----------------------------------------------------------------------------------------------


def plain_training(recipe: Recipe, model_dir: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same optimisation written out: one row at a time, the loss over response tokens only."""
    settings = recipe.cold_start
    assert settings is not None
    examples, _ = examples_of(recipe, model_dir)
    order = iter(_row_order(len(examples), settings.steps * settings.batch_size, recipe.seed))
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32")
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.warmup_steps, settings.steps)
    losses = []
    for _ in range(settings.steps):
        batch = [examples[next(order)] for _ in range(settings.batch_size)]
        tokens = sum(len(e.response_ids) for e in batch)
        loss = torch.zeros(())
        for e in batch:
            logits = model(torch.tensor([[*e.prompt_ids, *e.response_ids]])).logits[0, len(e.prompt_ids) - 1 : -1]
            loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(e.response_ids), reduction="sum")
        (loss / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item() / tokens)
    return losses, model.state_dict()


def test_trl_does_what_plain_pytorch_does(model_dir: Path, tmp_path: Path) -> None:
    """Completion-only loss with the end of sequence in it, our row order, warm-up, cosine decay, clipping at 1."""
    recipe = recipe_of()
    losses, weights = plain_training(recipe, model_dir)
    report = run(recipe, model_dir, tmp_path)
    assert report["loss_first"] == pytest.approx(losses[0], abs=1e-5)
    assert report["loss_last"] == pytest.approx(sum(losses) / 6, abs=1e-4), "six steps are all among the last ten"
    saved = load_file(tmp_path / "model.safetensors")
    for name, tensor in saved.items():
        assert torch.allclose(tensor, weights[name], atol=2e-4), name
    examples, _ = examples_of(recipe, model_dir)
    order = _row_order(len(examples), 48, recipe.seed)
    assert report["tokens"] == sum(len(examples[i].prompt_ids) + len(examples[i].response_ids) for i in order)


@pytest.mark.parametrize("budget", [1, 40])
def test_the_token_budget_does_not_change_the_losses(model_dir: Path, tmp_path: Path, budget: int) -> None:
    whole = run(recipe_of(), model_dir, tmp_path / "a")
    cut = run(recipe_of(training={"tokens_per_batch": budget}), model_dir, tmp_path / "b")
    for name in ("loss_first", "loss_last"):
        assert cut[name] == pytest.approx(whole[name], abs=1e-5)


def test_the_same_seed_gives_the_same_bytes_and_nothing_else_is_changed(model_dir: Path, tmp_path: Path) -> None:
    environment, threads = dict(os.environ), torch.get_num_threads()
    joined = torch.distributed.is_initialized()
    torch.manual_seed(4), random.seed(4), numpy.random.seed(4)
    expected = torch.rand(2).tolist(), random.random(), numpy.random.rand()
    torch.manual_seed(4), random.seed(4), numpy.random.seed(4)
    run(recipe_of(), model_dir, tmp_path / "a")
    assert (torch.rand(2).tolist(), random.random(), numpy.random.rand()) == expected
    assert dict(os.environ) == environment and torch.get_num_threads() == threads
    assert not PartialState._shared_state and not AcceleratorState._shared_state
    assert torch.distributed.is_initialized() == joined
    run(recipe_of(), model_dir, tmp_path / "b")
    run(recipe_of(seed=1), model_dir, tmp_path / "c")
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_the_model_learns_to_answer_and_to_stop(model_dir: Path, tmp_path: Path) -> None:
    """One-digit sums without errors: after 150 steps the greedy answer to most seen questions is right."""
    recipe = recipe_of({"steps": 150, "batch_size": 48, "error_rate": 0.0})
    report = run(recipe, model_dir, tmp_path)
    assert report["loss_last"] < 0.2 < report["loss_first"] and report["wrong_examples"] == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompts = load_prompts(recipe, tokenizer, CONTEXT).train
    out = model.generate(torch.tensor([p.token_ids for p in prompts]), max_new_tokens=4, do_sample=False)
    right = [
        tokenizer.decode(row[len(p.token_ids) :]).split("<pad>")[0] == f"{p.answer}<eos>"
        for row, p in zip(out, prompts, strict=True)
    ]
    assert sum(right) > 0.9 * len(prompts)


# ---- ranks --------------------------------------------------------------------------------------------------------


def start(count: int, recipe: Recipe, model_dir: Path, out: Path) -> list[dict[str, Any]]:
    """Run the job on `count` processes; returns every rank's report."""
    out.mkdir()
    text = json.dumps({"recipe": recipe.model_dump(mode="json"), "model": str(model_dir), "out": str(out)})
    on_ranks(count, [sys.executable, str(JOB), text], {}, named_alone=True, timeout_s=300)
    return [json.loads((out / f"report.{rank}.json").read_text()) for rank in range(count)]


def test_two_ranks_give_the_losses_of_one_and_end_with_the_same_weights(model_dir: Path, tmp_path: Path) -> None:
    recipe = recipe_of(training={"tokens_per_batch": 20})
    one, two = start(1, recipe, model_dir, tmp_path / "one"), start(2, recipe, model_dir, tmp_path / "two")
    again = start(2, recipe, model_dir, tmp_path / "again")
    for report in (*two, *again):
        for name in ("loss_first", "loss_last"):
            assert report[name] == pytest.approx(one[0][name], abs=1e-5)
        assert report["tokens"] == one[0]["tokens"] and report["group"], "the ranks' group must stay open"
    assert not one[0]["group"], "a single rank opens no group"
    weights = {(out, rank): (tmp_path / out / f"weights.{rank}.safetensors").read_bytes()
               for out in ("two", "again") for rank in (0, 1)}  # fmt: skip
    assert len(set(weights.values())) == 1, "both ranks, and both runs, bitwise"
    saved, seen = load_file(tmp_path / "two/model/model.safetensors"), load_file(tmp_path / "two/weights.1.safetensors")
    assert all(torch.equal(saved[name], seen[name]) for name in saved)


def test_micro_batches_fill_the_budget_and_divide_the_share() -> None:
    assert _batching(128, 2, 13, 8192) == (64, 1)
    assert _batching(128, 1, 100, 4000) == (32, 4)  # 40 rows fit, 32 is the largest divisor of 128 up to that
    assert _batching(12, 2, 5000, 4000) == (1, 6)  # a row over the budget still goes, by itself
    with pytest.raises(InputError, match="cold_start.batch_size: 7 does not divide by 2 ranks; use a multiple of 2"):
        _batching(7, 2, 13, 8192)


# ---- what is trained on -------------------------------------------------------------------------------------------


def test_written_solutions_use_training_prompts_and_the_error_rate(model_dir: Path) -> None:
    recipe = recipe_of({"steps": 100, "batch_size": 32, "error_rate": 0.3, "examples": 3000})
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    prompts = load_prompts(recipe, tokenizer, CONTEXT)
    examples, counts = prepare(recipe, prompts, tokenizer, model_dir)
    assert len(examples) == 3000 == counts["examples"]
    answers = {p.token_ids: p.answer for p in prompts.train}
    wrong = 0
    for e in examples:
        assert e.response_ids[-1] == tokenizer.eos_token_id
        wrong += tokenizer.decode(e.response_ids[:-1]) != answers[e.prompt_ids]
    assert wrong == counts["wrong_examples"] == pytest.approx(900, abs=4 * 25), "binomial: deviation 25"
    assert prepare(recipe, prompts, tokenizer, model_dir)[0] == examples
    few, _ = examples_of(recipe_of({"steps": 2, "batch_size": 8}), model_dir)
    assert len(few) == 16, "no more than the steps read"


def test_every_epoch_is_a_whole_order_of_its_own() -> None:
    order = _row_order(10, 25, seed=1)
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10)) and order[:10] != order[10:20]
    assert len(order) == 25 and order == _row_order(10, 25, seed=1) != _row_order(10, 25, seed=2)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (recipe_of(prompts={"arithmetic": {"solution": "columns"}}), "sampling.max_new_tokens: 8 cuts off"),
        (
            recipe_of(policy={"from_scratch": {**SHAPE.model_dump(), "characters": "0123456789+="}},
                      prompts={"arithmetic": {"solution": "columns"}}),
            "':' is unknown to the tokenizer",
        ),
    ],
)  # fmt: skip
def test_solutions_that_the_policy_could_not_give_are_refused(recipe: Recipe, message: str, tmp_path: Path) -> None:
    assert recipe.policy.from_scratch is not None
    create_model(tmp_path / "m", recipe.policy.from_scratch, seed=0)
    with pytest.raises(InputError, match=message):
        examples_of(recipe, tmp_path / "m")


@pytest.fixture
def from_file(model_dir: Path, tmp_path: Path) -> Callable[..., Any]:
    """Examples from rows written to a file: from_file(rows, max_dropped_fraction=…)."""

    def from_file(rows: list[dict[str, Any]], **prompts: Any) -> tuple[list[Example], dict[str, int]]:
        path = tmp_path / "sft.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return examples_of(recipe_of({"source": str(path), "error_rate": 0.0}, prompts=prompts), model_dir)

    return from_file


def held_out(model_dir: Path) -> str:
    return load_prompts(recipe_of(), AutoTokenizer.from_pretrained(model_dir), CONTEXT).eval[0].text


def test_rows_of_a_file_become_prompt_response_and_end(from_file: Callable[..., Any]) -> None:
    examples, counts = from_file([{"prompt": "1+2:", "response": "3"}, {"prompt": "4", "response": "5 6"}])
    assert examples[0] == Example((4, 13, 5, 18), (6, 1)) and examples[1].response_ids == (8, 20, 9, 1)
    assert counts == {"examples": 2, "wrong_examples": 0, "too_long": 0}


def test_bad_rows_of_a_file_are_refused(from_file: Callable[..., Any], model_dir: Path) -> None:
    good = [{"prompt": "1:", "response": "2"}] * 3
    for row, message in [
        ({"prompt": "1:", "response": True}, r"sft.jsonl:4: response: expected text, found true"),
        ({"prompt": None, "response": "2"}, r"sft.jsonl:4: prompt: expected text, found null"),
        ({"prompt": "1:"}, r"sft.jsonl:4: no column 'response'"),
        ({"prompt": "1:", "response": "zwei"}, r"sft.jsonl:4: 'z' is unknown to the tokenizer"),
        ({"prompt": held_out(model_dir), "response": "2"}, r"sft.jsonl:4: this prompt is held out for evaluation"),
        ({"prompt": "1" * 60, "response": "2222"}, r"sft.jsonl:4: 65 tokens with its response\n.*1 of 4 rows"),
    ]:
        with pytest.raises(InputError, match=message):
            from_file([*good, row])
    examples, counts = from_file([*good, {"prompt": "1" * 60, "response": "2222"}], max_dropped_fraction=0.25)
    assert len(examples) == 3 and counts["too_long"] == 1
    assert len(from_file([*good, {"prompt": "1" * 60, "response": "222"}])[0]) == 4, "exactly the context"


def test_an_error_rate_needs_written_solutions(model_dir: Path) -> None:
    with pytest.raises(InputError, match="cold_start.error_rate: only written solutions"):
        examples_of(recipe_of({"source": "some.jsonl"}), model_dir)


def test_a_loss_that_is_no_number_stops_the_cold_start(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cold start: the loss is (nan|inf) at step \d+; lower cold_start.learn"):
        run(recipe_of({"learning_rate": 1e38, "warmup_steps": 0}), model_dir, tmp_path)
    assert not PartialState._shared_state
