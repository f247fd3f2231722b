"""What a run was started with: recipe, identity of its inputs, installed packages; and whether that still holds."""

from __future__ import annotations

import functools
import json
import os
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from align.errors import InputError
from align.recipe import Recipe
from align.storage.durable import seal, to_json, unseal, write_file

FORMAT = 1  # of the run directory
_LEDGER = "run.json"
_MOVABLE = "output_dir"  # a finished or paused run may be moved


def begin(root: Path, recipe: Recipe, identity: Mapping[str, str]) -> None:
    """Write the files that describe a new run; `run.json` comes last and makes it one."""
    write_file(root / "recipe.yaml", _as_yaml(recipe), "store.recipe")
    write_file(root / "environment.json", to_json({"environments": [environment()]}), "store.environment")
    _write_ledger(root, _comparable(recipe), identity)


def is_run(root: Path) -> bool:
    """Whether a run was begun here."""
    return (root / _LEDGER).exists()


def check(root: Path, recipe: Recipe, identity: Mapping[str, str]) -> list[str]:
    """Refuse another recipe or other inputs, printing the difference; returns what changed in the environment."""
    ledger = unseal(root / _LEDGER)
    if ledger["format"] != FORMAT:
        raise InputError(f"{root}: written by another version of Align (format {ledger['format']}, not {FORMAT})")
    changes = _recipe_changes(ledger["recipe"], recipe)
    if changes:
        raise InputError(refusal(root, "recipe", changes))
    known: dict[str, str] = ledger["identity"]
    changes = differences(known, identity)
    if changes:
        raise InputError(refusal(root, "input", changes))
    return _note_environment(root)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """One line per key whose value changed: `tokenizer: 3f… -> 9a…`."""
    keys = sorted(before.keys() | after.keys())
    absent = "absent"
    return [f"{k}: {before.get(k, absent)} -> {after.get(k, absent)}" for k in keys if before.get(k) != after.get(k)]


@functools.cache
def environment() -> dict[str, Any]:
    """Python, platform and the version of every installed package, without importing one; no variables, no names."""
    packages = {d.metadata["Name"]: d.version for d in metadata.distributions() if d.metadata["Name"]}
    return {
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()} {platform.release()}",
        "cpus": os.cpu_count(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def _write_ledger(root: Path, recipe: Mapping[str, Any], identity: Mapping[str, str]) -> None:
    ledger = {"format": FORMAT, "recipe": recipe, "identity": dict(identity)}
    write_file(root / _LEDGER, seal(ledger), "store.run")


def _comparable(recipe: Recipe) -> dict[str, Any]:
    """Everything a run depends on, as JSON data."""
    document = json.loads(recipe.model_dump_json())
    del document[_MOVABLE]
    return document


def _recipe_changes(before: Mapping[str, Any], recipe: Recipe) -> list[str]:
    after = _comparable(recipe)
    if before == after:
        return []
    from align.recipe_file import diff_recipes

    try:
        old = Recipe.model_validate({**before, _MOVABLE: recipe.output_dir})
    except ValidationError as error:
        return [f"the recipe it was started with is not valid in this version of Align: {error.errors()[0]['msg']}"]
    return diff_recipes(old, recipe)


def refusal(root: Path, what: str, changes: list[str]) -> str:
    """The message for a run directory that belongs to another recipe or other inputs."""
    listing = "\n".join(f"  {change}" for change in changes)
    return (
        f"{root}: this run was started with another {what}:\n{listing}\n"
        "Restore what it was started with to continue it, or change `name` in the recipe to start a new run."
    )


def _as_yaml(recipe: Recipe) -> bytes:
    from align.recipe_file import dump_recipe

    return dump_recipe(recipe).encode()


def _note_environment(root: Path) -> list[str]:
    """Add today's environment to the run's list if it is new; one line per package that changed."""
    path = root / "environment.json"
    try:
        seen = json.loads(path.read_bytes())["environments"]
        last = seen[-1]
        packages = dict(last["packages"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        seen, last, packages = [], None, {}
    now = environment()
    if last == now:
        return []
    write_file(path, to_json({"environments": [*seen, now]}), "store.environment")
    if last is None:
        return [f"{path}: was missing or unreadable; it now describes this environment only"]
    changes = differences({"python": last.get("python"), **packages}, {"python": now["python"], **now["packages"]})
    return [f"since the run began, {change}" for change in changes]
