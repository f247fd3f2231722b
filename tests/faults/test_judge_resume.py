"""Killed while a judge compares responses: nothing is lost, nothing is there twice, and the end is the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.test_language_verifiers import make_language_model
from tests.e2e.test_pairwise_judge import rows, steps, write_recipe

pytestmark = pytest.mark.engine

POINTS = [
    "store.ledger.before_rename:8",  # one shard of answers is committed, the next is there and nothing says so
    "score.comparisons.after",
]
"""Six ledger entries come before: three of the evaluation, three of the samples."""


def weights(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "export" / "model.safetensors").read_bytes()).hexdigest()


def test_killed_while_comparing_ends_the_same(tmp_path: Path, align: Callable) -> None:
    """pairwise_ppo: 24 prompts of 4 responses, each against the greedy one, in both orders; and a critic."""
    model = make_language_model(tmp_path / "referee")
    straight, broken = (write_recipe(tmp_path / name, model, "pairwise_ppo") for name in ("straight", "broken"))
    done = align("run", straight)
    assert done.status == 0, done.err
    expected, found = straight.parent / "runs" / "tiny", broken.parent / "runs" / "tiny"
    for point, shards in zip(POINTS, (1, 3), strict=True):
        killed = align("run", broken, fault=point)
        assert killed.status not in (0, 2), f"{point} was not reached:\n{killed.out}\n{killed.err}"
        assert len(list(found.glob("rounds/00000/comparisons-*.json"))) == shards
        kept = rows(found, "comparisons")
        assert len(kept) == len({(r["first_id"], r["second_id"]) for r in kept})
    last = align("run", broken)
    assert last.status == 0, last.err
    assert rows(found, "comparisons") == rows(expected, "comparisons")
    assert len(rows(found, "comparisons")) == 24 * 4 * 2
    verdicts = [
        [(r["sample_id"], r["verifier"], r["value"], r["reason"]) for r in rows(d, "verdicts")]
        for d in (expected, found)
    ]
    assert verdicts[0] == verdicts[1]  # those of the judge are made of the kept answers and of further ones
    files = [sorted(run_dir.glob("rounds/00000/comparisons-*.parquet")) for run_dir in (expected, found)]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]] and len(files[0]) == 3
    assert weights(found) == weights(expected)
    both = [[{k: v for k, v in row.items() if k != "seconds"} for row in steps(d)] for d in (expected, found)]
    assert both[0] == both[1]
