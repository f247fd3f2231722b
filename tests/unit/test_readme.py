"""What the README promises that can be looked up: its recipe loads, its files exist, its verbs are verbs."""

from __future__ import annotations

import re
from pathlib import Path

from align.catalogue import LOSSES
from align.catalogue_table import written_into
from align.recipe_file import load_recipe
from align.verifiers.spec import VerifierSpec

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_its_recipe_loads(tmp_path: Path) -> None:
    found = re.search(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    assert found is not None
    (tmp_path / "readme.yaml").write_text(found[1], encoding="utf-8")
    recipe = load_recipe(tmp_path / "readme.yaml")
    assert [v.kind for v in recipe.verifiers] == ["self_consistency", "format", "length", "reward_model"]


def test_its_map_names_files_that_are_there() -> None:
    table = TEXT.split("## Find your way")[1].split("##")[0]
    for path in re.findall(r"`((?:align|benchmarks|recipes|launch)/[\w./]*)`", table):
        assert (ROOT / path).exists(), path


def test_every_kind_of_verifier_is_in_its_table() -> None:
    specs = VerifierSpec.__args__[0].__args__
    kinds = {kind for spec in specs for kind in spec.model_fields["kind"].annotation.__args__}
    assert set(re.findall(r"^\| `(\w+)` \| (?:yes/no|score) \|", TEXT, re.MULTILINE)) == kinds


def test_its_losses_are_those_of_the_catalogue() -> None:
    """Mend it with `python -m align.catalogue_table README.md`."""
    assert written_into(TEXT) == TEXT
    table = TEXT.split("## Losses")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == sorted(
        LOSSES, key=lambda name: table.index(f"| `{name}` |")
    )


def test_every_verb_is_in_its_table() -> None:
    from align.cli import app

    verbs = {command.callback.__name__ for command in app.registered_commands if command.callback is not None}
    table = TEXT.split("## Commands")[1].split("##")[0]
    assert verbs <= set(re.findall(r"\w+", table))
