"""What the training core decides before it touches a model: steps, groups, shares, DeepSpeed settings."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.errors import InputError
from align.recipe_training import Training
from align.records import Pair, Sample
from align.training.deepspeed_config import deepspeed_config, effective_stage
from align.training.preference import _steps, make_units
from align.training.sharded import _group_by_prompt
from align.training.steps import assign

SAMPLES = {
    name: Sample(
        id=name,
        prompt_id=name[0],
        index=int(name[1]),
        policy_version=0,
        seed=0,
        prompt_ids=(3, 4),
        response_ids=(5,) * (1 + int(name[1])),
        logprobs=(),
        text="",
        finish_reason="stop",
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=9,
    )  # fmt: skip
    for name in ("a0", "a1", "a2", "b0", "b1", "c0", "c1")
}


def pair(chosen: str, rejected: str) -> Pair:
    return Pair(f"{chosen}{rejected}", chosen[0], chosen, rejected, 0.8, 0.1, 1.0, 0.5, "test")


PAIRS = [pair("a0", "a1"), pair("a2", "a1"), pair("b0", "b1"), pair("c1", "c0")]


def test_pairs_of_a_prompt_share_its_group_and_their_responses() -> None:
    first, second, third = make_units(PAIRS, SAMPLES, 1000)
    assert first.group.responses == ((5,), (5, 5), (5, 5, 5))
    assert [(r.chosen, r.rejected) for r in first.rows] == [
        (0, 1),
        (2, 1),
    ]
    assert [(r.chosen, r.rejected) for u in (second, third) for r in u.rows] == [(0, 1), (0, 1)]
    assert third.group.responses == ((5, 5), (5,))  # chosen c1 first


def test_a_prompt_whose_pairs_exceed_the_budget_is_split_between_pairs() -> None:
    units = make_units(PAIRS[:2], SAMPLES, 7)  # together 2 + 1 + 2 + 3 = 8 tokens
    assert [[r.pair for r in u.rows] for u in units] == [[PAIRS[0]], [PAIRS[1]]]


def test_steps_take_every_pair_once_and_keep_prompts_together() -> None:
    steps = _steps(PAIRS, 3, "seed")
    assert [len(s) for s in steps] == [3, 1]
    assert sorted(p.id for s in steps for p in s) == sorted(p.id for p in PAIRS)
    order = [p.prompt_id for s in steps for p in s]
    assert order.index("a") + 1 == len(order) - 1 - order[::-1].index("a")
    assert steps == _steps(list(reversed(PAIRS)), 3, "seed")  # the seed decides, not the order given
    assert any(_steps(PAIRS, 3, f"seed {i}") != steps for i in range(10))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 4))
def test_shares_hold_everything_and_differ_by_one_unit_at_most(lengths: list[int], ranks: int) -> None:
    samples = {
        f"{i}{side}": Sample(
            id=f"{i}{side}",
            prompt_id=f"{i}",
            index=0,
            policy_version=0,
            seed=0,
            prompt_ids=(1,) * n,
            response_ids=(2,),
            logprobs=(),
            text="",
            finish_reason="stop",
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_new_tokens=1,
        )  # fmt: skip
        for i, n in enumerate(lengths)
        for side in "cr"
    }
    pairs = [Pair(f"{i}", f"{i}", f"{i}c", f"{i}r", 1.0, 0.0, 1.0, 1.0, "test") for i in range(len(lengths))]
    shares = assign(make_units(pairs, samples, 1), ranks)
    assert sorted(r.pair.id for share in shares for u in share for r in u.rows) == sorted(p.id for p in pairs)
    loads = [sum(u.group.tokens for u in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths) + 2


def test_sequences_are_grouped_by_prompt_and_split_by_budget() -> None:
    sequences = [((1, 2), (3,)), ((9,), (4, 4)), ((1, 2), (5, 5, 5)), ((1, 2), ()), ((1, 2), (6,))]
    groups, places = _group_by_prompt(sequences, 100)
    assert places == [[0, 2, 4], [1]]  # the one without a response has nothing to compute
    assert groups[0].responses == ((3,), (5, 5, 5), (6,))
    assert _group_by_prompt(sequences, 6)[1] == [[0, 2], [4], [1]]


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"train_batch_size": 4}, "training.pairs_per_step"),
        ({"zero_optimization": {"stage": 1}}, "training.zero_stage"),
        ({"fp16": {"enabled": True}}, "policy.dtype"),
        ({"optimizer": {"type": "Adam"}}, "training.learning_rate"),
    ],
)
def test_what_the_recipe_decides_cannot_be_set_again(extra: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        deepspeed_config(Training(deepspeed=extra), "float32", 1)


def test_further_settings_reach_deepspeed_beside_ours() -> None:
    training = Training(zero_stage=2, offload="optimizer", deepspeed={"zero_optimization": {"overlap_comm": True}})
    config = deepspeed_config(training, "bfloat16", 4)
    expected = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "overlap_comm": True}
    assert config["zero_optimization"] == expected
    assert config["train_batch_size"] == 4 and config["gradient_accumulation_steps"] == 1
    assert config["gradient_clipping"] == training.max_grad_norm and config["bf16"] == {"enabled": True}


def test_half_precision_starts_at_stage_1() -> None:
    stages = [effective_stage(Training(zero_stage=s), d) for d in ("float32", "bfloat16") for s in (0, 1, 3)]
    assert stages == [0, 1, 3, 1, 1, 3]
