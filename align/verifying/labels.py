"""Which items' gold the ensemble may see.  The choice looks at names only: not at votes, and not at what gold says."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from align.errors import InputError
from align.records import content_id

RULE = (
    "of the items with gold, one from each group in turn: groups in the order of a hash of their name, items of a "
    "group in the order of a hash of theirs"
)
FEWEST = 2


def check_count(count: int | None, available: int | None, source: str) -> None:
    """Refuse a number of labels that says nothing, or more than there are; `available` None: not yet known."""
    if count is None:
        return
    if count < FEWEST:
        raise InputError(f"--labels {count}: give at least {FEWEST}, or leave it out to use no label at all")
    if available is not None and count > available:
        raise InputError(
            f"--labels {count}: {source} has gold that may be used on {available} items; ask for at most {available}, "
            "or fill in more of `gold`"
        )


def choose_labels(
    items: pa.ChunkedArray, group_names: pa.ChunkedArray, allowed: np.ndarray, count: int | None, source: str
) -> np.ndarray:
    """Rows of the `count` items to see, of those `allowed` [N], in the file's order; none where `count` is None.

    The order of the file does not matter, and the first of N + 1 are the N.
    """
    rows = np.flatnonzero(allowed)
    if count is None:
        return np.zeros(0, dtype=np.int64)
    check_count(count, len(rows), source)
    names, groups = items.take(pa.array(rows)), group_names.take(pa.array(rows))
    order, group = _groups_in_order(names, groups)
    sizes = np.bincount(group, minlength=len(order))
    taken = _turns(sizes[order], count)[np.argsort(order)]  # by group
    some = np.flatnonzero((taken > 0)[group])
    some = some[np.argsort(group[some], kind="stable")]
    chosen: list[int] = []
    for part in np.split(some, np.flatnonzero(np.diff(group[some])) + 1):
        chosen += _first_items(part, names, int(taken[group[part[0]]]))
    return rows[np.sort(np.array(chosen, dtype=np.int64))]


def _groups_in_order(names: pa.ChunkedArray, groups: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The groups' numbers in the order of their hashes, and the group [L] of each row; an item without one is one."""
    encoded = pc.dictionary_encode(groups.combine_chunks())
    group, named = encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()
    hashes = [content_id("group", name) for name in named]
    alone = np.flatnonzero(pc.equal(groups, "").to_numpy())
    group[alone] = len(named) + np.arange(len(alone))
    hashes += [content_id("item alone", name) for name in names.take(pa.array(alone)).to_pylist()]
    return np.argsort(np.array(hashes, dtype="S16"), kind="stable"), group


def _turns(sizes: np.ndarray, count: int) -> np.ndarray:
    """How many items each group [G] gives, when each with any left gives one in turn until there are `count`.

    Example: _turns(np.array([1, 3, 3]), 4) is [1, 2, 1]
    """
    whole, left = 0, count
    while left >= (giving := int((sizes > whole).sum())) > 0:
        whole, left = whole + 1, left - giving
    taken = np.minimum(sizes, whole)
    taken[np.flatnonzero(sizes > whole)[:left]] += 1
    return taken


def _first_items(part: np.ndarray, names: pa.ChunkedArray, count: int) -> list[int]:
    """The first `count` of a group's rows, in the order of a hash of their names."""
    if count == len(part):
        return part.tolist()
    keyed = sorted((content_id("item", name), row) for row, name in zip(
        part.tolist(), names.take(pa.array(part)).to_pylist(), strict=True))  # fmt: skip
    return [row for _, row in keyed[:count]]
