"""What the tests of recipe files share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from align.errors import InputError
from align.recipe import Recipe
from align.recipe_file import load_recipe


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    """Reads the text as r.yaml, with overrides: load(text, "seed=1")."""
    monkeypatch.chdir(tmp_path)

    def load(text: str | bytes, *overrides: str) -> Recipe:
        Path("r.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
        return load_recipe("r.yaml", overrides)

    return load


@pytest.fixture
def refusal(load: Callable[..., Recipe]) -> Callable[..., list[str]]:
    """The lines with which the text is refused."""

    def refusal(text: str | bytes, *overrides: str) -> list[str]:
        with pytest.raises(InputError) as caught:
            load(text, *overrides)
        assert caught.value.exit_code == 2
        return str(caught.value).split("\n")

    return refusal
