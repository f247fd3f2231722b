"""The packed layout: what lies where, who sees whom, and that nothing is lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.training.attention import common_starts, cut_into_blocks, dense_mask, flex_mask, packed_attention
from align.training.packing import PADDING, Group, lay_out, pack, plan_batches

EXAMPLE = Group(prompt=(4, 5, 15), responses=((8, 1), (9, 9, 1)))

tokens = st.lists(st.integers(0, 30), min_size=1, max_size=9).map(tuple)
groups = st.lists(
    st.builds(Group, prompt=tokens, responses=st.lists(tokens, min_size=1, max_size=4).map(tuple)),
    min_size=1,
    max_size=12,
)


def test_the_layout_of_the_docstring() -> None:
    (batch,) = pack([EXAMPLE], 8)
    assert batch.input_ids.tolist() == [[4, 5, 15, 8, 1, 9, 9, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5]]
    assert batch.response_of.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    assert batch.read_from.tolist() == [2, 3, 2, 5, 6]
    assert batch.read_at.tolist() == [2, 3, 5, 6]
    assert batch.read_row.tolist() == [0, 1, 0, 2, 3]
    assert batch.targets.tolist() == [8, 1, 9, 9, 1]
    assert batch.lengths.tolist() == [2, 3]
    assert batch.members == ((0, 0), (0, 1))
    assert batch.tokens == 8


def test_the_mask_of_two_groups_in_one_row_by_hand() -> None:
    """Row: prompt a b, responses c | d, then another group e f, then padding."""
    long = Group((1, 2), ((3,), (4,), (5,), (6,)))  # sets the row length to 6
    batch = pack([long, Group((7, 8), ((9,), (10,))), Group((11,), ((12,),))], 12)[0]
    row = next(r for r in range(2) if batch.input_ids[r, 0] == 7)
    assert batch.input_ids[row].tolist() == [7, 8, 9, 10, 11, 12]
    seen = dense_mask(batch)[row, 0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0],  # prompt, causal
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],  # first response: prompt and itself
        [1, 1, 0, 1, 0, 0],  # second response: not the first
        [0, 0, 0, 0, 1, 0],  # the other group starts afresh
        [0, 0, 0, 0, 1, 1],
    ]


def test_padding_sees_itself_only_and_nobody_sees_it() -> None:
    batch = pack([Group((1, 2, 3), ((4, 5),)), Group((1,), ((2,),))], 10)[0]
    short = 1
    assert batch.group_of[short].tolist() == [0, 0, PADDING, PADDING, PADDING]
    seen = dense_mask(batch)[short, 0]
    assert seen[2:, :2].sum() == 0 and seen[:2, 2:].sum() == 0
    assert torch.equal(seen[2:, 2:], torch.eye(3, dtype=torch.bool))


@settings(max_examples=60, deadline=None)
@given(groups, st.integers(1, 60), st.sampled_from([1, 8]))
def test_every_token_is_kept_and_read_from_the_place_before_it(
    given_groups: list[Group], budget: int, multiple: int
) -> None:
    seen: dict[tuple[int, int], tuple[int, ...]] = {}
    for batch in pack(given_groups, budget, multiple):
        flat_ids, flat_positions = batch.input_ids.flatten(), batch.position_ids.flatten()
        ends = batch.lengths.cumsum(0).tolist()
        for (g, r), start, end in zip(batch.members, [0, *ends], ends, strict=False):
            group = given_groups[g]
            seen[g, r] = tuple(batch.targets[start:end].tolist())
            before = batch.read_from[start:end]
            context = (group.prompt[-1:] + group.responses[r])[:-1]
            assert tuple(flat_ids[before].tolist()) == context
            first = len(group.prompt) - 1
            assert flat_positions[before].tolist() == list(range(first, first + len(context)))
        assert (batch.group_of != PADDING).sum() == batch.tokens
    assert seen == {
        (g, r): response for g, group in enumerate(given_groups) for r, response in enumerate(group.responses)
    }


@settings(max_examples=60, deadline=None)
@given(groups, st.integers(1, 60))
def test_a_batch_keeps_to_the_budget_unless_one_group_alone_exceeds_it(given_groups: list[Group], budget: int) -> None:
    for plan in plan_batches(given_groups, budget):
        members = [i for row in plan.rows for i in row]
        assert len(plan.rows) * plan.width <= budget or len(members) == 1
        assert all(sum(given_groups[i].tokens for i in row) <= plan.width for row in plan.rows)


def test_short_groups_share_rows() -> None:
    packed = [Group((1, 2, 3, 4), ((5, 6, 7, 8),)), *[Group((1, 2), ((3, 4),))] * 4]
    (plan,) = plan_batches(packed, 24)
    assert plan.width == 8 and len(plan.rows) == 3
    assert lay_out(packed, plan).tokens == 24  # no padding at all


@pytest.mark.parametrize(("prompt", "responses"), [((), ((1,),)), ((1,), ()), ((1,), ((2,), ()))])
def test_groups_without_tokens_are_refused(prompt: tuple[int, ...], responses: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="needs|empty"):
        Group(prompt, responses)


@settings(max_examples=40, deadline=None)
@given(groups, st.integers(1, 60), st.integers(1, 7), st.booleans())
def test_blocks_compute_what_the_whole_mask_says(
    given_groups: list[Group], budget: int, longest: int, cut: bool
) -> None:
    torch.manual_seed(0)
    for batch in pack(given_groups, budget):
        rows, width = batch.input_ids.shape
        query, key, value = leaves = [torch.randn(rows, heads, width, 4, requires_grad=True) for heads in (4, 2, 2)]
        seen = dense_mask(batch)
        blocks = cut_into_blocks(seen[:, 0], common_starts(batch) if cut else [], torch.float32, longest)
        found, _ = packed_attention(torch.nn.Module(), query, key, value, None, packed_mask=blocks)
        scores = (query @ key.repeat_interleave(2, 1).transpose(2, 3) / 2).masked_fill(~seen, float("-inf"))
        expected = (scores.softmax(-1) @ value.repeat_interleave(2, 1)).transpose(1, 2)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        upstream = torch.randn_like(found)
        for ours, plain in zip(
            torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
        ):
            torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)


def test_rows_of_one_shape_compute_no_masked_block() -> None:
    """Prompt 4, responses of 3 and 2: the prompt causal, and each response against the prompt and itself only."""
    shape = Group((1, 2, 3, 4), ((5, 6, 7), (8, 9)))
    (batch,) = pack([shape, shape], 18)
    blocks = cut_into_blocks(dense_mask(batch)[:, 0], common_starts(batch), torch.float32)
    assert [(b.queries, b.keys) for b in blocks] == [
        (slice(0, 4), (slice(0, 4),)),
        (slice(4, 7), (slice(0, 7),)),
        (slice(7, 9), (slice(0, 4), slice(7, 9))),
    ]
    assert blocks[2].mask[0, 0].tolist() == [[0.0] * 5 + [float("-inf")], [0.0] * 6]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_sees_what_the_dense_mask_says() -> None:
    """The GPU's block mask, run uncompiled on the CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.manual_seed(0)
    batch = pack([Group((1, 2, 3), ((4, 5), (6,))), Group((7,), ((8, 9), (3, 3))), EXAMPLE], 600, multiple=128)[0]
    query, key, value = (torch.randn(*batch.input_ids.shape[:1], h, batch.input_ids.shape[1], 16) for h in (4, 2, 2))
    found = flex_attention(query, key, value, block_mask=flex_mask(batch), enable_gqa=True)
    scores = (query @ key.repeat_interleave(2, 1).transpose(2, 3) / 4).masked_fill(~dense_mask(batch), float("-inf"))
    expected = scores.softmax(-1) @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(groups, st.integers(1, 60))
def test_the_longest_comes_first_and_a_batch_is_as_wide_as_its_first_group(
    given_groups: list[Group], budget: int
) -> None:
    """What does not fit into memory shows in the first batch, and groups of like length lie together."""
    plans = plan_batches(given_groups, budget)
    sizes = [g.tokens for g in given_groups]
    assert plans[0].width == max(sizes) and given_groups[plans[0].rows[0][0]].tokens == max(sizes)
    assert [p.width for p in plans] == sorted((p.width for p in plans), reverse=True)
    for plan in plans:
        opening = [sizes[row[0]] for row in plan.rows]
        assert plan.width == opening[0] and opening == sorted(opening, reverse=True)
