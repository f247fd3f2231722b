"""Verifiers that ask a language model, in a run of two ranks: every response judged once, and as on one rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.conftest import TINY, Finished
from tests.e2e.test_language_verifiers import make_language_model


@pytest.mark.engine
def test_two_ranks_judge_what_one_judges_and_nothing_twice(tmp_path: Path, align: Callable[..., Finished]) -> None:
    judge = {"kind": "judge", "model": str(make_language_model(tmp_path / "judge")), "least_mass": 0.0}
    verifiers: list[dict[str, Any]] = [
        {**judge, "name": "alone"},
        {**judge, "name": "duel", "mode": "pairwise", "opponents": 1},
        {"kind": "sequence_likelihood", "name": "own"},
    ]
    found = {}
    for ranks in (1, 2):
        recipe = tmp_path / f"{ranks}.yaml"
        recipe.write_text(
            TINY.format(output=tmp_path / f"runs-{ranks}").replace("prompts_per_shard: 8", "prompts_per_shard: 3")
        )
        changes = [f"verifiers={json.dumps(verifiers)}", "rounds.count=1", "rounds.prompts_per_round=6"]
        for verb in ("sample", "score"):
            done = align(verb, recipe, *changes, "sampling.samples_per_prompt=2", "--ranks", str(ranks))
            assert done.status == 0, done.err
        found[ranks] = _round(tmp_path / f"runs-{ranks}" / "tiny" / "rounds" / "00000")
    one, two = found[1], found[2]
    names = {v["name"] for v in verifiers}
    for ids, verdicts, _ in (one, two):
        asked = [(row["sample_id"], row["verifier"]) for row in verdicts]
        assert len(asked) == len(set(asked)) == 12 * 3 and set(asked) == {(i, n) for i in ids for n in names}
        assert all(row["value"] is not None for row in verdicts if row["verifier"] != "own")
    assert one[0] == two[0] and len(two[0]) == 12
    by_name = [{(r["sample_id"], r["verifier"]): r["value"] for r in verdicts} for _, verdicts, _ in (one, two)]
    assert by_name[0] == pytest.approx(by_name[1], abs=1e-4, nan_ok=True)
    for name in names:
        assert one[2][name]["counted"]["requests"] == two[2][name]["counted"]["requests"] > 0


def _round(folder: Path) -> tuple[set[str], list[dict[str, Any]], dict[str, Any]]:
    """(ids of the samples, verdicts, what the report says of the verifiers)."""
    rows = {s: [r for f in folder.glob(f"{s}-*.parquet") for r in pq.read_table(f).to_pylist()]
            for s in ("samples", "verdicts")}  # fmt: skip
    report = json.loads((folder / "ensemble.json").read_text())
    return {row["id"] for row in rows["samples"]}, rows["verdicts"], report["verifiers"]
