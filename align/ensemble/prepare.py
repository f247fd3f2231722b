"""What is done to a table before a label model may be trusted with it; none of it needs a label.

Three things undo an EM whose theory is sound: a verifier that the others determine (it is counted twice), a rule that
nearly always says the same (a bloc of those is the easiest class to find), and a score that knows the prompt rather
than the response (long questions have long answers and are hard, so length "predicts" and yet says nothing of which
answer is right).

Legend: N samples, M verifiers, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from align.ensemble.channels import Channel
from align.ensemble.normalise import normalise, row_mean
from align.ensemble.table import VerdictTable

DETERMINED = 0.995  # share of a verifier's variance that the others explain before it says nothing new
ROWS_PER_COLUMN = 10  # fewer rows per column and a regression explains by chance
LOPSIDED = 0.2  # a rarer verdict is rare below this share of the commonest rarer verdict
LOOKED_AT = 20_000  # rows that are looked at for dependence; more tell nothing new
MIN_SOURCES = 3  # fewer sources identify nothing
MIN_GROUPS = 30  # prompts with several responses before within-prompt differences are looked at
ON_RESPONSES = 0.5  # share of a channel's evidence that must hold inside a prompt
T_VALUE = 3.0  # standard errors that count as a difference


def determined(table: VerdictTable) -> list[int]:
    """Columns that the other ones determine, in the order in which they are best left out.

    R^2 of column j on the others is 1 - 1 / (S^-1)_jj with S the correlation matrix; a silence counts as 0 beside an
    indicator of it, so that "how many of the voters agree" is found out although each of them skips some responses.
    Among columns that are determined, the one most correlated with the others goes first: a count of votes goes, and
    the votes, which know who said it, stay.
    """
    values = spread_rows(table.values, LOOKED_AT)
    heard = ~np.isnan(values)
    gone: list[int] = []
    if len(values) < ROWS_PER_COLUMN * 2 * values.shape[1]:
        return gone
    filled = np.where(heard, values, 0.0)
    silent = np.unique(1.0 - heard[:, heard.any(axis=0) & ~heard.all(axis=0)], axis=1)
    while True:
        kept = [j for j in range(values.shape[1]) if j not in gone and np.ptp(filled[:, j]) > 0]
        if len(kept) < 3:
            return gone
        everything = np.column_stack([filled[:, kept], silent])
        found = np.corrcoef(everything, rowvar=False)
        explained = 1.0 - 1.0 / np.diag(np.linalg.inv(found + 1e-9 * np.eye(len(found))))[: len(kept)]
        worst = [i for i in np.flatnonzero(explained > DETERMINED) if _explained(i, kept, heard, everything)]
        if not worst:
            return gone
        mass = np.abs(found[: len(kept), : len(kept)]).mean(axis=1)
        gone.append(kept[worst[int(np.argmax(mass[worst]))]])


def spread_rows(values: np.ndarray, most: int) -> np.ndarray:
    """At most about `most` rows, evenly spread over all."""
    return values[:: max(1, len(values) // most)]


def _explained(i: int, kept: Sequence[int], heard: np.ndarray, everything: np.ndarray) -> bool:
    """Whether the other columns determine the i-th where it speaks; its own silences prove nothing."""
    rows = heard[:, kept[i]]
    target = everything[rows, i]
    others = np.column_stack([np.delete(everything[rows], i, axis=1), np.ones(int(rows.sum()))])
    if np.ptp(target) == 0 or len(target) < ROWS_PER_COLUMN * others.shape[1]:
        return False
    rest = target - others @ np.linalg.lstsq(others, target, rcond=None)[0]
    return bool(rest.var() < (1.0 - DETERMINED) * target.var())


def without(table: VerdictTable, columns: Sequence[int]) -> VerdictTable:
    """The table less these columns."""
    if not columns:
        return table
    kept = [j for j in range(len(table.names)) if j not in set(columns)]
    return replace(
        table,
        values=table.values[:, kept],
        names=tuple(table.names[j] for j in kept),
        kinds=tuple(table.kinds[j] for j in kept),
        families=tuple(table.families[j] for j in kept),
        failures=tuple(table.failures[j] for j in kept) if table.failures else (),
        whole_prompts=tuple(table.whole_prompts[j] for j in kept) if table.whole_prompts else (),
    )


def voices(table: VerdictTable, values: np.ndarray) -> np.ndarray:
    """[N, M] by verifier -> [N, S] by source: the mean of those of a family that speak.

    Verifiers of one family make the same mistakes: five of them are no five witnesses.
    """
    groups = table.sources()
    return values if len(groups) == len(table.names) else np.column_stack([row_mean(values[:, g]) for g in groups])


def pooled(table: VerdictTable) -> VerdictTable:
    """The table with one column a source, for models that know nothing of families.

    A family of votes says what most of it says, and nothing at a tie; one with a score in it is its mean verdict.
    """
    groups = table.sources()
    if len(groups) == len(table.names):
        return table
    binary = [all(table.kinds[j] == "binary" for j in g) for g in groups]
    said = voices(table, normalise(table))
    for s, group in enumerate(groups):
        if len(group) == 1:
            said[:, s] = table.values[:, group[0]]
        elif binary[s]:
            said[:, s] = np.where(said[:, s] == 0.5, np.nan, np.round(said[:, s]))
    one = [group[0] for group in groups]
    return replace(
        without(table, [j for j in range(len(table.names)) if j not in one]),
        values=said,
        kinds=tuple("binary" if b else "score" for b in binary),
    )


def learning_sets(made: Sequence[Channel], kinds: Sequence[str]) -> list[np.ndarray]:
    """[C] bool each: sets of channels that EM may form its classes from.

    Votes before scores, where there are enough: a vote is on the response, a score may well be on something else.
    Then all of those, and those less the ones whose rarer verdict is rare beside that of the others.
    """
    votes = np.array([all(kinds[j] == "binary" for j in c.columns) for c in made])
    first = votes if votes.sum() >= MIN_SOURCES else np.ones(len(made), dtype=bool)
    rare = []
    for channel in made:
        share = np.array([float(np.count_nonzero(channel.codes == level)) for level in range(len(channel.levels))])
        rare.append(1.0 - share.max() / max(share.sum(), 1.0))
    balanced = first & (np.array(rare) >= LOPSIDED * np.array(rare)[first].max())
    return [first, balanced] if MIN_SOURCES <= balanced.sum() < first.sum() else [first]


def explained_variance(
    made: Sequence[Channel], good: Sequence[np.ndarray], bad: Sequence[np.ndarray], p: float
) -> float:
    """Variance of the verdicts that the classes explain: sum over channels of p (1 - p) D^2, D the gap in mean level.

    Two classes found among rules that nearly always say the same explain little, however sure EM is of them.
    """
    gaps = [float((a - b) @ c.levels) for c, a, b in zip(made, good, bad, strict=True)]
    return p * (1.0 - p) * float(np.square(gaps).sum())


def within_prompts(channel: np.ndarray, p_good: np.ndarray, prompts: np.ndarray) -> float:
    """In [0, 1]: how much of a channel's evidence [N] holds among the responses of one prompt, by what others found.

    A channel that judges the response differs by the same D between good and bad over the round and inside a prompt:
    D = cov(evidence, p_good) / var(p_good) either way.  The factor is the ratio of the two, where it is surely below 1;
    one that is more about the prompt than about the response is not listened to.
    """
    count = np.bincount(prompts)
    several = count[prompts] > 1
    if (count > 1).sum() < MIN_GROUPS:
        return 1.0
    q, x, group = p_good[several], channel[several], prompts[several]
    inside = _slope(q - _group_means(q, group), x - _group_means(x, group))
    overall = _slope(q - q.mean(), x - x.mean())
    if overall[0] <= 0 or overall[0] - inside[0] < T_VALUE * np.hypot(inside[1], overall[1]):
        return 1.0
    factor = inside[0] / overall[0]
    return float(min(factor, 1.0)) if factor >= ON_RESPONSES else 0.0


def _group_means(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    total, count = np.bincount(group, values), np.bincount(group)
    return (total / np.maximum(count, 1))[group]


def _slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope of y on x through the origin, and its standard error."""
    scale = float(x @ x)
    if scale <= 1e-12:
        return 0.0, np.inf
    slope = float(x @ y) / scale
    return slope, float(np.sqrt(((y - slope * x) ** 2).mean() / scale))
