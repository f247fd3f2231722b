"""The search over steps: scores, paths, values and pairs by hand."""

from __future__ import annotations

import math

import pytest

from align.builders.per_step import Candidates
from align.builders.steps import Prefix, Stepped, cut, prefix_id
from align.builders.tree import Place, expand, records, select, selection_score, similarity, tree_pairs
from align.recipe_steps import Steps, Tree
from tests.unit.chain_task import letters, make_sample

RULE = Steps(rule="tokens", tokens_per_step=2)


def root() -> Place:
    return Place(Prefix("p", make_sample("s", "p", (1,)), 0, (), ""), None)


def drawn(place: Place, *rows: tuple[tuple[int, ...], float | None]) -> list[tuple[Stepped, float | None]]:
    prompt = (9, *place.prefix.ids)
    return [
        (cut(make_sample(f"{place.prefix.id}{i}", place.prefix.id, ids, prompt), RULE, letters), p_good)
        for i, (ids, p_good) in enumerate(rows)
    ]


def test_the_selection_score_by_hand() -> None:
    child = Place(root().prefix, None, prior=0.5, value=0.5, visits=1)
    assert selection_score(child, 4, 1.0) == pytest.approx(0.25 + 0.5 * math.sqrt(math.log(4) / 2))
    assert selection_score(child, 4, 0.0) == 0.25 and selection_score(child, 0, 1.0) == 0.25


def test_expanding_makes_children_of_first_steps_and_rewards_the_whole_path() -> None:
    top = root()
    expand([top], drawn(top, ((1, 2, 3), 1.0), ((1, 2, 4), 0.5), ((5, 6, 7), 0.0), ((8, 8, 8), None)))
    first, second = top.children
    assert (first.prefix.ids, first.visits, first.value) == ((1, 2), 2, 0.5)
    assert (second.prefix.ids, second.visits, second.value) == ((5, 6), 1, -0.5)
    assert (top.visits, top.value) == (3, 0.0) and first.prior == pytest.approx(math.exp(-1.0))
    assert first.prefix.id == prefix_id("p", (1, 2)) and first.prefix.text == "bc"
    path = select(top, Tree())
    assert path is not None and path[-1] is first
    expand(path, drawn(first, ((3, 4), 0.0), ((5,), 1.0)))
    assert [c.ended for c in first.children] == [True, True] and first.children[1].prefix.ids == (1, 2, 5)
    assert (first.visits, first.value, top.visits, top.value) == (4, 0.5, 5, 0.0)


def test_the_search_leaves_what_is_finished() -> None:
    top = root()
    expand([top], drawn(top, ((1, 2), 1.0), ((3, 4, 5), 0.0)))  # the good one ends here
    path = select(top, Tree(exploration=0.0))
    assert path is not None and path[-1].prefix.ids == (3, 4)
    assert select(top, Tree(depth=1)) is None
    expand(path, drawn(path[-1], ((5,), None)))  # nobody could judge it: nothing is left
    assert select(top, Tree()) is None


def test_similarity_by_hand() -> None:
    assert similarity((1, 2, 3, 4), (1, 2, 5, 4)) == 0.75
    assert similarity((1, 2), (2, 1)) == 0.5 and similarity((1,), (1,)) == 1.0 and similarity((1,), (2,)) == 0.0


def pairs_of(*rows: tuple[tuple[int, ...], float | None], **settings: float) -> Candidates:
    top = root()
    expand([top], drawn(top, *rows))
    out = Candidates()
    tree_pairs("p", *records(top), Tree(**settings), out)
    return out


def test_the_pair_is_the_best_child_against_the_worst() -> None:
    out = pairs_of(((1, 2, 3), 0.9), ((5, 6, 7), 0.2), ((7, 8, 9), 0.4))
    ((better, worse),) = out.pairs["p"]
    assert out.samples[better.sample_id].response_ids == (1, 2) and better.p_good == pytest.approx(0.9)
    assert out.samples[worse.sample_id].response_ids == (5, 6) and worse.p_good == pytest.approx(0.2)
    assert out.samples[better.sample_id].prompt_ids == (9,)


@pytest.mark.parametrize(
    ("rows", "settings", "reason"),
    [
        ([((1, 2, 3), 0.55), ((5, 6, 7), 0.5)], {}, "too_close"),
        ([((1, 2, 3), 0.19), ((5, 6, 7), 0.0)], {}, "too_bad"),  # worth -0.31
        ([((1, 2, 3), 0.9), ((1, 4, 7), 0.0)], {"max_similarity": 0.4}, "too_alike"),
        ([((1, 2, 3), 0.9), ((1, 2, 7), 0.0)], {}, "one_child"),
        ([((1, 2, 3), None)], {}, "unjudged"),
    ],
)
def test_what_gives_no_pair_is_counted(rows: list, settings: dict, reason: str) -> None:
    out = pairs_of(*rows, **settings)
    assert not out.pairs and out.counts == {reason: 1}


def test_the_limits_are_met_from_the_right_side() -> None:
    assert pairs_of(((1, 2, 3), 0.75), ((5, 6, 7), 0.5), min_gap=0.25).pairs
    assert pairs_of(((1, 2, 3), 0.25), ((5, 6, 7), 0.0), min_best=-0.25).pairs
    assert pairs_of(((1, 2, 3), 0.9), ((1, 4, 7), 0.0), max_similarity=0.5).pairs


def test_each_place_gives_its_own_pair() -> None:
    top = root()
    expand([top], drawn(top, ((1, 2, 3), 1.0), ((5, 6, 7), 0.0)))
    path = select(top, Tree())
    assert path is not None
    expand(path, drawn(path[-1], ((3, 3), 1.0), ((4, 4), 0.0)))
    values, steps = records(top)
    out = Candidates()
    tree_pairs("p", values, steps, Tree(), out)
    better = [out.samples[a.sample_id] for a, _ in out.pairs["p"]]
    assert [(b.prompt_ids, b.response_ids) for b in better] == [((9,), (1, 2)), ((9, 1, 2), (3, 3))]
    assert {v.id: (v.step, v.rollouts, v.value) for v in values} == {
        prefix_id("p", (1, 2)): (1, 3, pytest.approx(1 / 6)), prefix_id("p", (5, 6)): (1, 1, -0.5),
        prefix_id("p", (1, 2, 3, 3)): (2, 1, 0.5), prefix_id("p", (1, 2, 4, 4)): (2, 1, -0.5),
    }  # fmt: skip
