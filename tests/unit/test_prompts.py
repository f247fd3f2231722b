"""Prompts: rendering, splitting, counting and refusing, with real tokenizers."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from align.errors import InputError
from align.prompts import PromptSet, load_prompts, round_prompts
from align.recipe import Recipe, Scratch
from align.records import Prompt, content_id
from align.training.scratch import build_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-*=;:,. ()?!<>[]|/\n_'"
CHAT = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer(Scratch(characters=LETTERS, context=200))


@pytest.fixture(scope="module")
def chat_tokenizer() -> PreTrainedTokenizerBase:
    made = build_tokenizer(Scratch(characters=LETTERS, context=200))
    made.chat_template = CHAT
    return made


@pytest.fixture(scope="module")
def bos_tokenizer() -> PreTrainedTokenizerBase:
    """Puts <s> in front and </s> behind, as some Llama tokenizers do, and its chat template writes <s> too."""
    from tokenizers import processors

    made = build_tokenizer(Scratch(characters=LETTERS))
    made.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    special = [("<s>", made.bos_token_id), ("</s>", made.eos_token_id)]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    made.chat_template = "<s>" + CHAT
    return made


@pytest.fixture
def load(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[..., PromptSet]:
    """Writes the rows to a JSONL file and loads them: load(rows, key=value …, tokenizer=…, context=…)."""

    def load(
        rows: list[dict[str, Any]], *, tokenizer: PreTrainedTokenizerBase = tokenizer, context: int | None = 200,
        max_new_tokens: int = 50, **settings: Any,
    ) -> PromptSet:  # fmt: skip
        path = tmp_path / "p.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        prompts = {"source": str(path), "eval_fraction": 0.5, **settings}
        return load_prompts(recipe_of(prompts, max_new_tokens), tokenizer, context)

    return load


@pytest.fixture
def refusal(load: Callable[..., PromptSet], tmp_path: Path) -> Callable[..., str]:
    """The message with which rows are refused, the file's path written as FILE."""

    def refusal(rows: list[dict[str, Any]], **keywords: Any) -> str:
        with pytest.raises(InputError) as caught:
            load(rows, **keywords)
        return str(caught.value).replace(str(tmp_path / "p.jsonl"), "FILE")

    return refusal


def recipe_of(prompts: dict[str, Any], max_new_tokens: int = 50) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "t",
            "policy": {"model": "m"},
            "prompts": prompts,
            "sampling": {"max_new_tokens": max_new_tokens},
            "verifiers": [{"kind": "noise", "name": "coin"}],
        }
    )


def some(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"question {i}?"} for i in range(count)]


def everything(found: PromptSet) -> dict[str, Prompt]:
    return {p.text: p for p in (*found.train, *found.eval)}


# ---- what a prompt becomes ----------------------------------------------------------------------------------------


def test_plain_text_is_used_as_it_is(load: Callable[..., PromptSet], tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": f" {i}+1= \n", "answer": i + 1} for i in range(20)]
    found = everything(load(rows, answer_column="answer"))
    assert set(found) == {row["prompt"] for row in rows}
    for text, prompt in found.items():
        assert prompt.id == content_id(text)
        assert tokenizer.decode(prompt.token_ids) == text
        assert prompt.answer == str(int(text.split("+")[0]) + 1), "a whole number is its decimal text"


def test_the_chat_template_renders_text_and_messages(
    load: Callable[..., PromptSet], chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "1+1?"},
    ]
    rows = [{"prompt": talk}, *some(9)]
    found = everything(load(rows, tokenizer=chat_tokenizer, chat_template=True, system_prompt="be brief"))
    assert "<system>be brief\n<user>hi\n<assistant>hello\n<user>1+1?\n<assistant>" in found
    prompt = found["<system>be brief\n<user>question 3?\n<assistant>"]
    assert chat_tokenizer.decode(prompt.token_ids) == prompt.text
    assert prompt.turns == (("user", "question 3?"),)
    long = found["<system>be brief\n<user>hi\n<assistant>hello\n<user>1+1?\n<assistant>"]
    assert long.turns == (("user", "hi"), ("assistant", "hello"), ("user", "1+1?"))
    assert all(p.turns == () for p in everything(load(some(9))).values())


def test_special_tokens_stand_once_and_no_end_stands_before_the_response(
    load: Callable[..., PromptSet], bos_tokenizer: PreTrainedTokenizerBase
) -> None:
    start, end = bos_tokenizer.bos_token_id, bos_tokenizer.eos_token_id
    for settings in ({}, {"chat_template": True}):
        for prompt in everything(load(some(10), tokenizer=bos_tokenizer, **settings)).values():
            assert prompt.token_ids[0] == start and prompt.token_ids.count(start) == 1
            assert end not in prompt.token_ids
            assert prompt.text.startswith("<s>") is bool(settings), "plain text lacks what only the tokenizer adds"


STORIES = Path(__file__).parents[3] / "shared" / "data" / "stories260K"


@pytest.mark.skipif(not STORIES.is_dir(), reason="the example data is not on this machine")
def test_real_tokenizer_keeps_its_start_token() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(STORIES / "hf-hd32")
    settings = {"source": str(STORIES / "story_prompts.jsonl"), "eval_fraction": 0.2}
    found = load_prompts(recipe_of(settings, 128), tokenizer, 512)
    expected = {"read": 720, "duplicates": 0, "too_long": 0, "train": 575, "eval": 145}
    assert found.report == expected, "a prompt moved to the other split"
    for prompt in found.train[:50]:
        assert prompt.token_ids[0] == 1 and 1 not in prompt.token_ids[1:]
        assert tokenizer.decode(prompt.token_ids, skip_special_tokens=True).strip() == prompt.text.strip()


# ---- splits -------------------------------------------------------------------------------------------------------


def test_the_split_depends_on_the_prompt_alone(load: Callable[..., PromptSet]) -> None:
    rows = some(400)
    whole = load(rows, eval_fraction=0.25)
    random.Random(0).shuffle(rows)
    shuffled, half = load(rows, eval_fraction=0.25), load(rows[:200], eval_fraction=0.25)
    assert (shuffled.train, shuffled.eval, shuffled.digest) == (whole.train, whole.eval, whole.digest)
    assert set(half.train) <= set(whole.train) and set(half.eval) <= set(whole.eval)
    assert half.digest != whole.digest
    assert len(whole.eval) == pytest.approx(100, abs=4 * 8.7), "binomial: mean 100, standard deviation 8.7"
    assert set(whole.eval) <= set(load(rows, eval_fraction=0.5).eval), "a larger share only adds"


def test_the_digest_covers_answers_and_splits(load: Callable[..., PromptSet]) -> None:
    rows = [{"prompt": f"{i}?", "a": "x", "s": "train" if i % 2 else "test"} for i in range(10)]
    first = load(rows, answer_column="a", split_column="s")
    other = load([{**r, "a": "y"} for r in rows], answer_column="a", split_column="s")
    swapped = load([{**r, "s": "test" if r["s"] == "train" else "train"} for r in rows], answer_column="a",
                   split_column="s")  # fmt: skip
    assert len({first.digest, other.digest, swapped.digest, load(rows, split_column="s").digest}) == 4


def test_the_split_column_is_followed(load: Callable[..., PromptSet], refusal: Callable[..., str]) -> None:
    names = ["train", "eval", "test", "validation"]
    found = load([{"prompt": n, "s": n} for n in names], split_column="s")
    assert [p.text for p in found.train] == ["train"] and {p.text for p in found.eval} == set(names[1:])
    message = refusal([{"prompt": "a", "s": "train"}, {"prompt": "b", "s": "dev"}], split_column="s")
    assert message.startswith("FILE:2: s: expected one of train, eval, test, validation, found 'dev'")
    message = refusal([{"prompt": "a", "s": "train"}], split_column="s")
    assert message.startswith("prompts.split_column: no row's 's' is eval or test or validation")


@pytest.mark.parametrize(("share", "word"), [(0.0, "evaluation prompts; raise"), (1.0, "training prompts; lower")])
def test_an_empty_split_is_refused(refusal: Callable[..., str], share: float, word: str) -> None:
    message = refusal(some(5), eval_fraction=share)
    assert message.startswith(f"prompts.eval_fraction: {share} of 5 prompts leaves no") and word in message


def test_evaluation_prompts_in_training_are_refused_with_both_rows(refusal: Callable[..., str]) -> None:
    rows = [{"prompt": "a", "s": "train"}, {"prompt": "b", "s": "test"}, {"prompt": "a", "s": "test"}]
    assert refusal(rows, split_column="s") == "FILE:3: this eval prompt is also a train prompt, at FILE:1"


# ---- repetitions and lengths --------------------------------------------------------------------------------------


def test_repetitions_are_counted_or_refused(load: Callable[..., PromptSet], refusal: Callable[..., str]) -> None:
    rows = [*some(10), *some(3)]
    assert load(rows).report["duplicates"] == 3 and len(everything(load(rows))) == 10
    message = refusal(rows, dedupe=False)
    assert message.startswith("FILE:11: same prompt as FILE:1; set prompts.dedupe") and len(message.split("\n")) == 3
    rows = [{"prompt": "a", "n": "1"}, {"prompt": "a", "n": "2"}]
    assert refusal(rows, answer_column="n") == "FILE:2: same prompt as FILE:1, but its answer is '2', not '1'"


def test_long_prompts_are_counted_and_refused_above_the_share(
    load: Callable[..., PromptSet], refusal: Callable[..., str]
) -> None:
    """A context of 200 with 50 new tokens leaves 150; one of ten prompts has 151."""
    rows = [*some(9), {"prompt": "x" * 151}]
    message = refusal(rows)
    assert message.startswith("FILE:10: 151 tokens\nprompts.max_dropped_fraction: 1 of 10 prompts are longer than 150")
    found = load(rows, max_dropped_fraction=0.1)
    assert found.report["too_long"] == 1 and found.report["read"] == 10 and "x" * 151 not in everything(found)
    assert load([*some(9), {"prompt": "x" * 150}]).report["too_long"] == 0
    assert load(rows, context=None).report["too_long"] == 0
    assert "longer than 11 tokens" in refusal([*some(9), {"prompt": "x" * 12}], max_tokens=11, context=None)
    assert refusal(some(9), max_tokens=151).startswith("prompts.max_tokens: 151 plus sampling.max_new_tokens (50)")
    assert refusal(some(9), max_new_tokens=200).startswith("sampling.max_new_tokens: 200 leaves no room")


def test_limit_reads_the_first_rows(load: Callable[..., PromptSet]) -> None:
    assert set(everything(load(some(30), limit=10))) == {f"question {i}?" for i in range(10)}


# ---- bad rows and settings ----------------------------------------------------------------------------------------


def test_every_bad_row_is_told_at_once(refusal: Callable[..., str]) -> None:
    rows = [{"prompt": "a", "n": "1"}, {"prompt": True, "n": "1"}, {"prompt": "b", "n": None}, {"prmpt": "c", "n": "1"},
            {"prompt": "", "n": "1"}, {"prompt": [{"role": "user", "content": "x"}], "n": "2"}]  # fmt: skip
    assert refusal(rows, answer_column="n").split("\n")[:-1] == [
        "FILE:2: prompt: expected text, found true",
        "FILE:3: n: expected text, found null",
        "FILE:4: no column 'prompt'; did you mean 'prmpt'?",
        "FILE:5: prompt: is empty",
        "FILE:6: prompt: is a list of chat messages; set prompts.chat_template to true",
    ]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "is an empty list of chat messages"),
        (["hi"], "message 1: expected an object with role and content"),
        ([{"role": "user"}], "message 1: expected an object with role and content"),
        ([{"role": "human", "content": "x"}], "message 1: role 'human' is none of system, developer, user, assistant"),
        ([{"role": "user", "content": None}], "message 1: content: expected text, found null"),
        ([{"role": "user", "content": " "}], "message 1: content: is empty"),
        ([{"role": "user", "content": "a\ud800"}], "message 1: content: holds half of a surrogate pair"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "a system message must come first"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "the last message is from 'assist"),
        ([{"role": "system", "content": "b"}, {"role": "user", "content": "a"}], "has a system message of its own"),
        ([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}], "chat template refuses this prompt"),
    ],
)
def test_messages_of_another_shape_are_refused(
    refusal: Callable[..., str], chat_tokenizer: PreTrainedTokenizerBase, messages: list[Any], problem: str
) -> None:
    rows = [*some(5), {"prompt": messages}]
    message = refusal(rows, tokenizer=chat_tokenizer, chat_template=True, system_prompt="s")
    assert message.startswith("FILE:6: ") and problem in message


def test_unknown_characters_are_refused(refusal: Callable[..., str]) -> None:
    assert refusal([*some(5), {"prompt": "what is π?"}]) == ("FILE:6: 'π' is unknown to the tokenizer, in 'what is π?'")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chat_template": True}, "prompts.chat_template: this model's tokenizer has no chat template"),
        ({"system_prompt": "x"}, "prompts.system_prompt: needs `chat_template: true`"),
        ({"revision": "abc"}, "prompts.revision: only a hub:<dataset> source has revisions"),
        ({"source": "arithmetic", "answer_column": "a"}, "prompts.answer_column: has no meaning with source: arithm"),
        ({"source": "arithmetic", "limit": 5}, "prompts.limit: has no meaning with source: arithmetic"),
        ({"prompt_column": "text"}, "FILE:1: no column 'text'; it has 'prompt'"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    refusal: Callable[..., str], settings: dict[str, Any], message: str
) -> None:
    assert refusal(some(5), **settings).startswith(message)


def test_the_built_in_task_through_its_own_tokenizer() -> None:
    recipe = recipe_of({"source": "arithmetic", "arithmetic": {"digits": 2, "count": 500}, "eval_fraction": 0.2}, 8)
    found = load_prompts(recipe, build_tokenizer(Scratch()), 64)
    assert len(found.train) + len(found.eval) == 500 == found.report["read"]
    for prompt in (*found.train, *found.eval):
        a, b = prompt.text.rstrip("=").split("+")
        assert prompt.answer == str(int(a) + int(b)) and len(prompt.token_ids) == 6
    other = load_prompts(recipe.model_copy(update={"seed": 1}), build_tokenizer(Scratch()), 64)
    assert other.digest != found.digest


# ---- rounds -------------------------------------------------------------------------------------------------------


def numbered(count: int) -> list[Prompt]:
    return [Prompt(str(i), str(i), (i,), None, "train") for i in range(count)]


@hypothesis_settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 5))
def test_rounds_tile_the_epochs(size: int, count: int, seed: int) -> None:
    """Over any whole number of epochs each prompt comes equally often, and no round holds one twice."""
    count = min(count, size)
    prompts = numbered(size)
    rounds = [round_prompts(prompts, r, count, seed) for r in range(size * 2)]
    assert all(len(set(r)) == count for r in rounds)
    stream = [p for r in rounds for p in r]
    for epoch in range(count * 2):
        assert Counter(stream[epoch * size : (epoch + 1) * size]) == Counter(prompts)


def test_rounds_are_in_a_seeded_order_that_changes_by_epoch() -> None:
    prompts = numbered(100)
    first, second = round_prompts(prompts, 0, 100, 7), round_prompts(prompts, 1, 100, 7)
    assert first != second and set(first) == set(second)
    assert first == round_prompts(prompts, 0, 100, 7) != round_prompts(prompts, 0, 100, 8)
    assert first != tuple(prompts)
    assert round_prompts(prompts, 0, 30, 7) + round_prompts(prompts, 1, 30, 7) == first[:60]


def test_a_round_larger_than_the_prompts_is_refused() -> None:
    with pytest.raises(InputError, match=r"rounds.prompts_per_round: 11 prompts wanted, .* only 10 training prompts"):
        round_prompts(numbered(10), 0, 11, 0)
