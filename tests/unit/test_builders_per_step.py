"""Per-step pairs: values, pits, advantages and pairs worked out by hand, and what each rule leaves out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.builders.per_step import Candidates, bad_step, first_pit, per_step, worst_advantage
from align.builders.steps import Prefix, Stepped, cut
from align.builders.values import Drawn, Valued, tokens_at_most, value_prefixes, wrong_responses
from align.recipe_steps import Steps
from align.records import Score
from tests.unit.chain_task import letters, make_sample

ONE = {"rule": "tokens", "tokens_per_step": 1, "rollouts": 4, "best_of": 1}


def response(ids: Sequence[int] = (1, 2, 3, 4), prompt: str = "p", name: str = "w", index: int = 0) -> Stepped:
    return cut(make_sample(name, prompt, tuple(ids), index=index), Steps(**ONE), letters)


class Oracle:
    """Gives each prefix the judgements listed for its tokens, and remembers in which calls it was asked for what."""

    def __init__(self, judged: dict[tuple[int, ...], list[float | None]]) -> None:
        self.judged, self.calls = judged, list[list[tuple[int, ...]]]()

    def __call__(self, prefixes: Sequence[Prefix]) -> list[list[Drawn]]:
        self.calls.append([p.ids for p in prefixes])
        return [
            [
                Drawn(make_sample(f"{p.id}-{i}", p.id, (7, i, 0), (9, *p.ids)), v)
                for i, v in enumerate(self.judged[p.ids])
            ]
            for p in prefixes
        ]


def values(oracle: Oracle, wrong: Sequence[Stepped], **settings: object) -> tuple[Valued, dict[tuple[int, ...], float]]:
    found = value_prefixes(wrong, oracle, Steps(**(ONE | settings)))
    by_id = {r.prefix(i).id: r.prefix(i).ids for r in wrong for i in range(len(r.ends))}
    return found, {by_id[i]: v.value for i, v in found.values.items()}


GOOD_THEN_LOST = {
    (): [1.0, 1.0, 1.0, 0.0],
    (1,): [1.0, 0.0, 1.0, 0.0],
    (1, 2): [0.0, 0.0, 1.0, 0.0],
    (1, 2, 3): [0.0, 0.0, 0.0, 0.0],
}


def test_values_are_success_rates_and_the_whole_response_is_not_rolled_out() -> None:
    oracle = Oracle(GOOD_THEN_LOST)
    found, by_ids = values(oracle, [response()], prune=False)
    assert by_ids == {(1,): 0.5, (1, 2): 0.25, (1, 2, 3): 0.0}
    assert oracle.calls == [[(1,), (1, 2), (1, 2, 3)]]
    value = found.values[response().prefix(2).id]
    assert (value.prompt_id, value.sample_id, value.step, value.tokens, value.rollouts) == ("p", "w", 2, 2, 4)
    best = found.best[response().prefix(2).id]
    assert best.response_ids == (7, 2, 0) and best.prompt_ids == (9, 1, 2)  # the third of four succeeded
    assert response().prefix(3).id not in found.best


def test_a_rollout_succeeds_with_the_best_of_its_continuations() -> None:
    oracle = Oracle({(1,): [0.0, 1.0, 0.0, 0.0, 0.2, 0.4]})
    _, by_ids = values(oracle, [response((1, 2))], rollouts=3, best_of=2)
    assert by_ids == {(1,): pytest.approx(1 / 3)}  # (0, 1), (0, 0), (.2, .4) against P(good) .5
    _, by_ids = values(oracle, [response((1, 2))], rollouts=3, best_of=2, good=0.4)
    assert by_ids == {(1,): pytest.approx(2 / 3)}


def test_pruning_stops_behind_the_first_zero_and_asks_length_by_length() -> None:
    oracle = Oracle(GOOD_THEN_LOST | {(1, 2): [0.0] * 4, (5,): [1.0] * 4, (5, 2): [1.0] * 4, (5, 2, 3): [1.0] * 4})
    found, by_ids = values(oracle, [response(), response((5, 2, 3, 4), name="v")])
    assert oracle.calls == [[(1,), (5,)], [(1, 2), (5, 2)], [(5, 2, 3)]]
    assert (1, 2, 3) not in by_ids
    assert bad_step(response(), found.values, Steps(**ONE)) == 2


def test_a_prefix_of_two_responses_is_valued_once() -> None:
    oracle = Oracle(GOOD_THEN_LOST)
    pair = [response(), response((1, 2, 3, 5), name="v")]
    values(oracle, pair)
    assert [len(call) for call in oracle.calls] == [1, 1, 1]
    assert tokens_at_most(pair, Steps(**ONE)) == (3, 4 * (7 + 6 + 5))  # eight new tokens at most, four rollouts each


def test_prefixes_of_two_prompts_are_two() -> None:
    oracle = Oracle(GOOD_THEN_LOST)
    values(oracle, [response(), response(prompt="q", name="v")])
    assert [len(call) for call in oracle.calls] == [2, 2, 2]


@pytest.mark.parametrize(
    ("after", "step"), [([0.8, 0.2, 0.5, 0.2], 2), ([0.5, 0.5, 0.0, 0.0], 3), ([0.0, 0.5, 0.0], 1), ([0.3], 1)]
)
def test_the_first_pit_by_hand(after: list[float], step: int) -> None:
    assert first_pit(after) == step


@pytest.mark.parametrize(
    ("q", "step"), [([0.9, 0.8, 0.2, 0.0], 2), ([0.5, 0.0, 0.5, 0.0], 1), ([0.2, 0.9, 0.3, 0.0], 2)]
)
def test_the_worst_advantage_by_hand(q: list[float], step: int) -> None:
    assert worst_advantage(q) == step


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=6))
def test_nothing_before_the_pit_is_as_low_and_nothing_behind_it_lower(after: list[float]) -> None:
    step = first_pit(after)
    assert all(v > after[step - 1] for v in after[: step - 1]) and min(after) == after[step - 1]


def build(judged: dict, correct: bool = True, **settings: object) -> tuple[Candidates, Valued]:
    chosen = [Score("c", "p", 0.9, 0.9, 0.0, 3)] if correct else []
    samples = {"c": make_sample("c", "p", (1, 2, 6, 4, 0)), "w": response().sample}
    found, _ = values(Oracle(judged), [response()], **settings)
    out = Candidates()
    per_step([response()], chosen, samples, found, Steps(**(ONE | settings)), out)
    return out, found


def test_the_plain_pair_is_the_correct_response_against_the_wrong_one_cut_behind_the_pit() -> None:
    out, _ = build(GOOD_THEN_LOST)
    ((better, worse),) = out.pairs["p"]
    rejected = out.samples[worse.sample_id]
    assert better.sample_id == "c" and better.p_good == 0.9 and worse.p_good == 0.0
    assert rejected.response_ids == (1, 2, 3) and rejected.prompt_ids == (9,) and rejected.prompt_id == "p"
    assert rejected.text == "bcd" and not out.counts


def test_the_shared_prefix_pair_is_a_continuation_against_the_bad_step() -> None:
    out, found = build(GOOD_THEN_LOST, correct=False, shared_prefix=True)
    ((better, worse),) = out.pairs["p"]
    chosen, rejected = out.samples[better.sample_id], out.samples[worse.sample_id]
    assert chosen is found.best[response().prefix(2).id] and better.p_good == 1.0
    assert chosen.prompt_ids == rejected.prompt_ids == (9, 1, 2) and chosen.prompt_id == rejected.prompt_id != "p"
    assert chosen.response_ids == (7, 2, 0) and rejected.response_ids == (3,)


def test_the_prompt_itself_is_valued_only_where_a_pair_can_need_it() -> None:
    assert response().prefix(0).id not in build(GOOD_THEN_LOST)[1].values
    out, found = build(GOOD_THEN_LOST | {(1,): [0.0] * 4}, shared_prefix=True)
    assert found.values["p"].value == 0.75 and out.counts == {"all_zero": 1}


def test_the_advantage_pair_is_cut_where_most_is_lost() -> None:
    lost_early = GOOD_THEN_LOST | {
        (): [1.0] * 4,
        (1,): [1.0, 0, 0, 0],
        (1, 2): [1.0, 0, 0, 0],
        (1, 2, 3): [1.0, 0, 0, 0],
    }
    out, _ = build(lost_early, mode="advantage")
    assert out.samples[out.pairs["p"][0][1].sample_id].response_ids == (1,)
    assert out.pairs["p"][0][1].p_good == 0.25


def test_a_last_step_that_spoils_everything_keeps_the_end_of_the_response() -> None:
    always = {ids: [1.0] * 4 for ids in GOOD_THEN_LOST}
    out, _ = build(always)
    assert out.samples[out.pairs["p"][0][1].sample_id].response_ids == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("judged", "settings", "reason"),
    [
        ({(1,): [0.0] * 4}, {}, "all_zero"),
        ({(1,): [0.0] * 4, (1, 2): [0.0] * 4, (1, 2, 3): [0.0] * 4}, {"prune": False}, "all_zero"),
        ({(1,): [None] * 4}, {}, "unjudged"),
        ({(1,): [1.0] * 4, (1, 2): [None] * 4}, {}, "unjudged"),
        (GOOD_THEN_LOST, {"correct": False}, "no_correct"),
        (GOOD_THEN_LOST | {(): [0.0] * 4}, {"mode": "advantage", "prune": False}, None),
    ],
)
def test_what_gives_no_pair_is_counted(judged: dict, settings: dict, reason: str | None) -> None:
    out, _ = build(judged, **settings)
    assert out.counts == ({reason: 1} if reason else {}) and bool(out.pairs) == (reason is None)


def test_verdicts_that_are_missing_count_neither_way() -> None:
    _, by_ids = values(Oracle({(1,): [None, 1.0, 0.0, None]}), [response((1, 2))])
    assert by_ids == {(1,): 0.5}


def test_equal_pairs_of_two_responses_are_proposed_once() -> None:
    wrong = [response(), response((1, 2, 3, 5), name="v")]
    found, _ = values(Oracle(GOOD_THEN_LOST), wrong)
    samples = {"c": make_sample("c", "p", (1, 0)), "w": wrong[0].sample, "v": wrong[1].sample}
    out = Candidates()
    per_step(wrong, [Score("c", "p", 1.0, 1.0, 0.0, 1)], samples, found, Steps(**ONE), out)
    assert len(out.pairs["p"]) == 1 and out.counts == {"repeated": 1}


def test_wrong_and_correct_are_told_apart_by_p_good() -> None:
    drawn = {name: make_sample(name, "p", ids, index=i) for i, (name, ids) in enumerate(
        {"a": (1,), "b": (2,), "c": (2,), "d": (3,)}.items())}  # fmt: skip
    scores = [Score(n, "p", p, p, 0.0, 1) for n, p in {"a": 0.5, "b": 0.1, "c": 0.2, "d": 0.7}.items()]
    wrong, correct = wrong_responses(scores, drawn, Steps())
    assert [s.id for s in wrong] == ["b"]  # c says the same
    assert [s.sample_id for s in correct] == ["d", "a"]


def test_rollouts_that_do_not_come_in_the_number_asked_for_are_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="3 continuations of .* not 4 x 1"):
        values(Oracle({(1,): [1.0] * 3}), [response((1, 2))])
