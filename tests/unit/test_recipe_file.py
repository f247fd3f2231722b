"""Reading recipes: what is refused, where the message points, and that nothing a file can hold gets past as a crash."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.errors import InputError
from align.recipe_file import load_recipe
from align.yaml_marks import MAX_ALIASES, resolve_plain
from tests.unit.recipe_texts import FULL, MINIMAL

# --- what is read -------------------------------------------------------------------------------------------------


def test_a_full_recipe_reads_as_written(load: Any) -> None:
    recipe = load(FULL)
    assert recipe.training.learning_rate == 1e-5
    assert recipe.training.loss.beta == 0.5
    assert recipe.training.adam_betas == (0.9, 1.0)
    assert recipe.policy.lora is not None and recipe.policy.lora.target_modules == ("q_proj", "v_proj")
    assert recipe.sampling.engine == {"enforce_eager": True, "kv": [1, 2.5, None]}
    assert recipe.verifiers[0].pattern == r"\d+"
    assert recipe.evaluation.gold is not None and recipe.evaluation.gold.name == "gold"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("1E5", 1e5), (".5", 0.5), ("5.", 5.0), ("-1.5e+3", -1500.0), ("+3", 3), ("007", 7),
        ("0x1F", 31), ("0o17", 15), ("9007199254740993", 9007199254740993), ("true", True), ("FALSE", False),
        ("null", None), ("~", None), ("", None), ("no", "no"), ("yes", "yes"), ("on", "on"), ("12:30", "12:30"),
        ("1_000", "1_000"), ("2024-01-01", "2024-01-01"), ("1e", "1e"), ("0b11", "0b11"), ("tRue", "tRue"),
    ],
)  # fmt: skip
def test_plain_words_follow_yaml_1_2(text: str, value: Any) -> None:
    found = resolve_plain(text)
    assert found == value and type(found) is type(value)


def test_utf8_with_a_byte_order_mark_and_windows_line_ends_is_read(load: Any) -> None:
    assert load(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode()).name == "small"


def test_anchors_are_copies_not_links(load: Any) -> None:
    text = MINIMAL + "pairs: &p {k: 2}\nprompts: {max_tokens: &n 9, limit: *n}\n"
    recipe = load(text, "prompts.limit=5")
    assert (recipe.prompts.max_tokens, recipe.prompts.limit) == (9, 5)
    shared = MINIMAL.replace("{kind: noise, name: coin}", "&v {kind: noise, name: coin}") + "evaluation: {gold: *v}\n"
    assert load(shared, "evaluation.gold.name=other").verifiers[0].name == "coin"


# --- what is refused, and where the message points ----------------------------------------------------------------

WRONG = [
    # (key or block that is changed, as YAML to append or replace, the expected line)
    ("training: {learning_rat: 1e-5}", "5:12: training.learning_rat: unknown key, did you mean learning_rate?"),
    ("training:\n  loss:\n    bta: 1", "7:5: training.loss.bta: unknown key, did you mean beta?"),
    ("trainng: {epochs: 1}", "5:1: trainng: unknown key, did you mean training?"),
    ("training: {temperature: 1}", "5:12: training.temperature: unknown key, did you mean sampling.temperature or "),
    ("training: {zzzzz: 1}", "5:12: training.zzzzz: unknown key; the keys here are algorithm, loss, reference"),
    ("training: {learning_rate: fast}", "5:12: training.learning_rate: expects a number, not 'fast'"),
    ('training: {learning_rate: "1e-5"}', "5:12: training.learning_rate: expects a number, not '1e-5'; remove the quo"),
    ("training: {learning_rate: 1e-5 per step}", "5:12: training.learning_rate: expects a number, not '1e-5 per st"),
    ("training: {learning_rate: true}", "5:12: training.learning_rate: expects a number, not true"),
    ("training: {learning_rate: .nan}", "5:27: training.learning_rate: .nan is not a finite number"),
    ("training: {learning_rate: .inf}", "5:27: training.learning_rate: .inf is not a finite number"),
    ("training: {learning_rate: 1e999}", "5:27: training.learning_rate: 1e999 is too large a number"),
    ("training: {learning_rate: 0}", "5:12: training.learning_rate: must be more than 0, not 0"),
    ("training: {learning_rate: -1e-5}", "5:12: training.learning_rate: must be more than 0, not -1e-05"),
    ("training: {learning_rate: null}", "5:12: training.learning_rate: expects a number, not null"),
    ("training: {learning_rate: [1e-5]}", "5:12: training.learning_rate: expects a number, not a list"),
    ("training: {learning_rate: {a: 1}}", "5:12: training.learning_rate: expects a number, not a block of keys"),
    ("training: {epochs: 1.5}", "5:12: training.epochs: expects a whole number, not 1.5"),
    ("training: {epochs: 2e0}", "5:12: training.epochs: expects a whole number, not 2.0; write 2"),
    ("training: {epochs: 0}", "5:12: training.epochs: must be at least 1, not 0"),
    ('training: {epochs: "3"}', "5:12: training.epochs: expects a whole number, not '3'; remove the quotes"),
    ("training: {epochs: true}", "5:12: training.epochs: expects a whole number, not true"),
    (f"training: {{epochs: {'9' * 5000}}}", "5:20: training.epochs: a whole number of 5000 digits is too long"),
    ("training: {gradient_checkpointing: no}", "5:12: training.gradient_checkpointing: expects true or false, not 'no"),
    ("training: {gradient_checkpointing: on}", "5:12: training.gradient_checkpointing: expects true or false, not 'on"),
    ("training: {gradient_checkpointing: 1}", "5:12: training.gradient_checkpointing: expects true or false, not 1"),
    ("training: {algorithm: dop}", "5:12: training.algorithm: expects one of dpo, ppo, grpo, "),
    ("training: {zero_stage: 4}", "5:12: training.zero_stage: expects one of 0, 1, 2, 3, not 4"),
    ("training: {zero_stage: true}", "5:12: training.zero_stage: expects one of 0, 1, 2, 3, not true"),
    ("training: {zero_stage: '2'}", "5:12: training.zero_stage: expects one of 0, 1, 2, 3, not '2'"),
    ("training: {adam_betas: 0.9}", "5:12: training.adam_betas: expects a list of 2 entries, not 0.9"),
    ("training: {adam_betas: [0.9, 1.5]}", "5:30: training.adam_betas.1: must be at most 1, not 1.5"),
    ("training: {deepspeed: [1]}", "5:12: training.deepspeed: expects a block of keys, not a list"),
    ("training: {offload: optimizer}", "5:12: training.offload: optimizer needs zero_stage 1, 2 or 3"),
    ("training: {offload: all, zero_stage: 2}", "5:12: training.offload: all needs zero_stage: 3"),
    ("training: 3", "5:1: training: expects a block of keys, not 3"),
    ("training:", "5:1: training: expects a block of keys, not null; remove the key, or write the block's keys below "),
    ("training: []", "5:1: training: expects a block of keys, not a list"),
    ("sampling: {top_p: 0}", "5:12: sampling.top_p: must be more than 0, not 0"),
    ("sampling: {top_p: 1.01}", "5:12: sampling.top_p: must be at most 1, not 1.01"),
    ("sampling: {samples_per_prompt: 0}", "5:12: sampling.samples_per_prompt: must be at least 1, not 0"),
    ("sampling: {samples_per_prompt: 1}", "5:12: sampling.samples_per_prompt: dpo compares the responses to a prompt"),
    ("sampling: {engine: x}", "5:12: sampling.engine: expects a block of keys, not 'x'"),
    ("ensemble: {method: mayority}", "5:12: ensemble.method: expects one of auto, mean, majority, moments, "),
    ("ensemble: {class_balance: 1}", "5:12: ensemble.class_balance: must be less than 1, not 1"),
    ("pairs: {max_per_prompt: all}", "5:9: pairs.max_per_prompt: expects a whole number or null, not 'all'"),
    ("evaluation: {k: [1, 0]}", "5:21: evaluation.k.1: must be at least 1, not 0"),
    ("evaluation: {k: [1, 9]}", "5:14: evaluation.k: pass@9 needs samples_per_prompt of at least 9"),
    ("evaluation: {gold: {kind: noise, name: coin}}", "5:14: evaluation.gold: 'coin' is also a verifier"),
    ("evaluation: {gold: {kind: noise, name: g, rate: 2}}", "5:43: evaluation.gold.rate: must be at most 1, not 2"),
    ("evaluation: {gold: {kind: nois, name: g}}", "5:21: evaluation.gold.kind: 'nois' is not a kind, did you mean noi"),
    ("evaluation: {gold: {name: g}}", "5:14: evaluation.gold.kind: is missing; the kinds are answer, "),
    ("cold_start: {source: prompts}\nprompts: {source: x.csv}", "5:14: cold_start.source: `prompts` writes solutions"),
    ("prompts: {chat_template: maybe}", "5:11: prompts.chat_template: expects true or false, not 'maybe'"),
    ("prompts: {limit: -3}", "5:11: prompts.limit: must be at least 1, not -3"),
    ("prompts: {source: 12}", "5:11: prompts.source: expects text, not 12; put it in quotes"),
    ("prompts: {source: false}", "5:11: prompts.source: expects text, not false; put it in quotes"),
    ('prompts: {source: "a\\0b"}', "5:19: prompts.source: holds a zero character"),
    ("prompts: {arithmetic: {digits: 10}}", "5:24: prompts.arithmetic.digits: must be at most 9, not 10"),
    ("output_dir: 5", "5:1: output_dir: expects text, not 5; put it in quotes"),
    ("seed: 2147483648", "5:1: seed: must be less than 2147483648, not 2147483648"),
    ("seed: -1", "5:1: seed: must be at least 0, not -1"),
    ("seed: !!python/object/apply:os.system ['true']", "5:7: seed: tag '!!python/object/apply:os.system' is not allow"),
    ("seed: !!str 5", "5:7: seed: tag '!!str' is not allowed"),
    ("seed: !mine 5", "5:7: seed: tag '!mine' is not allowed"),
    ("name: again", "5:1: name: duplicate key, first given in line 1; keep one"),
    ("seed: 1\nseed: 1", "6:1: seed: duplicate key, first given in line 5; keep one"),
    ("pairs: {k: 2, k: 3}", "5:15: pairs.k: duplicate key, first given in line 5; keep one"),
    ("<<: {seed: 1}", "5:1: <<: merge keys are not supported; write the keys out".replace("<<:", '"<<":')),
    ("1: x", "5:1: 1: unknown key; the keys here are name, seed"),
    ("'': x", '5:1: "": unknown key; the keys here are name, seed'),
    ('"a\\e[2J\\nb": x', '5:1: "a\\u001b[2J\\nb": unknown key; the keys here are name, seed'),
    ("prompts: {source: '${polcy.model}'}", "5:11: prompts.source: ${polcy.model} is no key with a value, did you mea"),
    ("prompts: {source: '${HOME}/x'}", "5:11: prompts.source: ${HOME} is no key with a value; only keys of this recip"),
    ("prompts: {source: '${policy}'}", "5:11: prompts.source: ${policy} is a block or a list, not a single value"),
    ("prompts: {source: '${prompts.limit}'}", "5:11: prompts.source: ${prompts.limit} is null"),
    ("prompts: {source: 'a${prompts.source}'}", "5:11: prompts.source: refers to itself: prompts.source -> prompts.so"),
    ("prompts: {source: '${}'}", "5:11: prompts.source: ${} is no key with a value"),
]  # fmt: skip


@pytest.mark.parametrize(("addition", "expected"), WRONG, ids=[w[0][:40] for w in WRONG])
def test_one_mistake_gives_one_line_at_its_place(refusal: Any, addition: str, expected: str) -> None:
    lines = refusal(MINIMAL + addition + "\n")
    assert len(lines) == 1 and lines[0].startswith(f"r.yaml:{expected}"), lines


VERIFIERS = [
    ("{kind: format, name: f, pattern: '('}", "4:29: verifiers.0.pattern: not a regular expression: "),
    ("{kind: format, name: f}", "4:5: verifiers.0.pattern: is missing; the expression"),
    ("{kind: format, name: f, patern: x}", "4:29: verifiers.0.patern: unknown key, did you mean pattern?"),
    ("{kind: lexcon, name: f}", "4:6: verifiers.0.kind: 'lexcon' is not a kind, did you mean lexicon?; the kinds are "),
    ("{kind: 3, name: f}", "4:6: verifiers.0.kind: 3 is not a kind; the kinds are answer, "),
    ("{kind: [a], name: f}", "4:6: verifiers.0.kind: a list is not a kind; the kinds are answer, "),
    ("{name: f}", "4:5: verifiers.0.kind: is missing; the kinds are answer, "),
    ("{kind: noise}", "4:5: verifiers.0.name: is missing; name in reports and artifacts"),
    ("{kind: noise, name: ../x}", "4:19: verifiers.0.name: '../x' is not a name; a name has 1 to 64 letters"),
    ("{kind: noise, name: a, timeout_s: 5s}", "4:28: verifiers.0.timeout_s: expects a number, not '5s'"),
    ("{kind: length, name: a, minimum: 5, maximum: 3}", "4:41: verifiers.0.maximum: is below `minimum`"),
    ("{kind: readability, name: a, formula: dale_chall}", "4:5: verifiers.0.file: goes with `formula: dale_chall`, "),
    ("{kind: answer, name: a, extract: pattern}", "4:5: verifiers.0.pattern: goes with `extract: pattern`, and only"),
    ("{kind: noise, name: a}\n  - {kind: noise, name: a}", "5:19: verifiers.1.name: 'a' is used twice; give each"),
    ("noise", "4:5: verifiers.0: expects a block of keys, not 'noise'"),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "expected"), VERIFIERS, ids=[v[0][:40] for v in VERIFIERS])
def test_mistakes_in_a_verifier_name_its_place_not_the_union(refusal: Any, entry: str, expected: str) -> None:
    lines = refusal(MINIMAL.replace("{kind: noise, name: coin}", entry))
    assert len(lines) == 1 and lines[0].startswith(f"r.yaml:{expected}"), lines


WHOLE_FILE: list[tuple[str | bytes, str]] = [
    ("", "r.yaml: is empty; a recipe begins with `name: …`"),
    ("# nothing\n", "r.yaml: is empty"),
    ("- a\n- b\n", "r.yaml: is not a mapping of keys to values"),
    ("just text", "r.yaml: is not a mapping of keys to values"),
    ("name: x\n\tseed: 1\n", "r.yaml:2:1: a tab indents this line; YAML takes spaces only"),
    ("policy:\n \tmodel: x\n", "r.yaml:2:2: a tab indents this line; YAML takes spaces only"),
    (MINIMAL.encode("utf-16"), "r.yaml:1:1: is UTF-16; save it as UTF-8"),
    (MINIMAL.encode("utf-16-le"), "r.yaml:1:1: holds zero bytes, as UTF-16 or a binary file would"),
    (b"name: caf\xe9\n", "r.yaml:1:10: byte 0xe9 is not UTF-8; save the file as UTF-8"),
    (b"name: x\nseed: 1\x00\n", "r.yaml:2:8: character U+0000 is not allowed; remove it"),
    ("name: a\x1b[2J", "r.yaml:1:8: character U+001B is not allowed; remove it"),
    (b"# " + b"x" * (1 << 20), "r.yaml: is larger than 1 MiB; this cannot be a recipe"),
    ("name: x\n---\nname: y\n", "r.yaml:2:1: a second document begins here; a recipe is one document"),
    ("name: [a\n", "r.yaml:2:1: is not YAML: "),
    ("name: 'a\n", "r.yaml:2:1: is not YAML: "),
    ("name: x: y\n", "r.yaml:1:8: is not YAML: mapping values are not allowed in this context"),
    ("name: @x\n", "r.yaml:1:7: is not YAML: "),
    ("name: %x\n", "r.yaml:1:7: is not YAML: "),
    ("name: *x\n", "r.yaml:1:7: alias *x has no anchor before it; quote it if it is text"),
    ("a: &a [*a]\n", "r.yaml:1:8: alias *a stands inside its own anchor"),
    ("{a: 1}: x\n", "r.yaml:1:1: a list or a block cannot be a key; quote it if it is text"),
    ("a: &b x\n*b : 1\n", "r.yaml:2:1: an alias cannot be a key"),
    ("a: " + "[" * 100 + "]" * 100, "r.yaml:1:36: is nested deeper than 32 levels"),
    ("a: " + "[" * 500_000, "r.yaml:1:36: is nested deeper than 32 levels"),
    ("a: &a 1\nb: [" + "*a," * (MAX_ALIASES + 1) + "]", "r.yaml:2:305: more than 100 aliases"),
    ("a: &a 1\n" + "".join(f"{x}: &{x} [{', '.join('*' + y for _ in range(10))}]\n" for y, x in zip(
        "abcdefgh", "bcdefghi", strict=True)), "r.yaml:6:"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), WHOLE_FILE, ids=[repr(w[1])[:50] for w in WHOLE_FILE])
def test_a_file_that_is_no_recipe_is_refused_at_once(refusal: Any, text: str | bytes, expected: str) -> None:
    began = time.monotonic()
    lines = refusal(text)
    assert len(lines) == 1 and lines[0].startswith(expected), lines
    assert time.monotonic() - began < 5


def test_a_bomb_of_aliases_is_counted_not_built(refusal: Any) -> None:
    names = "abcdefghi"
    bomb = "a: &a [x]\n" + "".join(
        f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n" for old, new in zip(names, names[1:], strict=False)
    )
    assert refusal(bomb)[0].endswith("holds more than 100000 values, aliases written out")


def test_references_cannot_grow_without_end(refusal: Any) -> None:
    engine = {"a0": "x" * 1000, **{f"a{i}": f"${{sampling.engine.a{i - 1}}}" * 10 for i in range(1, 12)}}
    lines = refusal(MINIMAL + yaml.safe_dump({"sampling": {"engine": engine}}, width=10**6))
    assert all("is longer than 65536 characters once its references are filled in" in line for line in lines)


@pytest.mark.parametrize("path", ["missing.yaml", ".", "/dev/null/x", "/dev/zero", "x" * 300])
def test_paths_that_are_no_file(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=re.escape(path)):
        load_recipe(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is not a file"):
        load_recipe(tmp_path / "pipe")


def test_a_mistyped_file_name_gets_a_hint(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text(MINIMAL)
    with pytest.raises(InputError, match="did you mean .*quickstart.yaml"):
        load_recipe(tmp_path / "quikstart.yaml")


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(refusal: Any) -> None:
    text = FULL.replace("dtype: float32", "dtype: float33").replace("learning_rate: 1e-5", "learning_rat: slow")
    text = text.replace("maximum: 20", "maximum: 20\n    units: words\n  - {kind: lexicon, name: l}")
    lines = refusal(text.replace("seed: 3", "seed: 3\nseed: 4"), "rounds.count=0", "nonsense")
    keys = [line.split(": ")[1] for line in lines]
    assert keys == [
        "seed", "policy.dtype", "verifiers.1.units", "verifiers.2.file", "training.learning_rat",
        "training.learning_rate", "nonsense", "rounds.count",
    ]  # fmt: skip


def test_contradictions_between_blocks_are_told_together(refusal: Any) -> None:
    text = MINIMAL.replace("{model: some/model}", "{from_scratch: {context: 16}}")
    lines = refusal(text + "sampling: {max_new_tokens: 16}\nevaluation: {gold: {kind: noise, name: coin}}\n")
    assert [line.split(": ")[1] for line in lines] == [
        "policy.from_scratch", "sampling.max_new_tokens", "evaluation.gold"
    ]  # fmt: skip


def test_missing_blocks_are_named_at_the_top(refusal: Any) -> None:
    lines = refusal("name: x\n")
    assert [line.split(": ")[:2] for line in lines] == [["r.yaml:1:1", "policy"], ["r.yaml:1:1", "verifiers"]]
    assert refusal("name: x\npolicy: {model: m}\nverifiers: []\n") == [
        "r.yaml:3:1: verifiers: is empty; it needs at least 1 entry"
    ]


@pytest.mark.parametrize("name", ["../x", "/etc", "a/b", ".hidden", "", "a b", "x" * 65, "naïve", "a\n"])
def test_a_name_is_no_path(refusal: Any, name: str) -> None:
    lines = refusal(yaml.safe_dump({"name": name}, allow_unicode=True) + MINIMAL.split("\n", 1)[1])
    assert len(lines) == 1 and "name: " in lines[0] and "is not a name" in lines[0]
