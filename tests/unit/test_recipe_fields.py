"""Every key of the recipe is read somewhere: a key that does nothing is worse than none."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args

from pydantic import BaseModel

from align.catalogue import LOSSES
from align.recipe import Recipe
from align.recipe_errors import alternatives
from align.recipe_training import Loss

ROOT = Path(__file__).parents[2]
DEFINED_IN = {*ROOT.glob("align/recipe*.py"), *ROOT.glob("align/verifiers/spec*.py")}
"""Where fields are declared and checked: to be looked at there is not to be read."""


def blocks(block: type[BaseModel], found: set[type[BaseModel]]) -> set[type[BaseModel]]:
    """The block and every block that a field of it can hold."""
    if block not in found:
        found.add(block)
        for info in block.model_fields.values():
            for choice in alternatives(info.annotation):
                for inner in [choice, *(a for arg in get_args(choice) for a in alternatives(arg))]:
                    if isinstance(inner, type) and issubclass(inner, BaseModel):
                        blocks(inner, found)
    return found


def attributes_read() -> set[str]:
    """Every `x.name` that is read in align/, outside the files that define and check the recipe."""
    names: set[str] = set()
    for folder in ("align", "reward_models"):
        for file in (ROOT / folder).rglob("*.py"):
            if file in DEFINED_IN:
                continue
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    names.add(node.attr)
    return names


def taken_by_losses() -> set[str]:
    """Settings that a loss takes by name, as its line in the catalogue says."""
    return {option for facts in LOSSES.values() for option in facts.arguments(Loss())}


def test_every_key_is_read() -> None:
    read = attributes_read() | taken_by_losses()
    unread = [
        f"{block.__name__}.{name}"
        for block in sorted(blocks(Recipe, set()), key=lambda b: b.__name__)
        for name in block.model_fields
        if name not in read
    ]
    assert not unread


def test_every_key_is_explained() -> None:
    silent = [
        f"{block.__name__}.{name}"
        for block in sorted(blocks(Recipe, set()), key=lambda b: b.__name__)
        for name, info in block.model_fields.items()
        if not info.description and name != "kind" and not _is_block(info.annotation)
    ]
    assert not silent


def _is_block(annotation: object) -> bool:
    """A block explains itself in its class."""
    return any(isinstance(a, type) and issubclass(a, BaseModel) for a in alternatives(annotation))
