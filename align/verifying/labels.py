"""Which items' gold the ensemble may see.  The choice looks at names only: not at votes, and not at what gold says."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa

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
    names, groups = items.take(pa.array(rows)).to_pylist(), group_names.take(pa.array(rows)).to_pylist()
    keyed = []
    for row, name, group in zip(rows.tolist(), names, groups, strict=True):
        of_group = content_id("group", group) if group else content_id("item alone", name)
        keyed.append((of_group, content_id("item", name), row))
    keyed.sort()
    met: Counter[str] = Counter()
    turns = []
    for of_group, of_item, row in keyed:
        turns.append((met[of_group], of_group, of_item, row))
        met[of_group] += 1
    turns.sort()
    return np.array(sorted(row for *_, row in turns[:count]), dtype=np.int64)
