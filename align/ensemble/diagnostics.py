"""Signs that an ensemble should not be believed, all computed without a label.

Legend: N samples, M verifiers, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from align.ensemble.channels import Channel
from align.ensemble.normalise import normalise, row_mean
from align.ensemble.table import VerdictTable

MIN_VARIANCE = 0.02  # of a vote: at least 2% say the rarer thing


def near_constant(table: VerdictTable, rare: float = 0.005) -> tuple[str, ...]:
    """A sentence for each verifier that says (nearly) the same of every response, or hardly ever says anything."""
    said = []
    for j, name in enumerate(table.names):
        heard = table.values[:, j][~np.isnan(table.values[:, j])]
        if not len(heard):
            said.append(f"{name} gave no verdict at all")
            continue
        most = np.unique(heard, return_counts=True)[1].max() / len(heard)
        if most > 1.0 - rare:
            said.append(f"{name} said the same of {most:.1%} of the responses and hardly tells them apart")
    return tuple(said)


def worse_than_chance(names: Sequence[str], tpr: np.ndarray, tnr: np.ndarray) -> tuple[str, ...]:
    """A sentence where most verifiers look worse than a coin, which means that the fit stands upside down."""
    below = [name for name, a, b in zip(names, tpr, tnr, strict=True) if a + b < 1.0]
    if len(below) * 2 > len(names):
        said = f"most verifiers come out worse than chance ({', '.join(below)}), so good and bad may be swapped"
        return (f"upside down: {said}",)
    return ()


def residual_dependence(
    table: VerdictTable, votes: np.ndarray, balance: float, tpr: np.ndarray, tnr: np.ndarray
) -> tuple[float, str, str]:
    """The largest |correlation - explained correlation| between two verifiers of different families, and their names.

    Given the class, votes should be independent, and then Cov(i, j) = pi (1 - pi) D_i D_j with D = TPR + TNR - 1.
    Verifiers that nearly always say the same are left out: there is nothing to correlate.
    """
    heard = (~np.isnan(votes)).astype(float)
    yes = np.nan_to_num(votes)
    both = heard.T @ heard  # [M, M] responses that both judged
    with np.errstate(invalid="ignore", divide="ignore"):
        first = yes.T @ heard / both  # [M, M] how often i says yes where j speaks
        covariance = yes.T @ yes / both - first * first.T
        spread = np.sqrt(first * (1.0 - first))
        power = tpr + tnr - 1.0
        left_over = np.abs(covariance - balance * (1.0 - balance) * np.outer(power, power)) / (spread * spread.T)
    family = np.array([name or str(j) for j, name in enumerate(table.families)])
    left_over[(family[:, None] == family[None, :]) | ~(spread * spread.T > MIN_VARIANCE)] = 0.0
    left_over = np.minimum(left_over, 1.0)
    i, j = np.unravel_index(int(left_over.argmax()), left_over.shape)
    return float(left_over[i, j]), table.names[int(i)], table.names[int(j)]


def support_of_others(
    table: VerdictTable, made: Sequence[Channel], evidence: np.ndarray, p_good: np.ndarray
) -> tuple[int, float]:
    """One column of the leading channel, and how well the other verifiers bear the fit out.

    The support is the distance between good and bad in the mean of all verdicts but the leader's, in standard
    deviations within a class (d').  EM can take an error that a few verifiers share for the answer; "good" is then
    what one channel says, and the rest know nothing of it.  In simulated sums with seven verifiers such fits had
    support below 0.75 and sound ones above, from 15% to 99% good.  The leader is the channel that separates the
    classes most.  The same distance with every verifier in is taken too and the smaller one returned: a fit against
    the consensus is no better.
    """
    good = np.nan_to_num(p_good)
    bad = (~np.isnan(p_good)).astype(float) - good
    apart = good / max(good.sum(), 1e-12) - bad / max(bad.sum(), 1e-12)
    leader = int(np.argmax(apart @ evidence))
    values = normalise(table)
    others = [j for c, channel in enumerate(made) if c != leader for j in channel.columns]
    everyone = list(range(len(table.names)))
    support = min(_separation(row_mean(values[:, columns]), good, bad) for columns in (others, everyone))
    return made[leader].columns[0], support


def join_kin(table: VerdictTable, leader: int) -> VerdictTable:
    """The table with the leader's family grown by the verifier outside it that is most correlated, with its family."""
    values = normalise(table)
    names = [family or f"({name} alone)" for family, name in zip(table.families, table.names, strict=True)]
    inside = [j for j, name in enumerate(names) if name == names[leader]]
    outside = [j for j, name in enumerate(names) if name != names[leader]]
    kin = max(outside, key=lambda j: max(_correlation(values[:, i], values[:, j]) for i in inside))
    joined = {names[leader], names[kin]}
    label = " + ".join(sorted(joined))
    families = tuple(label if n in joined else f for n, f in zip(names, table.families, strict=True))
    return replace(table, families=families)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """|correlation| over the responses that both judged; 0 where it is not defined."""
    both = ~(np.isnan(a) | np.isnan(b))
    if not both.any():
        return 0.0
    a, b = a[both] - a[both].mean(), b[both] - b[both].mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return abs(float(a @ b)) / scale if scale > 0 else 0.0


def _separation(values: np.ndarray, good: np.ndarray, bad: np.ndarray) -> float:
    """(mean of the good - mean of the bad) / standard deviation within a class, with weights [N]."""
    present = ~np.isnan(values)
    values, good, bad = values[present], good[present], bad[present]
    if good.sum() <= 0 or bad.sum() <= 0:
        return 0.0
    means = [float(w @ values / w.sum()) for w in (good, bad)]
    within = sum(float(w @ (values - m) ** 2) for w, m in zip((good, bad), means, strict=True)) / (good + bad).sum()
    gap = means[0] - means[1]
    return float(gap / within**0.5 if within > 0 else np.sign(gap) * 99.0)
