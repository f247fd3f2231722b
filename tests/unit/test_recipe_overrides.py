"""Overrides and references, and recipes written out again."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.recipe import Recipe
from align.recipe_file import diff_recipes, dump_recipe, load_recipe, recipe_schema
from tests.unit.recipe_texts import FULL, MINIMAL

# --- overrides ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "attribute", "value"),
    [
        ("training.learning_rate=3e-6", "training.learning_rate", 3e-6),
        ("seed=7", "seed", 7),
        ("rounds.count=2", "rounds.count", 2),
        ("prompts.source=a: b # c", "prompts.source", "a: b # c"),
        ("prompts.source='12'", "prompts.source", "12"),
        ("prompts.system_prompt=null", "prompts.system_prompt", None),
        ("prompts.system_prompt=", "prompts.system_prompt", None),
        ("policy.lora=null", "policy.lora", None),
        ("policy.lora={r: 4}", "policy.lora.r", 4),
        ("policy.lora.r=2", "policy.lora.r", 2),
        ("evaluation.k=[1, 2]", "evaluation.k", (1, 2)),
        ("verifiers.0.pattern=a=b", "verifiers.0.pattern", "a=b"),
        ("verifiers.shape.pattern=x", "verifiers.0.pattern", "x"),
        ("verifiers.brief.one.maximum=9", "verifiers.1.maximum", 9),
        ("evaluation.gold.match=math", "evaluation.gold.match", "math"),
        ("sampling.engine.max_model_len=64", "sampling.engine.max_model_len", 64),
    ],
)
def test_an_override_changes_its_key(load: Any, override: str, attribute: str, value: Any) -> None:
    found: Any = load(FULL, override)
    for part in attribute.split("."):
        found = found[int(part)] if part.isdigit() else found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value


def test_the_last_override_wins(load: Any) -> None:
    assert load(MINIMAL, "seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.learning_rat=1", "training.learning_rat: unknown key, did you mean learning_rate?"),
        ("training.learning_rate=fast", "training.learning_rate: expects a number, not 'fast'"),
        ("training.learning_rate=.inf", "training.learning_rate: .inf is not a finite number"),
        ("training.learning_rate.x=1", "training.learning_rate.x: training.learning_rate is a value; it has no keys"),
        ("verifiers.shpe.pattern=x", "verifiers.shpe: no entry 'shpe' among 2, counted from 0, did you mean shape?"),
        ("verifiers.7.pattern=x", "verifiers.7: no entry '7' among 2, counted from 0; its names are shape, brief.one"),
        ("--ranks", "--ranks: expects key=value, such as training.learning_rate=1e-5"),
        ("=3", '"=3": expects key=value'),
        ("evaluation.k=[1", "evaluation.k: is not YAML: "),
        ("evaluation.gold={kind: !!x y}", "evaluation.gold: tag '!!x' is not allowed"),
        ("policy.model='a' 'b'", "policy.model: is not YAML: "),
        ("prompts.source=${nope}", "prompts.source: ${nope} is no key with a value"),
    ],
)
def test_a_wrong_override_points_to_the_command_line(refusal: Any, override: str, expected: str) -> None:
    lines = refusal(FULL, override)
    assert len(lines) == 1 and lines[0].startswith(f"command line: {expected}"), lines


# --- references ---------------------------------------------------------------------------------------------------


def test_references_take_values_defaults_and_overrides(load: Any) -> None:
    text = MINIMAL + "prompts: {source: '${policy.model}/../${name}-${seed}.jsonl', limit: '${rounds.count}'}\n"
    recipe = load(text, "policy.model=/there")
    assert recipe.prompts.source == "/there/../small-0.jsonl"
    assert recipe.prompts.limit == 3  # a whole text that is one reference keeps the type
    assert load(MINIMAL, "prompts.source=${verifiers.coin.name}.csv").prompts.source == "coin.csv"
    assert load(MINIMAL, "prompts.system_prompt=write $${name}").prompts.system_prompt == "write ${name}"


def test_a_ring_of_references_is_shown(refusal: Any) -> None:
    lines = refusal(MINIMAL + "prompts: {source: '${output_dir}'}\noutput_dir: 'x${prompts.source}'\n")
    assert lines[0].startswith("r.yaml:5:11: prompts.source: refers to itself: prompts.source -> output_dir -> prompts")
    assert lines[1].startswith("r.yaml:6:1: output_dir: refers to itself: output_dir -> prompts.source -> output_dir")


# --- writing ------------------------------------------------------------------------------------------------------


def test_what_is_dumped_is_read_back_the_same(load: Any) -> None:
    recipe = load(FULL)
    assert load(dump_recipe(recipe)) == recipe


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | texts
    | st.sampled_from(["1e-5", "no", "null", "0o7", "${name}", "$${x}", "a: b", "- x", "#", " ", "1_0", "=", "<<"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(engine=st.dictionaries(texts, values, max_size=3), system_prompt=texts, rate=st.floats(1e-300, 1e300))
def test_any_value_survives_writing_and_reading(
    tmp_path_factory: pytest.TempPathFactory, engine: dict[str, Any], system_prompt: str, rate: float
) -> None:
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "policy": {"model": "m"},
            "verifiers": [{"kind": "noise", "name": "n"}],
            "sampling": {"engine": engine},
            "prompts": {"system_prompt": system_prompt},
            "training": {"learning_rate": rate},
        }
    )
    file = tmp_path_factory.getbasetemp() / "again.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8", newline="")
    assert load_recipe(file) == recipe


def test_differences_are_listed_by_key(load: Any) -> None:
    old, new = load(FULL), load(FULL, "training.learning_rate=2e-5", "policy.lora=null", "verifiers.shape.name=form")
    assert diff_recipes(old, old) == []
    assert set(diff_recipes(old, new)) >= {
        "training.learning_rate: 1e-05 -> 2e-05",
        "policy.lora.r: 8 -> (not there)",
        "policy.lora: (not there) -> null",
        'verifiers.0.name: "shape" -> "form"',
    }


def test_the_json_schema_accepts_what_we_accept(load: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(load(FULL).model_dump(mode="json"))
    assert not validator.is_valid({**load(FULL).model_dump(mode="json"), "extra": 1})
    assert schema["$defs"]["Training"]["properties"]["learning_rate"]["description"] == "Peak learning rate."
