"""The model card: what it says, and above all what it must never say."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from align.model_card import escape, limitations, model_card, public_name, public_recipe
from align.recipe import Recipe

CANARY = "canary7f3a"
SUMMARY: dict[str, Any] = {
    "rounds": 3,
    "tokens": {"sampled": 1_234_567, "trained": 89},
    "evaluation": {
        "before": {"accuracy": {"value": 0.25, "low": 0.2, "high": 0.3}},
        "after": {
            "accuracy": {"value": 0.75, "low": 0.7, "high": 0.8},
            "kl": {"value": 4.0, "low": 3.9, "high": 4.1},
        },
    },
    "verifiers": {
        "nines": {"accuracy": 0.913, "coverage": 0.99, "abstained": {"no number in the response": 20, "other": 2}},
        "contrarian": {"accuracy": 0.31, "coverage": 1.0, "abstained": {}},
    },
    "versions": {"torch": "2.13.0"},
}
DATA = {"digest": "ab12", "read": 20_000, "train": 19_000}


def recipe(**changes: Any) -> Recipe:
    base: dict[str, Any] = {
        "name": "card",
        "policy": {"model": "Qwen/Qwen3-1.7B", "revision": "c0ffee"},
        "verifiers": [
            {"kind": "arithmetic", "name": "nines", "check": "nines", "family": "digits"},
            {"kind": "arithmetic", "name": "contrarian", "check": "last_digit", "family": "digits", "flip_rate": 0.7},
        ],
        "evaluation": {"gold": {"kind": "noise", "name": "truth"}},
    }
    return Recipe.model_validate({**base, **changes})


def test_the_card_is_one_the_hub_can_read() -> None:
    card = ModelCard(model_card(recipe(), summary=SUMMARY, data=DATA))
    assert card.data.base_model == "Qwen/Qwen3-1.7B"
    assert card.data.library_name == "transformers"
    assert "dpo" in card.data.tags


def test_accuracies_are_shown_only_where_they_were_estimated() -> None:
    """Under the mean a verifier's "accuracy" is mostly the class balance; a fall-back counts as the mean."""
    fallen_back = {**SUMMARY, "ensemble": [{"method": "mean", "on_gold": None}, None]}
    text = model_card(recipe(ensemble={"method": "dawid_skene"}), summary=fallen_back, data=DATA)
    assert "| nines | arithmetic | digits |  | 0.990 | 22 |" in text
    assert "Combined by mean." in text


def test_the_cold_start_is_told() -> None:
    lesson = {"cold_start": {"examples": 76800, "wrong_examples": 50227, "tokens": 962797}}
    text = model_card(recipe(), summary={**SUMMARY, **lesson}, data=DATA)
    assert "fine-tuned on 76,800 solutions (962,797 tokens), 50,227 of them wrong on purpose" in text


def test_figures_stand_in_it_as_measured() -> None:
    text = model_card(recipe(ensemble={"method": "dawid_skene"}), summary=SUMMARY, data=DATA)
    assert "| accuracy | 0.25 [0.2, 0.3] | 0.75 [0.7, 0.8] |" in text
    assert "| kl | not measured | 4 [3.9, 4.1] |" in text
    assert "| nines | arithmetic | digits | 0.913 | 0.990 | 22 |" in text  # 20 + 2 abstentions
    assert "1,234,567 tokens sampled" in text
    assert "| digest | ab12 |" in text and "| read | 20,000 |" in text


def test_the_recipe_in_it_is_the_recipe() -> None:
    text = model_card(recipe(), summary=SUMMARY, data=DATA)
    block = re.search(r"^(~{4,})yaml\n(.*?)^\1$", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    shown = yaml.safe_load(block[2])
    assert shown == public_recipe(recipe())
    assert Recipe.model_validate(shown) == recipe()  # nothing of this one is local


def test_no_path_and_no_secret_gets_in() -> None:
    """A canary in every place where somebody could have put one."""
    private = f"/home/{CANARY}/secret"
    settings = recipe(
        output_dir=private,
        policy={"model": f"{private}/my-model"},
        prompts={"source": f"{private}/prompts.jsonl"},
        sampling={
            "engine": {"hf_token": CANARY, "download_dir": private, "max_num_seqs": 64, "nested": {"x": [CANARY]}}
        },
        training={"deepspeed": {"zero_optimization": {"offload_param": {"nvme_path": private, "buffer_count": 5}}}},
        verifiers=[
            {
                "kind": "lexicon",
                "name": "words",
                "file": f"{private}/words.txt",
                "negative_file": f"~/{CANARY}/bad.txt",
            },
            {"kind": "reward_model", "name": "judge", "model": f"..\\{CANARY}\\judge", "engine": {"api_key": CANARY}},
        ],
    )
    data = {"digest": "ab12", "source": f"{private}/prompts.jsonl"}
    text = model_card(settings, summary=SUMMARY, data=data)
    assert CANARY not in text
    for kept in ("my-model", "prompts.jsonl", "words.txt", "bad.txt", "judge", "max_num_seqs: 64", "buffer_count: 5"):
        assert kept in text
    assert "base_model" not in yaml.safe_load(text.split("---")[1])


@pytest.mark.parametrize(
    "given, shown",
    [
        ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B"),
        ("arithmetic", "arithmetic"),
        ("hub:openai/gsm8k:train", "hub:openai/gsm8k:train"),
        ("/data/me/gsm8k.jsonl", "gsm8k.jsonl"),
        ("../x/model", "model"),
        ("~/models/mine/", "mine"),
        ("C:\\Users\\me\\model", "model"),
        ("a/b/c", "c"),
        ("/", "(left out)"),
    ],
)
def test_names_that_are_published(given: str, shown: str) -> None:
    assert public_name(given) == shown


HOSTILE = "<script>alert(1)</script> [x](javascript:y) `~~~~` | # * \x1b]0;t\x07 \u202e \n---\n"


def test_coverage_is_shown_only_where_something_abstained() -> None:
    full = {"value": 1.0, "low": 1.0, "high": 1.0}
    metrics = {"coverage/nines": full, "coverage/contrarian": {"value": 0.9, "low": 0.8, "high": 1.0}}
    text = model_card(recipe(), summary={"evaluation": {"before": metrics, "after": metrics}}, data={})
    assert "coverage/nines" not in text and "coverage/contrarian" in text


def test_hostile_text_stays_text() -> None:
    shown = escape(HOSTILE)
    assert "<" not in shown and "\x1b" not in shown and "\u202e" not in shown and "\n" not in shown
    assert re.search(r"(?<!\\)[`\[\]()|#*~]", shown) is None  # every mark-up character is escaped


def test_hostile_text_cannot_leave_its_place() -> None:
    """A system prompt that tries to close the code block, and hostile names in data and versions."""
    prompts = {"source": "arithmetic", "system_prompt": "~~~~\n<script>\n~~~~~~\n# Heading\x1b[2J"}
    summary = {**SUMMARY, "versions": {HOSTILE: HOSTILE}}
    text = model_card(recipe(prompts=prompts), summary=summary, data={HOSTILE: HOSTILE})
    body, _, block = text.partition("yaml\n")
    fence = body.splitlines()[-1]
    assert len(fence) == 7 and set(fence) == {"~"}  # longer than the six inside
    assert "<script>" not in body and "\x1b" not in text
    assert block.rstrip().endswith(f"\n{fence}") and block.count(fence) == 1


def test_limitations_follow_from_the_facts() -> None:
    lines = "\n".join(limitations(recipe(), SUMMARY))
    assert "The gold verifier truth was not used in training" in lines
    assert "Bad on purpose, to study bad supervision: contrarian" in lines
    assert "wrong more often than right: contrarian" in lines
    assert "err together (digits)" in lines.replace("\\", "")
    assert "4 nats per response" in lines
    without = "\n".join(limitations(recipe(evaluation={}), {}))
    assert "No gold verifier was used" in without and "nats" not in without and "more often than right" not in without


def test_the_same_run_gives_the_same_card() -> None:
    assert model_card(recipe(), summary=SUMMARY, data=DATA) == model_card(recipe(), summary=SUMMARY, data=DATA)


def test_a_run_with_nothing_measured_still_has_a_card() -> None:
    text = model_card(recipe(), summary={}, data={})
    assert "Nothing was measured." in text and "Not recorded." in text
