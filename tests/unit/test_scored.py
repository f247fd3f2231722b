"""Scored responses as units: order, splitting, and where each response's row is found."""

from __future__ import annotations

from dataclasses import replace

import torch

from align.records import Sample, Score
from align.training.packing import lay_out, plan_batches
from align.training.scored import make_steps, per_token, rows_of, scored_groups, split_units, whole_unit
from align.training.trainers import RoundData

BLANK = Sample("", "", 0, 0, 0, (4, 5), (7, 1), (-0.1, -0.2), "", "stop", 1.0, 1.0, 0, 8)


def data(prompts: int, each: int) -> RoundData:
    samples = {
        f"p{p}r{r}": replace(BLANK, id=f"p{p}r{r}", prompt_id=f"p{p}", index=r, response_ids=(7,) * (r + 1))
        for p in range(prompts)
        for r in range(each)
    }
    return RoundData(0, samples, [Score(s.id, s.prompt_id, 0.5, 0.5, 0.0, 3) for s in samples.values()])


def test_groups_do_not_depend_on_the_order_of_scores() -> None:
    given = data(3, 2)
    turned = RoundData(0, given.samples, list(reversed(given.scores)))
    assert scored_groups(given) == scored_groups(turned)
    assert [r.sample.id for r in scored_groups(given)["p1"]] == ["p1r0", "p1r1"]


def test_an_empty_response_is_left_out() -> None:
    given = data(1, 2)
    samples = {**given.samples, "p0r0": replace(given.samples["p0r0"], response_ids=())}
    assert [r.sample.id for r in scored_groups(RoundData(0, samples, given.scores))["p0"]] == ["p0r1"]


def test_steps_keep_prompts_whole_and_every_prompt_comes_once() -> None:
    groups = scored_groups(data(5, 3))
    steps = make_steps(groups, 2, "seed", lambda rows: whole_unit(rows, lambda r: r.sample))
    assert [len(step) for step in steps] == [2, 2, 1]
    seen = [row.sample.prompt_id for step in steps for unit in step for row in unit.rows]
    assert sorted(seen) == sorted(r.sample.prompt_id for rows in groups.values() for r in rows)
    again = make_steps(groups, 2, "seed", lambda rows: whole_unit(rows, lambda r: r.sample))
    assert steps == again != make_steps(groups, 2, "other", lambda rows: whole_unit(rows, lambda r: r.sample))


def test_units_split_at_the_budget_and_a_long_response_stands_alone() -> None:
    rows = scored_groups(data(1, 4))["p0"]  # responses of 1, 2, 3, 4 tokens behind a prompt of 2
    units = split_units(rows, lambda r: r.sample, token_budget=5)
    assert [[len(r) for r in u.group.responses] for u in units] == [[1, 2], [3], [4]]


def test_rows_and_values_follow_the_layout() -> None:
    units = whole_unit(scored_groups(data(1, 3))["p0"], lambda r: r.sample)
    batch = lay_out([units[0].group], plan_batches([units[0].group], 64)[0])
    assert [row.sample.id for row in rows_of(batch, units)] == ["p0r0", "p0r1", "p0r2"]
    assert per_token(torch.tensor([1.0, 2.0, 3.0]), batch.lengths, 6).tolist() == [1, 2, 2, 3, 3, 3]
