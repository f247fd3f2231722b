"""Signs that an ensemble should not be believed, all computed without a label.

Legend: N samples, M verifiers, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from align.ensemble.channels import Channel
from align.ensemble.jury import correlation, correlations_with
from align.ensemble.normalise import normalise, row_mean
from align.ensemble.table import VerdictTable

LOOKED_AT = 20_000  # rows on which correlations are taken
EDGE = 0.03  # share of the responses on one side of one half that counts as none
AGAINST = 0.05  # correlation below minus which a verifier contradicts the answer
MIN_VARIANCE = 0.02  # of a vote: at least 2% say the rarer thing


def near_constant(table: VerdictTable, rare: float = 0.005) -> tuple[str, ...]:
    """A sentence for each verifier that says (nearly) the same of every response, or hardly ever says anything."""
    said = []
    for j, name in enumerate(table.names):
        column = table.values[:, j]
        if table.kinds[j] == "binary":
            counts = np.array([np.count_nonzero(column == vote) for vote in (0, 1)])
        else:
            counts = np.unique(column[~np.isnan(column)], return_counts=True)[1]
        if not counts.sum():
            said.append(f"{name} gave no verdict at all")
            continue
        most = counts.max() / counts.sum()
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


def residual_correlations(
    table: VerdictTable, votes: np.ndarray, balance: float, tpr: np.ndarray, tnr: np.ndarray
) -> np.ndarray:
    """[M, M]: correlation of two verifiers that the classes do not explain; 0 in a family and on the diagonal.

    Given the class, votes should be independent, and then Cov(i, j) = pi (1 - pi) D_i D_j with D = TPR + TNR - 1.
    Verifiers that nearly always say the same are left out: there is nothing to correlate.
    """
    votes = votes[:: max(1, len(votes) // LOOKED_AT)]
    heard = (~np.isnan(votes)).astype(float)
    yes = np.nan_to_num(votes)
    both = heard.T @ heard  # [M, M] responses that both judged
    with np.errstate(invalid="ignore", divide="ignore"):
        first = yes.T @ heard / both  # [M, M] how often i says yes where j speaks
        covariance = yes.T @ yes / both - first * first.T
        spread = np.sqrt(first * (1.0 - first))
        power = tpr + tnr - 1.0
        left_over = (covariance - balance * (1.0 - balance) * np.outer(power, power)) / (spread * spread.T)
    family = np.array([name or str(j) for j, name in enumerate(table.families)])
    left_over[(family[:, None] == family[None, :]) | ~(spread * spread.T > MIN_VARIANCE)] = 0.0
    return np.clip(left_over, -1.0, 1.0)


def residual_dependence(
    table: VerdictTable, votes: np.ndarray, balance: float, tpr: np.ndarray, tnr: np.ndarray
) -> tuple[float, str, str]:
    """The largest |residual correlation| between two verifiers of different families, and their names."""
    left_over = np.abs(residual_correlations(table, votes, balance, tpr, tnr))
    i, j = np.unravel_index(int(left_over.argmax()), left_over.shape)
    return float(left_over[i, j]), table.names[int(i)], table.names[int(j)]


def effective_number(residual: np.ndarray, count: int) -> float:
    """M^2 / sum r^2 with r the residual correlations [M, M] of verifiers, 1 with themselves, less what chance gives.

    M where their errors are independent, 1 where they all say the same; `count` responses give r^2 of 1 / count by
    chance.
    """
    square = np.maximum(residual**2 - 1.0 / max(count, 1), 0.0)
    np.fill_diagonal(square, 1.0)
    return float(len(residual) ** 2 / square.sum())


def collapsed(p_good: np.ndarray, balance: float | None) -> tuple[str, ...]:
    """A sentence where nearly every response ends on one side of one half although no class balance explains it."""
    known = p_good[~np.isnan(p_good)]
    if not len(known):
        return ("no response has a verdict",)
    share = float((known > 0.5).mean())
    if EDGE < share < 1.0 - EDGE or (balance is not None and abs(share - balance) < 0.1):
        return ()
    side = "good" if share > 0.5 else "not good"
    return (f"collapse: {max(share, 1 - share):.1%} of the responses come out {side}; the cut at one half says little",)


def two_camps(names: Sequence[str], values: np.ndarray, p_good: np.ndarray, mean: np.ndarray) -> tuple[str, ...]:
    """Sentences where the answer may be upside down: it contradicts the mean verdict, or a large camp does so.

    `values` [N, M] are the normalised verdicts.
    """
    said = []
    if correlation(p_good, mean) < 0:
        said.append("upside down: the answer contradicts the mean verdict, so good and bad may be swapped")
    found = correlations_with(values, p_good)
    surely = max(AGAINST, 2.0 / np.sqrt(max(len(p_good), 1)))
    below = [name for name, r in zip(names, found, strict=True) if r < -surely]
    if below and len(below) * 4 >= len(names):
        told = ", ".join(below[:6]) + (" …" if len(below) > 6 else "")
        said.append(
            f"two camps: {told} contradict the answer; if they are the ones that are right, it is upside down, "
            "and only labels can tell"
        )
    return tuple(said)


def support_of_others(
    table: VerdictTable, made: Sequence[Channel], said: Sequence[np.ndarray], p_good: np.ndarray, learnt: np.ndarray
) -> tuple[int, float]:
    """One column of the leading channel, and how well the verifiers that are not its kin bear the fit out.

    `said` [C] of [levels + 1] is what each level of a channel says in log-odds, and last its silence; `learnt` [C]
    marks the channels that the fit was made from; only those are asked.

    EM can take an error that a few verifiers share for the answer; "good" is then what one channel says, and only its
    kin agree.  So the leader (the channel that separates the classes most) and the family most correlated with it
    are set aside, and the support is the distance between good and bad in the mean verdict of the rest, in
    standard deviations within a class (d').  The same distance with every verifier in is taken too and the smaller
    one returned: a fit against the consensus is no better.

    In simulated sums judged by seven verifiers, 1% to 99% right, with and without declared families, 71 of 234 fits
    were worse than the mean; the largest support among them was 0.33.
    """
    good = np.nan_to_num(p_good)
    bad = (~np.isnan(p_good)).astype(float) - good
    apart = good / max(good.sum(), 1e-12) - bad / max(bad.sum(), 1e-12)
    parts = np.array([float(apart @ levels[c.codes]) for c, levels in zip(made, said, strict=True)])
    leader = made[int(np.argmax(np.where(learnt, parts, -np.inf)))].columns[0]
    asked = [j for channel, heard in zip(made, learnt, strict=True) if heard for j in channel.columns]
    values = normalise(table)
    some = values[:: max(1, len(values) // LOOKED_AT)]
    names = _source_names(table)
    if len(set(names)) < 2:
        return leader, 0.0
    aside = {names[leader], names[_closest_kin(some, names, leader)]}
    rest = [j for j in asked if names[j] not in aside]
    support = min(_separation(row_mean(values, columns), good, bad) for columns in (rest, asked))
    return leader, support


def join_kin(table: VerdictTable, leader: int) -> VerdictTable:
    """The table with the leader's family grown by the family, or lone verifier, most correlated with it."""
    names = _source_names(table)
    joined = {names[leader], names[_closest_kin(normalise(table), names, leader)]}
    label = " + ".join(sorted(joined))
    families = tuple(label if n in joined else f for n, f in zip(names, table.families, strict=True))
    return replace(table, families=families)


def _source_names(table: VerdictTable) -> list[str]:
    """[M]: the family of each verifier, or a name of its own."""
    return [family or f"({name} alone)" for family, name in zip(table.families, table.names, strict=True)]


def _closest_kin(values: np.ndarray, names: Sequence[str], leader: int) -> int:
    """The column outside the leader's family that is most correlated with any in it."""
    inside = [j for j, name in enumerate(names) if name == names[leader]]
    outside = [j for j, name in enumerate(names) if name != names[leader]]
    return max(outside, key=lambda j: max(_correlation(values[:, i], values[:, j]) for i in inside))


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
