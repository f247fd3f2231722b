"""Where `align plan` knows the ensemble's rates from: a report of `align verify`, or an earlier run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align import resampling
from align.errors import InputError
from align.recipe import Recipe

_NUMBERS = ("threshold", "tpr", "fpr", "tpr_low", "fpr_high", "pass_rate", "ceiling", "ceiling_cautious",
            "precision_once")  # fmt: skip


def resampling_lines(recipe: Recipe, file: Path | None) -> list[str]:
    """What sampling again would bring, with where the rates come from; no line where none are known.

    `file` is report.json of `align verify`, or summary.json of a run; without it the recipe's own output directory is
    looked at.
    """
    own = Path(recipe.output_dir) / recipe.name / "summary.json"
    path = file or (own if own.is_file() else None)
    if path is None:
        return []
    found = _read(path, strict=file is not None)
    if found is None:
        return []
    lines = resampling.render(found, f"rates from {path}")
    return [*lines, f"  this recipe draws {recipe.sampling.samples_per_prompt} responses a prompt"]


def _read(path: Path, *, strict: bool) -> dict[str, Any] | None:
    """The newest plan in a report or a summary; a file that the user named must have one."""
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"--rates {path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"--rates {path}: not JSON: {error}") from None
    rounds = document.get("ensemble") if isinstance(document, dict) else None
    places = [document, *reversed(rounds)] if isinstance(rounds, list) else [document]
    found = next((p["resampling"] for p in places if isinstance(p, dict) and p.get("resampling")), None)
    if found is None:
        if strict:
            raise InputError(f"--rates {path}: holds no rates; give report.json of `align verify`, or a summary.json")
        return None
    if not _whole(found):
        if not strict:
            return None
        raise InputError(f"--rates {path}: `resampling` is damaged; run `align verify` again")
    return found


def _whole(found: Any) -> bool:
    """Whether a plan has every number that is printed."""
    if (
        not isinstance(found, dict)
        or not isinstance(found.get("best"), list)
        or not isinstance(found.get("odds"), list)
    ):
        return False
    numbers = [found.get(name) for name in _NUMBERS]
    for row in found["best"]:
        if not isinstance(row, dict):
            return False
        numbers += [row.get("cost"), row.get("samples"), row.get("enough"), row.get("value")]
        numbers += [row.get("precision")] if row.get("samples") else []
    return all(isinstance(n, int | float) for n in numbers) and all(
        n is None or isinstance(n, int | float) for n in found["odds"]
    )
