"""What `align verify` was asked: either a file of votes, or a recipe and a file of responses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from align.errors import InputError


def verify(
    recipe: str | None,
    responses: str | None,
    overrides: Sequence[str],
    votes: str | None,
    labels: int | None,
    *,
    out: str | None,
    plot: bool,
    columns: Sequence[str],
) -> list[str]:
    """The report as lines, with the files written; InputError where the arguments do not go together."""
    faults = []
    if out is None:
        faults.append("--out: name a directory for the result")
    if votes is not None and (recipe is not None or responses is not None):
        faults.append("--votes takes the place of RECIPE and RESPONSES; give one or the other")
    if votes is not None and columns:
        faults.append("--column: a file of votes has fixed names, item, group and gold")
    if votes is None and (recipe is None or responses is None):
        faults.append("give --votes FILE, or RECIPE and RESPONSES")
    if votes is None and plot:
        faults.append("--plot: with RECIPE and RESPONSES it is always drawn; leave it out")
    if faults:
        raise InputError("\n".join(faults))
    assert out is not None
    if votes is not None:
        from align.verify import verify_votes

        return verify_votes(Path(votes), labels, Path(out), plot=plot)
    assert recipe is not None and responses is not None
    from align.recipe_file import load_recipe
    from align.verifying.responses import verify_responses

    loaded = load_recipe(recipe, overrides)
    return verify_responses(loaded, Path(responses), labels, Path(out), columns)
