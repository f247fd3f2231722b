"""What aligned models make of a response, in batches: the numbers of one sequence at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align.training import aligned
from tests.e2e.test_language_verifiers import by_transformers, make_language_model

TEXTS = [("12+3=", "15", True), ("7*8=", "fifty-six, I think", False), ("1", "0" * 40, True), ("9-", "", False),
         ("", "5", True), ("1+1=", "2", False), ("what is three and four? ", "seven", True)]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_model(tmp_path_factory.mktemp("aligned"))


def test_batches_by_hand() -> None:
    """Longest first; a width of 5 has room for one row in 9, of 4 for two, of 2 for four; 12 is over and alone."""
    assert aligned.batches([4, 12, 2, 5, 3, 2], 9) == [[1], [3], [0, 4], [2, 5]]
    assert aligned.batches([], 9) == []


@pytest.mark.parametrize("token_budget", [1, 60, 10_000])
def test_a_budget_changes_no_value(folder: Path, token_budget: int) -> None:
    """Against transformers on one sequence at a time; a token a byte, and the end of sequence where there was one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = aligned._ask(folder, TEXTS, token_budget, torch.device("cpu"))
    assert [value is None for value in found] == [not prompt or not response for prompt, response, _ in TEXTS]
    kept = [(text, value) for text, value in zip(TEXTS, found, strict=True) if value is not None]
    pairs = [
        (tokenizer(p)["input_ids"], [*tokenizer(r)["input_ids"], *([tokenizer.eos_token_id] if ended else [])])
        for (p, r, ended), _ in kept
    ]
    expected = [sum(row) / len(row) for row in by_transformers(folder, pairs)]
    assert [value for _, value in kept] == pytest.approx(expected, rel=1e-6)  # float32 holds no more of them
    assert max(expected) - min(expected) > 0.2
