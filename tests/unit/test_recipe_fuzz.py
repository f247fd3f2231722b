"""Whatever bytes a recipe file holds, it is read or refused: no other end, and soon."""

from __future__ import annotations

import os
from pathlib import Path

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from align.errors import InputError
from align.recipe import Recipe
from align.recipe_errors import block_for
from align.recipe_file import load_recipe
from tests.unit.recipe_texts import FULL

FUZZ = settings(
    max_examples=int(os.environ.get("ALIGN_FUZZ_EXAMPLES", "300")),
    deadline=5000,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
_SNIPPETS = [
    "\t", ":", " ", "\n", "-", "&a ", "*a", "!!x ", "{", "}", "[", "]", "'", '"', "|", ">", "#", "---\n", "? ", "<<: ",
    "\x00", "\ufeff", "\ud7ff", "${seed}", "${", "1e999", "9" * 5000, "null", "kind: noise", "\\ud800", "%YAML 1.1\n",
]  # fmt: skip


def read_or_refuse(path: Path, data: bytes, overrides: list[str]) -> None:
    path.write_bytes(data)
    try:
        load_recipe(path, overrides)
    except InputError as error:
        assert str(error) and "Traceback" not in str(error)


@FUZZ
@given(st.data())
def test_a_damaged_recipe_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    text = bytearray(FULL.encode())
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(text)))
        length = data.draw(st.integers(0, 8))
        text[place : place + length] = data.draw(st.sampled_from(_SNIPPETS).map(str.encode) | st.binary(max_size=4))
    read_or_refuse(tmp_path / "fuzz.yaml", bytes(text), [])


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.sampled_from(_SNIPPETS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def dotted_keys(block: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every key of the schema outside the verifiers."""
    found = []
    for name, info in block.model_fields.items():
        inner = block_for(info.annotation, None)
        found += [prefix + name, *(dotted_keys(inner, f"{prefix}{name}.") if inner else [])]
    return found


@FUZZ
@given(st.data())
def test_any_value_under_any_key_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    recipe = yaml.safe_load(FULL)
    overrides = []
    for _ in range(data.draw(st.integers(1, 4))):
        key = data.draw(st.sampled_from(dotted_keys()) | texts)
        if data.draw(st.booleans()):
            overrides.append(f"{key}={data.draw(texts)}")
            continue
        *above, last = key.split(".")
        node = recipe
        for part in above:
            below = node.get(part)
            node[part] = below if isinstance(below, dict) else {}
            node = node[part]
        node[last] = data.draw(values)
    read_or_refuse(tmp_path / "fuzz.yaml", yaml.safe_dump(recipe).encode(), overrides)


@FUZZ
@given(st.binary(max_size=200), st.lists(st.text(max_size=30), max_size=3))
def test_any_bytes_are_read_or_refused(tmp_path: Path, data: bytes, overrides: list[str]) -> None:
    read_or_refuse(tmp_path / "fuzz.yaml", data, overrides)
