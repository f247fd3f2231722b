"""Answers that are right on the whole and upside down on a part: what labels can find of it.

Where most verifiers are wrong together on hard items, their votes there are those of an item with the other answer: no
statistic of the votes tells the two apart, whatever the model.  So nothing is said of it without labels.  With labels
the answer must rank a good response above a bad one inside each part too, and the parts are taken without looking at
the labels: where the verifiers disagree, where they like little, and prompt by prompt.

Legend: N samples, M verifiers.
"""

from __future__ import annotations

from math import comb

import numpy as np

from align.ensemble.base import wins
from align.ensemble.normalise import row_mean, row_spread

SURE = 2.5  # standard errors below one half; of ten parts that are ranked by a coin, chance warns once in sixteen
FIFTHS = (0.2, 0.4, 0.6, 0.8)
FEWEST = 4  # prompts with a good, and with a bad, labelled response in a part
REVERSED = -1.64  # standard errors that a prompt in twenty is below where its ranking is a coin's
BY_CHANCE = 0.05
RARE = 0.05  # chance of so many such prompts where all rankings are a coin's, which most are far above


def upside_down_in_part(
    p_good: np.ndarray, labels: np.ndarray, prompts: np.ndarray, values: np.ndarray
) -> tuple[str, ...]:
    """A sentence for each part of the labelled samples (1, 0, NaN [N]) that P(good) [N] surely ranks the wrong way.

    P(good) must not have seen the label that it is held against; `values` [N, M] are the normalised verdicts.
    """
    rows = np.flatnonzero(~(np.isnan(labels) | np.isnan(p_good)))
    if not len(rows):
        return ()
    p, y, group = p_good[rows], labels[rows], np.unique(prompts[rows], return_inverse=True)[1]
    mean = np.nan_to_num(row_mean(values), nan=0.5)
    _, place = np.unique(prompts, return_inverse=True)
    liked = (np.bincount(place, mean) / np.bincount(place))[place][rows]
    spread = np.nan_to_num(row_spread(values))[rows]
    said = []
    for name, feature in (("a spread of verdicts of", spread), ("a mean verdict on the prompt of", liked)):
        fifth = np.searchsorted(np.unique(np.quantile(feature, FIFTHS)), feature)
        for k in np.unique(fifth):
            inside = fifth == k
            share, error = _ranking(p[inside], y[inside], group[inside])
            if share < 0.5 - SURE * error:
                low, high = feature[inside].min(), feature[inside].max()
                said.append(
                    f"upside down in part: of the {inside.sum()} labelled responses with {name} {low:.2f} to "
                    f"{high:.2f} a good one stands above a bad one only {share:.0%} of the time"
                )
    against, several = _reversed_prompts(p, y, group)
    if several and _at_least(against, several, BY_CHANCE) < RARE:
        said.append(
            f"upside down in part: on {against} of {several} labelled prompts bad responses stand above good ones, "
            "more than chance explains; verifiers that fail together on hard prompts look right without labels"
        )
    return tuple(said)


def _ranking(p: np.ndarray, y: np.ndarray, group: np.ndarray) -> tuple[float, float]:
    """Chance that a good one stands above a bad one, and its standard error for a coin, over prompts."""
    good, bad = p[y == 1], p[y == 0]
    a, b = len(np.unique(group[y == 1])), len(np.unique(group[y == 0]))
    if min(a, b) < FEWEST:
        return 0.5, np.inf
    return float(wins(good, bad).mean()), _coin_error(a, b)


def _coin_error(good: int, bad: int) -> float:
    """Standard error of the share of so many good ones above so many bad ones that a coin ranks (Mann-Whitney)."""
    return float(np.sqrt((good + bad + 1) / (12 * good * bad)))


def _reversed_prompts(p: np.ndarray, y: np.ndarray, group: np.ndarray) -> tuple[int, int]:
    """Prompts that are ranked the wrong way round beyond REVERSED, and prompts that could be."""
    against = several = 0
    for prompt in range(int(group.max()) + 1):
        inside = group == prompt
        good, bad = p[inside & (y == 1)], p[inside & (y == 0)]
        a, b = len(good), len(bad)
        if not a or not b or 0.5 / _coin_error(a, b) < -REVERSED:
            continue
        several += 1
        against += (float(wins(good, bad).mean()) - 0.5) / _coin_error(a, b) < REVERSED
    return int(against), several


def _at_least(count: int, of: int, chance: float) -> float:
    """Binomial chance of `count` or more `of`."""
    return sum(comb(of, k) * chance**k * (1.0 - chance) ** (of - k) for k in range(count, of + 1))
