"""How often to sample again when a verifier that can be wrong decides what is kept, and how right that can get.

A response is drawn, the ensemble accepts or rejects it, and after a rejection another one is drawn, up to K.  Prompts
differ: class z has weight w_z and a chance p_z that one response is good; the ensemble accepts a good response with
chance t and a bad one with chance f.  With reward 1 for a good response kept, -c for a bad one and -kappa per sample,

    reject_z = 1 - p_z t - (1 - p_z) f
    V(K) = sum over k <= K and z of w_z reject_z^(k-1) (p_z t - c (1 - p_z) f - kappa)

(Stroebl, Kapoor, Narayanan, "The Limits of Inference Scaling Through Resampling").  What was rejected is likelier to be
a hard prompt, so later acceptances are worse, and there is a best K.  No number of samples brings the share of good
responses among those kept beyond a ceiling that t and f set.

Legend: N samples, P prompts, Z classes of prompts, K samples of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

COSTS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""What a bad response that is kept costs, in good ones."""
THRESHOLD = 0.5  # a response is kept from this P(good) on
MOST_SAMPLES = 1000  # a best K beyond this is called unlimited
ONE_SIDED = 1.6449  # standard errors of a 95% limit on one side
NODES = 24  # classes that stand for a Beta distribution; sums of up to 47 samples are exact
ODDS_SHOWN = 8


@dataclass(frozen=True)
class Difficulty:
    """How hard the prompts are.

    Example: Difficulty(weight=np.array([0.58, 0.42]), success=np.array([0.87, 0.13]))
    """

    weight: np.ndarray  # [Z] sums to 1
    success: np.ndarray  # [Z] chance that one response is good


@dataclass(frozen=True)
class Rates:
    """How the ensemble accepts, with a cautious limit of each rate.

    Example: Rates(tpr=0.9, fpr=0.2, tpr_low=0.87, fpr_high=0.23)
    """

    tpr: float  # P(accepted | good)
    fpr: float  # P(accepted | bad)
    tpr_low: float  # lower 95% limit
    fpr_high: float  # upper 95% limit


def rejection(prompts: Difficulty, tpr: float, fpr: float) -> np.ndarray:
    """[Z]: the chance that one response is rejected."""
    return 1.0 - prompts.success * tpr - (1.0 - prompts.success) * fpr


def gains(prompts: Difficulty, tpr: float, fpr: float, cost: float, per_sample: float, most: int) -> np.ndarray:
    """[K]: what the k-th sample adds to V, for k = 1 … most."""
    gain = prompts.success * tpr - cost * (1.0 - prompts.success) * fpr - per_sample
    reach = rejection(prompts, tpr, fpr)[:, None] ** np.arange(most)
    return (prompts.weight * gain) @ reach


def best_samples(
    prompts: Difficulty, tpr: float, fpr: float, cost: float, per_sample: float = 0.0, most: int = MOST_SAMPLES
) -> tuple[int, float]:
    """(K*, V(K*)): the number of samples of largest value, the fewest of equals; (0, 0.0) where none is worth it.

    K* = `most` says that there is no end within `most`.
    """
    values = np.cumsum(gains(prompts, tpr, fpr, cost, per_sample, most))
    top = float(values.max())
    if top <= 0:
        return 0, 0.0
    best = int(np.argmax(values)) + 1
    falls = np.flatnonzero(_signs(prompts, tpr, fpr, cost, per_sample, most)[best:] <= 0)  # past what a float can tell
    return (best + int(falls[0]) if len(falls) else most), top


def enough_samples(prompts: Difficulty, tpr: float, fpr: float, cost: float, share: float = 0.99) -> int:
    """The fewest samples that bring `share` of the largest value; 0 where none is worth it."""
    values = np.cumsum(gains(prompts, tpr, fpr, cost, 0.0, MOST_SAMPLES))
    return int(np.argmax(values >= share * values.max())) + 1 if values.max() > 0 else 0


def _signs(prompts: Difficulty, tpr: float, fpr: float, cost: float, per_sample: float, most: int) -> np.ndarray:
    """[K]: `gains` times a positive factor each, so that its sign is known where the gain itself rounds to nothing."""
    gain = prompts.success * tpr - cost * (1.0 - prompts.success) * fpr - per_sample
    reject = rejection(prompts, tpr, fpr)
    reach = (reject / max(float(reject.max()), 1e-300))[:, None] ** np.arange(most)
    return (prompts.weight * gain) @ reach


def precision(prompts: Difficulty, tpr: float, fpr: float, samples: int | None) -> float:
    """Share of good responses among those kept with up to `samples` tries; None: as many as it takes.

    For one class this is p t / (p t + (1 - p) f) whatever the number.  NaN where nothing is ever accepted.
    """
    good, bad = prompts.success * tpr, (1.0 - prompts.success) * fpr
    accepted = good + bad
    if samples is None:
        tries = np.divide(1.0, accepted, out=np.zeros_like(accepted), where=accepted > 0)
    else:
        reject = 1.0 - accepted
        tries = np.where(accepted > 0, (1.0 - reject**samples) / np.where(accepted > 0, accepted, 1.0), 0.0)
    kept = float(prompts.weight @ (tries * accepted))
    return float(prompts.weight @ (tries * good)) / kept if kept > 0 else float("nan")


def acceptance_odds(prompts: Difficulty, tpr: float, fpr: float, attempts: int) -> np.ndarray:
    """[attempts]: odds good to bad of a response accepted at the k-th try, after k - 1 rejections.

    Try again as long as these odds exceed the cost of a bad response.
    """
    reach = prompts.weight[:, None] * rejection(prompts, tpr, fpr)[:, None] ** np.arange(attempts)
    good, bad = (prompts.success * tpr) @ reach, ((1.0 - prompts.success) * fpr) @ reach
    return np.divide(good, bad, out=np.full(attempts, np.inf), where=bad > 0)


def estimate_rates(p_good: np.ndarray, prompts: np.ndarray, threshold: float = THRESHOLD) -> Rates:
    """Rates of "P(good) >= threshold" on [N] samples of the prompts [N], where each counts as good with P(good).

    t = sum q 1[q >= threshold] / sum q, f the same with 1 - q.  The limits are 1.645 standard errors of a ratio of
    sums over prompts, because responses to one prompt are alike.  They say how well the sums are known, not whether
    P(good) is calibrated.
    """
    known = ~np.isnan(p_good)
    q, group = p_good[known], np.unique(prompts[known], return_inverse=True)[1]
    yes = (q >= threshold).astype(float)
    tpr, tpr_error = _ratio(q * yes, q, group)
    fpr, fpr_error = _ratio((1.0 - q) * yes, 1.0 - q, group)
    return Rates(tpr, fpr, max(0.0, tpr - ONE_SIDED * tpr_error), min(1.0, fpr + ONE_SIDED * fpr_error))


def _ratio(above: np.ndarray, below: np.ndarray, group: np.ndarray) -> tuple[float, float]:
    """Sum of above / sum of below, and its standard error over groups; NaN where there is nothing below."""
    if not len(below) or below.sum() <= 0:
        return float("nan"), float("nan")
    value = float(above.sum() / below.sum())
    left_over = np.bincount(group, above) - value * np.bincount(group, below)
    count = len(left_over)
    correction = count / (count - 1) if count > 1 else 1.0
    return value, float(np.sqrt(correction * (left_over**2).sum()) / below.sum())


def fit_difficulty(p_good: np.ndarray, prompts: np.ndarray) -> Difficulty:
    """A Beta distribution of the prompts' success chances, fitted to P(good) [N] by its first two moments.

    For two responses of one prompt E[y y'] = E[p^2], and q q' is what the verdicts expect of y y'; so the spread
    of p is sum of q q' over pairs / number of pairs - mean^2, the beta-binomial's moment estimate with soft labels.
    Where no prompt has two responses, or they spread no more than chance, all prompts are one class.
    """
    known = ~np.isnan(p_good)
    q, group = p_good[known], np.unique(prompts[known], return_inverse=True)[1]
    if not len(q):
        raise ValueError("no response has a P(good)")
    size, total = np.bincount(group).astype(float), np.bincount(group, q)
    pairs = float((size * (size - 1)).sum())
    if pairs == 0:
        return Difficulty(np.ones(1), np.array([q.mean()]))
    mean = float(((size - 1) * total).sum()) / pairs
    second = float((total**2 - np.bincount(group, q * q)).sum()) / pairs
    spread = (second - mean**2) / max(mean * (1.0 - mean), 1e-12)
    if not 1e-3 < spread < 1.0 or not 0.0 < mean < 1.0:
        return Difficulty(np.ones(1), np.array([mean]))
    strength = 1.0 / min(spread, 0.98) - 1.0
    return beta_classes(mean * strength, (1.0 - mean) * strength)


def beta_classes(a: float, b: float, nodes: int = NODES) -> Difficulty:
    """Beta(a, b) as classes that give the same mean for every polynomial of degree below 2 `nodes`.

    Gauss-Jacobi nodes and weights as eigenvalues and eigenvectors of the recurrence (Golub and Welsch, 1969).
    """
    k = np.arange(1, nodes, dtype=float)
    alpha, beta = b - 1.0, a - 1.0
    s = 2.0 * k + alpha + beta
    diagonal = np.append((beta - alpha) / (alpha + beta + 2.0), (beta**2 - alpha**2) / (s * (s + 2.0)))
    square = 4.0 * k * (k + alpha) * (k + beta) / (s**2 * (s + 1.0))
    square[1:] *= (k[1:] + alpha + beta) / (s[1:] - 1.0)  # for k = 1 the two cancel, also where both are 0
    side = np.sqrt(square)
    values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(side, 1) + np.diag(side, -1))
    return Difficulty(vectors[0] ** 2, np.clip((values + 1.0) / 2.0, 0.0, 1.0))


def plan_resampling(p_good: np.ndarray, prompts: np.ndarray, threshold: float = THRESHOLD) -> dict[str, Any] | None:
    """What P(good) [N] of a round says of sampling again; None where nothing was judged good or nothing bad.

    `tpr`, `fpr`          how the ensemble accepts, estimated; `tpr_low` and `fpr_high` their cautious 95% limits
    `pass_rate`, `spread` mean chance that a response is good, and the correlation of two responses to one prompt
    `ceiling`             most that precision reaches however often one samples, at the rates; `ceiling_cautious` at
                          their limits
    `precision_once`      precision with one try
    `best`                for each `cost` of a bad response that is kept, in good ones: K* (`samples`), its `value` and
                          `precision`, all at the cautious limits; `enough` samples bring 99% of the value;
                          `unlimited` where more is always better
    `odds`                good to bad at each try, at the cautious limits: stop where they fall below the cost
    """
    rates = estimate_rates(p_good, prompts, threshold)
    if math.isnan(rates.tpr) or math.isnan(rates.fpr):
        return None
    classes = fit_difficulty(p_good, prompts)
    mean = float(classes.weight @ classes.success)
    variance = float(classes.weight @ (classes.success - mean) ** 2)
    t, f = rates.tpr_low, rates.fpr_high
    best = []
    for cost in COSTS:
        count, worth = best_samples(classes, t, f, cost)
        found = precision(classes, t, f, count) if count else None
        best.append(
            {
                "cost": cost,
                "samples": count,
                "enough": enough_samples(classes, t, f, cost),
                "value": worth,
                "precision": found,
                "unlimited": count == MOST_SAMPLES,
            }
        )
    return {
        "threshold": threshold,
        "tpr": rates.tpr,
        "fpr": rates.fpr,
        "tpr_low": t,
        "fpr_high": f,
        "pass_rate": mean,
        "spread": variance / (mean * (1.0 - mean)) if 0.0 < mean < 1.0 else 0.0,
        "ceiling": precision(classes, rates.tpr, rates.fpr, None),
        "ceiling_cautious": precision(classes, t, f, None),
        "precision_once": precision(classes, rates.tpr, rates.fpr, 1),
        "best": best,
        "odds": acceptance_odds(classes, t, f, ODDS_SHOWN).tolist(),
    }


def render(found: Mapping[str, Any], source: str) -> list[str]:
    """A plan of `plan_resampling` as lines; `source` says where its rates come from."""
    lines = [
        f"Sampling again until P(good) is {found['threshold']:g} or more ({source})",
        f"  keeps {found['tpr']:.1%} of the good responses (at least {found['tpr_low']:.1%}) and {found['fpr']:.1%} of "
        f"the bad (at most {found['fpr_high']:.1%}); {found['pass_rate']:.1%} of the responses are good",
        f"  right among those kept: {_share(found['precision_once'])} with one try; however many tries, at most "
        f"{_share(found['ceiling'])} ({_share(found['ceiling_cautious'])} at the cautious rates)",
    ]
    lines.append("  best number of tries K*, by what a bad response kept costs in good ones:")
    lines += [f"    cost {row['cost']:g}: {_advice(row)}" for row in found["best"]]
    odds = ", ".join("no bad" if value is None or value > 1e6 else f"{value:.3g}" for value in found["odds"])
    lines.append(f"  odds good to bad at try 1, 2, …: {odds}; stop where they fall below the cost")
    return lines


def _share(value: float | None) -> str:
    """A share in percent; where nothing is ever kept there is none."""
    return "unknown, as nothing is kept" if value is None or math.isnan(value) else f"{value:.1%}"


def _advice(row: Mapping[str, Any]) -> str:
    if not row["samples"]:
        return "none, what this ensemble accepts is not worth keeping"
    best = "no end, more is always better" if row["unlimited"] else f"{row['samples']}"
    return f"{best}; {row['enough']} bring 99% of {row['value']:.3f} a prompt, {_share(row['precision'])} right"


def best_of(scores: Sequence[float], truth: Sequence[float]) -> list[float]:
    """Chance that the highest-scored of n responses is good, for n = 1 … all, over every subset of one prompt's.

    With scores sorted, the r-th of G is the best of n drawn without replacement with chance C(r-1, n-1) / C(G, n).
    Of equal scores each is as likely to be taken.  Unlike accepting at a threshold this may fall as n grows.
    """
    order = np.argsort(scores, kind="stable")
    score, good = np.asarray(scores, dtype=float)[order], np.asarray(truth, dtype=float)[order]
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    good = (np.bincount(inverse, good) / counts)[inverse]
    rank, size = np.arange(len(score), dtype=float), len(score)
    chance = np.full(size, 1.0 / max(size, 1))
    found = []
    for n in range(1, size + 1):
        found.append(float(chance @ good))
        # C(r-1, n) / C(G, n+1) from C(r-1, n-1) / C(G, n)
        chance = chance * (rank - n + 1) / n * (n + 1) / max(size - n, 1)
    return found
