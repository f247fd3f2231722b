"""Which responses are learned from: hand-made rounds, ties, thresholds at 0, control texts, hidden inputs."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from align.errors import InputError
from align.recipe import Recipe
from align.recipe_supervised import Supervised
from align.records import Prompt, Sample, Score
from align.training import targets
from align.training.control import Control, control_of, dropped, mask_id
from align.training.packing import Group, lay_out, plan_batches
from align.training.scratch import build_tokenizer
from align.training.supervised import cut_into_steps
from align.training.targets import Groups, Target
from align.training.thoughts import Masking
from tests.unit.test_supervised_losses import base_policy

BLANK = Sample("", "p", 0, 0, 0, (4, 5), (7, 1), (-0.1, -0.2), "", "stop", 1.0, 1.0, 0, 8)


def groups(rewards: dict[str, list[float]], **settings: Any) -> Groups:
    """Prompts with scored responses; the response's number is its index, P(good) is the reward."""
    samples = {
        f"{p}{i}": replace(BLANK, id=f"{p}{i}", prompt_id=p, index=i)
        for p, rs in rewards.items()
        for i in range(len(rs))
    }
    scores = [Score(f"{p}{i}", p, r, r, 0.0, 3) for p, rs in rewards.items() for i, r in enumerate(rs)]
    return targets.scored_targets(reversed(scores), samples, Supervised(**settings))


def ids(found: Groups) -> list[str]:
    return [t.sample.id for members in found.values() for t in members]


# ---- selection ------------------------------------------------------------------------------------------------------


def test_best_of_n_and_its_half_form() -> None:
    given, counts = groups({"a": [0.1, 0.9, 0.5, 0.7], "b": [0.3, 0.2, 0.8]}), Counter()
    assert ids(targets.best(given, 1, None, counts)) == ["a1", "b2"]
    assert counts.total() == 5
    assert ids(targets.best(given, 1, 0.5, Counter())) == ["a1", "a3", "b0", "b2"]  # half, rounded up
    assert ids(targets.best(given, 2, None, Counter())) == ["a1", "a3", "b0", "b2"]


def test_selection_does_not_depend_on_the_order_of_the_scores_even_with_ties() -> None:
    scores = [Score(f"a{i}", "a", 0.5, 0.5, 0.0, 3) for i in range(6)]
    samples = {s.sample_id: replace(BLANK, id=s.sample_id) for s in scores}
    found = set()
    for seed in range(5):
        random.Random(seed).shuffle(scores)
        given = targets.scored_targets(scores, samples, Supervised())
        found.add(tuple(ids(targets.best(given, 2, None, Counter()))))
        found.add(tuple(ids(targets.best_quantile(given, 3, "round", Counter()))[::-1]))
    assert len(found) == 2


def test_a_threshold_of_zero_is_a_threshold() -> None:
    """A response at 0 is good and one below is not; taken for "not set", both would be half good."""
    given = groups({"a": [0.0, 0.2, -0.1]}, threshold=0.0, score="reward")
    assert [t.good for t in given["a"]] == [True, True, False]
    counts: Counter[str] = Counter()
    assert ids(targets.above_threshold(given, counts)) == ["a0", "a1"]
    assert counts == {"below training.supervised.threshold": 1}


def test_the_baseline_is_the_mean_of_the_prompt() -> None:
    assert [t.value for t in groups({"a": [0.2, 0.6], "b": [1.0]})["a"]] == [pytest.approx(0.4)] * 2


def test_quantiles_by_hand() -> None:
    given = groups({"a": [0.1, 0.4, 0.2, 0.3], "b": [0.9, 0.8, 0.7, 0.6]})
    by_round = targets.with_levels(given, 4, "round")
    assert [t.level for t in by_round["a"]] == [0, 1, 0, 1]
    assert [t.level for t in by_round["b"]] == [3, 3, 2, 2]
    assert [t.level for t in targets.with_levels(given, 2, "prompt")["b"]] == [1, 1, 0, 0]


def test_the_best_quantile_is_never_empty_and_one_quantile_is_everything() -> None:
    given = groups({"a": [0.1, 0.4], "b": [0.9]})
    assert ids(targets.best_quantile(given, 4, "round", Counter())) == ["b0"]
    assert ids(targets.best_quantile(given, 4, "prompt", Counter())) == ["a1", "b0"]
    assert targets.best_quantile(given, 1, "round", Counter()).keys() == given.keys()
    assert ids(targets.best_quantile(given, 1, "round", Counter())) == ids(given)


def test_cut_and_short_responses_are_left_out_and_counted() -> None:
    given, counts = groups({"a": [0.5] * 3}), Counter()
    rows = given["a"]
    given["a"] = [
        replace(rows[0], sample=replace(rows[0].sample, finish_reason="length")),
        replace(rows[1], sample=replace(rows[1].sample, response_ids=(1,))),
        rows[2],
    ]
    assert ids(targets.finished(targets.long_enough(given, 2, counts), counts)) == ["a2"]
    assert counts.total() == 2 and len(counts) == 2


def test_a_response_that_the_prompt_already_has_counts_once() -> None:
    given, counts = groups({"a": [0.5] * 3, "b": [0.5]}), Counter()
    given["a"][1] = replace(given["a"][1], sample=replace(given["a"][1].sample, response_ids=(8, 1)))
    assert ids(targets.different(given, counts)) == ["a0", "a1", "b0"]
    assert counts.total() == 1


def test_self_reward_per_token_does_not_favour_the_short_response() -> None:
    short = Target(replace(BLANK, id="short", response_ids=(1, 1)))
    long = Target(replace(BLANK, id="long", response_ids=(1,) * 6))
    sums = {"short": -2.0, "long": -3.0}
    by_sum = targets.with_base({"p": [short, long]}, sums, per_token=False)
    by_mean = targets.with_base({"p": [short, long]}, sums, per_token=True)
    assert ids(targets.most_self_rewarded(by_sum, Counter())) == ["short"]
    assert ids(targets.most_self_rewarded(by_mean, Counter())) == ["long"]
    assert by_mean["p"][1].base == -3.0 and by_mean["p"][1].self_reward == pytest.approx(-0.5)


@pytest.mark.parametrize(("n", "published"), [(4, 0.509), (16, 0.942)])
def test_sft_sharpening_hits_the_mode_as_often_as_it_should(n: int, published: float) -> None:
    """Of N responses of a policy with P(argmax) = 0.163 the likeliest is the argmax with 1 - (1 - 0.163)^N, and what
    fine-tuning on it converges to is that frequency."""
    base, prompts = base_policy(), 4000
    draws = torch.multinomial(base.exp(), prompts * n, replacement=True, generator=torch.Generator().manual_seed(1))
    rows = [Target(replace(BLANK, id=f"{i:06d}", prompt_id=str(i // n), index=int(y))) for i, y in enumerate(draws)]
    given: Groups = {}
    for row in rows:
        given.setdefault(row.sample.prompt_id, []).append(row)
    sums = {t.sample.id: float(base[t.sample.index]) for t in rows}
    kept = targets.most_self_rewarded(targets.with_base(given, sums, per_token=False), Counter())
    hit = sum(t.sample.index == int(base.argmax()) for m in kept.values() for t in m) / prompts
    assert 1 - (1 - base.exp().max().item()) ** n == pytest.approx(published, abs=2e-3)
    assert hit == pytest.approx(published, abs=0.025)  # three standard errors


def test_steps_keep_prompts_whole_and_hold_what_the_recipe_says() -> None:
    given = {str(i): [Target(BLANK)] * size for i, size in enumerate([3, 3, 3, 1, 1, 9])}
    steps = cut_into_steps(given, 6, "seed")
    sizes = [[len(m) for m in step] for step in steps]
    assert sorted(n for step in sizes for n in step) == [1, 1, 3, 3, 3, 9]
    assert all(sum(step) <= 6 or len(step) == 1 for step in sizes)
    assert cut_into_steps(given, 6, "seed") == steps


# ---- control texts --------------------------------------------------------------------------------------------------

TINY = {"hidden_size": 64, "characters": "0123456789+=gb"}


def base() -> dict[str, Any]:
    return {"name": "t", "policy": {"from_scratch": TINY}, "cold_start": {}, "sampling": {"max_new_tokens": 8},
            "verifiers": [{"kind": "noise", "name": "coin"}]}  # fmt: skip


def recipe(loss: str = "conditional", **supervised: Any) -> Recipe:
    training = {"algorithm": "sft", "loss": {"name": loss}, "supervised": supervised}
    return Recipe.model_validate({**base(), "training": training})


def tokenizer() -> Any:
    return build_tokenizer(recipe(control=["b", "g"]).policy.from_scratch)  # type: ignore[arg-type]


def test_the_good_text_goes_in_front_from_the_round_after_it_was_learned() -> None:
    control = control_of(recipe(control=["b", "gg"]), tokenizer())
    b, g = tokenizer()("bg")["input_ids"]
    assert control.texts == ((b,), (g, g)) and control.banned == (b,)
    prompt = Prompt("p", "1+2=", (4, 13, 5, 14), "3", "train")
    assert control.sampled([prompt], 0) == [prompt]
    (changed,) = control.sampled([prompt], 1)
    assert changed.token_ids == (g, g, 4, 13, 5, 14) and (changed.id, changed.text) == ("p", "1+2=")
    assert control.bare(changed.token_ids, 1) == prompt.token_ids == control.bare(prompt.token_ids, 0)
    known = control_of(recipe(control=["b", "g"], control_known=True), tokenizer())
    assert known.sampled([prompt], 0)[0].token_ids[0] == g


def test_a_begin_of_sequence_token_stays_first() -> None:
    control = Control(texts=((8,), (9,)), leading=2, first_version=0)
    assert control.behind((2, 5, 6), -1) == (2, 9, 5, 6)
    assert control.behind((2, 5, 6), 0) == (2, 8, 5, 6)
    assert control.bare((2, 9, 5, 6), 0) == (2, 5, 6)


def test_a_recipe_without_control_texts_changes_nothing() -> None:
    prompt = Prompt("p", "1+2=", (4, 13, 5, 14), "3", "train")
    assert Control().sampled([prompt], 3) == [prompt] and Control().banned == () and Control().longest == 0


def test_a_control_text_is_dropped_at_its_rate_and_always_for_the_same_responses() -> None:
    found = [dropped(0, 2, f"s{i}", 0.1) for i in range(5000)]
    assert sum(found) / 5000 == pytest.approx(0.1, abs=0.013)
    assert found == [dropped(0, 2, f"s{i}", 0.1) for i in range(5000)]
    assert not any(dropped(0, 0, f"s{i}", 0.0) for i in range(100))


@pytest.mark.parametrize(("texts", "said"), [(["b", "?"], "control.1"), (["b", "<g>"], "unknown token")])
def test_a_control_text_that_the_tokenizer_cannot_write_is_refused_by_key(texts: list[str], said: str) -> None:
    with pytest.raises(InputError, match=r"training\.supervised\.control") as caught:
        control_of(recipe(control=texts), tokenizer())
    assert said in str(caught.value)


def test_a_control_text_that_becomes_no_token_is_refused_by_key() -> None:
    class Mute:
        unk_token_id, bos_token_id = None, None

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": []}

    with pytest.raises(InputError, match=r"training\.supervised\.control\.0: 'b' becomes no token at all"):
        control_of(recipe(control=["b", "g"]), Mute())


# ---- masked thought -------------------------------------------------------------------------------------------------


def test_hidden_inputs_leave_the_labels_and_the_prompt_alone() -> None:
    """Rate 1/2 on long responses: about half of the inputs but the last are hidden, and nothing else changes."""
    group = Group((4, 5, 6), ((7,) * 40 + (1,), (8,) * 40 + (1,)))
    batch = lay_out([group], plan_batches([group], 100)[0])
    masking = Masking(token=3, rate=0.5, warmup_steps=0, seed="s")
    hidden = masking.hide(batch, ["a", "b"])
    assert torch.equal(hidden.targets, batch.targets)
    changed = (hidden.input_ids != batch.input_ids)[0]
    assert (hidden.input_ids[0][changed] == 3).all()
    assert not changed[:3].any() and not changed[[43, 84]].any()  # the prompt, and the last token of each response
    assert 25 <= int(changed.sum()) <= 55
    again = replace(masking, seed="s").hide(batch, ["a", "b"])
    assert torch.equal(again.input_ids, hidden.input_ids)
    assert not torch.equal(replace(masking, seed="t").hide(batch, ["a", "b"]).input_ids, hidden.input_ids)


def test_what_is_hidden_does_not_depend_on_the_batch() -> None:
    """Alone or in a row with another group, a response is masked alike."""
    one, two = Group((4, 5), ((7,) * 20,)), Group((6,), ((8,) * 30, (9,) * 10))
    masking = Masking(token=3, rate=0.4, warmup_steps=0)
    alone = masking.hide(lay_out([one], plan_batches([one], 64)[0]), ["a"])
    plan = plan_batches([one, two], 200)[0]
    both = lay_out([one, two], plan)
    names = [{(0, 0): "a", (1, 0): "b", (1, 1): "c"}[m] for m in both.members]
    together = masking.hide(both, names)
    row, start = next((r, (both.input_ids[r] == 7).nonzero()[0].item()) for r in range(len(plan.rows))
                      if (both.input_ids[r] == 7).any())  # fmt: skip
    assert torch.equal(together.input_ids[row, start : start + 20], alone.input_ids[0, 2:22])


def test_the_rate_warms_up_in_a_straight_line() -> None:
    rates = [Masking(3, 0.2, 4, step=s).current_rate for s in (0, 1, 2, 4, 9)]
    assert rates == [0.0, pytest.approx(0.05), pytest.approx(0.1), 0.2, 0.2]


def test_the_mask_token_is_one_token_or_refused_by_key() -> None:
    maker = tokenizer()
    assert mask_id(recipe("masked_thought"), maker) == maker.pad_token_id
    assert mask_id(recipe(control=["b", "g"]), maker) is None
    with pytest.raises(InputError, match=r"training\.supervised\.mask_token: '12' becomes 2 tokens"):
        mask_id(recipe("masked_thought", mask_token="12"), maker)
