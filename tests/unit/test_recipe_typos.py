"""A typing error in a key is told as one, with the key that was meant."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel

from align.recipe import Recipe
from align.recipe_errors import alternatives, block_for, suggest
from align.verifiers.spec import VerifierSpec

MINIMAL = """\
name: small
policy: {model: some/model}
verifiers:
  - {kind: noise, name: coin}
"""


def schema_blocks() -> dict[str, type[BaseModel]]:
    """Every block of the schema, {dotted key: class}; verifiers by kind."""
    found: dict[str, type[BaseModel]] = {}

    def walk(block: type[BaseModel], path: str) -> None:
        found[path] = block
        for name, info in block.model_fields.items():
            inner = block_for(info.annotation, None)
            if inner is not None:
                walk(inner, f"{path}.{name}".lstrip("."))

    walk(Recipe, "")
    for spec in alternatives(VerifierSpec):
        found[f"verifiers[{get_args(spec.model_fields['kind'].annotation)[0]}]"] = spec
    return found


def one_edit_typos(word: str) -> list[str]:
    """A letter left out, doubled, swapped with the next, or replaced by its neighbour on the alphabet: every place."""
    edits = {word[:i] + word[i + 1 :] for i in range(len(word))}
    edits |= {word[:i] + word[i] + word[i:] for i in range(len(word))}
    edits |= {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}
    edits |= {word[:i] + ("x" if word[i] != "x" else "y") + word[i + 1 :] for i in range(len(word))}
    return sorted(edits - {word, ""})


def test_the_guess_is_right_for_95_percent_of_one_edit_typos() -> None:
    right, wrong = 0, []
    for path, block in schema_blocks().items():
        for key in block.model_fields:
            for typo in one_edit_typos(key):
                if typo in block.model_fields:
                    continue
                if suggest(typo, block.model_fields) == key:
                    right += 1
                else:
                    wrong.append(f"{path}.{key} as {typo}")
    share = right / (right + len(wrong))
    print(f"{right} of {right + len(wrong)} typos ({share:.1%}); wrong: {wrong}")
    assert share >= 0.95


def test_a_typo_in_every_key_is_reported_with_its_key(refusal: Any) -> None:
    for path, block in schema_blocks().items():
        if "[" in path:
            continue
        for key in block.model_fields:
            typo = key + key[-1]
            if not path:
                text = MINIMAL.replace(f"{key}:", f"{typo}:", 1)
                text = text if text != MINIMAL else MINIMAL + f"{typo}: 1\n"
                lines = refusal(text)
            else:
                lines = refusal(MINIMAL, f"{path}.{typo}=1")
            dotted = f"{path}.{typo}".lstrip(".")
            assert any(f": {dotted}: unknown key, did you mean {key}?" in line for line in lines), (lines, dotted)
