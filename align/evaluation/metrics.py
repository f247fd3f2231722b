"""Evaluation figures with intervals: ratios of per-prompt sums, bootstrapped over prompts.

Prompts are resampled, not responses, because the responses to one prompt are alike.

Legend: N samples, P prompts, K metrics, B resamples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from align.recipe import Evaluation
from align.records import Sample, Verdict, content_id
from align.verifiers.registry import kind_of

BLOCK = 2_000_000  # resampled counts held at once


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its percentile interval.

    Example: Estimate(0.44, 0.40, 0.48)
    """

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def pass_at_k(n: np.ndarray, c: np.ndarray, k: int) -> np.ndarray:
    """[P]: the chance that k of a prompt's n responses, drawn without replacement, hold one of its c right ones.

    1 - C(n-c, k) / C(n, k), the unbiased estimator of Chen et al., "Evaluating Large Language Models Trained on Code"
    (2021), as the product of 1 - c / (n - i) over i < k.  Needs n >= k.

    Example: n = 4, c = 1, k = 2 gives 1/2.
    """
    n, c = np.asarray(n, dtype=float), np.asarray(c, dtype=float)
    if (n < k).any() or (c > n).any() or (c < 0).any():
        raise ValueError(f"pass@{k} needs 0 <= c <= n and n >= {k}")
    miss = np.ones_like(n)
    for i in range(k):
        miss *= np.maximum(n - c - i, 0.0) / (n - i)
    return 1.0 - miss


def bootstrap(numerator: np.ndarray, denominator: np.ndarray, settings: Evaluation, seed: int) -> list[Estimate]:
    """Sum of numerator / sum of denominator, [P, K] each, with percentile intervals over resampled prompts.

    A metric whose denominator is 0 everywhere has value NaN; in a resample it is left out.
    """
    prompts, metrics = numerator.shape
    rng = np.random.default_rng(seed)
    ratios = np.empty((settings.bootstrap, metrics))
    rows = max(1, BLOCK // max(prompts, 1))
    for start in range(0, settings.bootstrap, rows):
        some = min(rows, settings.bootstrap - start)
        counts = rng.multinomial(prompts, np.full(prompts, 1.0 / prompts), size=some).astype(float)
        ratios[start : start + some] = _ratio(counts @ numerator, counts @ denominator)
    values = _ratio(numerator.sum(axis=0), denominator.sum(axis=0))
    tail = (1.0 - settings.confidence) / 2
    found = []
    for k in range(metrics):
        draws = ratios[~np.isnan(ratios[:, k]), k]
        low, high = np.quantile(draws, [tail, 1.0 - tail]) if len(draws) else (np.nan, np.nan)
        found.append(Estimate(float(values[k]), float(low), float(high)))
    return found


def evaluate(
    samples: Sequence[Sample],
    verdicts: Sequence[Verdict],
    gold: Sequence[Verdict] | None,
    stats: Mapping[str, Sequence[float]],
    settings: Evaluation,
    names: Sequence[str],
) -> dict[str, dict[str, float]]:
    """Metric name -> {"value", "low", "high"}, over the held-out samples; `names` are the recipe's verifiers.

    `length`            mean response length, tokens
    `truncated`         share of responses that hit max_new_tokens
    `verifier/<name>`   mean verdict over the responses that the verifier judged (yes share, or raw score)
    `coverage/<name>`   share of responses that it judged
    `accuracy`          share of right responses by a binary gold verifier, among those it judged
    `pass@<k>`          chance that k responses hold a right one, over prompts with k judged responses
    `gold/<name>`       mean verdict of a gold verifier that gives scores
    `gold_coverage`     share of responses that the gold verifier judged
    and the mean of each of `stats` (one number per sample, NaN where unknown): `kl` nats per response, `entropy`
    nats per token.

    A metric that nothing was measured for is absent.  The resamples are seeded by the sample ids, and so
    by the recipe's seed.
    """
    if not samples:
        raise ValueError("nothing to evaluate: no samples")
    sums = _Sums(samples)
    sums.add("length", np.array([len(s.response_ids) for s in samples], dtype=float))
    sums.add("truncated", np.array([s.finish_reason == "length" for s in samples], dtype=float))
    by_name: dict[str, list[Verdict]] = {name: [] for name in names}
    for verdict in verdicts:
        if verdict.verifier not in by_name:
            raise ValueError(f"a verdict of {verdict.verifier!r}, which is not among the verifiers {list(names)}")
        by_name[verdict.verifier].append(verdict)
    for name, said in by_name.items():
        values = sums.values_of(said)
        sums.add(f"verifier/{name}", values)
        sums.add(f"coverage/{name}", (~np.isnan(values)).astype(float))
    if gold is not None:
        assert settings.gold is not None
        values = sums.values_of(gold)
        sums.add("gold_coverage", (~np.isnan(values)).astype(float))
        if kind_of(settings.gold) == "binary":
            sums.add_accuracy(values, settings.k)
        else:
            sums.add(f"gold/{settings.gold.name}", values)
    for name, numbers in stats.items():
        sums.add(name, np.asarray(numbers, dtype=float))
    seed = int(content_id(*sums.row), 16)
    estimates = bootstrap(np.column_stack(sums.above), np.column_stack(sums.below), settings, seed)
    found = zip(sums.names, estimates, strict=True)
    return {name: estimate.as_dict() for name, estimate in found if not np.isnan(estimate.value)}


class _Sums:
    """Per-prompt numerators and denominators, gathered metric by metric."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.row = {sample.id: i for i, sample in enumerate(samples)}
        number: dict[str, int] = {}
        self.prompt = np.array([number.setdefault(s.prompt_id, len(number)) for s in samples])
        self.prompts = len(number)
        self.names: list[str] = []
        self.above: list[np.ndarray] = []
        self.below: list[np.ndarray] = []

    def values_of(self, verdicts: Sequence[Verdict]) -> np.ndarray:
        """[N] in the samples' order; NaN where there is no verdict."""
        judged = Counter(verdict.sample_id for verdict in verdicts)
        odd = [key for key, count in judged.items() if count > 1 or key not in self.row]
        if odd:
            raise ValueError(f"verdicts on no sample, or two of one verifier on the same: {odd[:3]}")
        values = np.full(len(self.row), np.nan)
        for verdict in verdicts:
            if verdict.value is not None:
                values[self.row[verdict.sample_id]] = verdict.value
        return values

    def add(self, name: str, values: np.ndarray) -> None:
        """A mean over samples: values [N], NaN left out."""
        if len(values) != len(self.row):
            raise ValueError(f"{name}: {len(values)} values for {len(self.row)} samples")
        present = ~np.isnan(values)
        self._append(name, self._sum(np.where(present, values, 0.0)), self._sum(present))

    def add_accuracy(self, right: np.ndarray, ks: Sequence[int]) -> None:
        """`accuracy` and `pass@k` from right [N] of 0, 1 and NaN; pass@k is a mean over prompts."""
        self.add("accuracy", right)
        judged, correct = self._sum(~np.isnan(right)), self._sum(np.nan_to_num(right))
        for k in ks:
            enough = judged >= k
            value = np.zeros(self.prompts)
            value[enough] = pass_at_k(judged[enough], correct[enough], k)
            self._append(f"pass@{k}", value, enough.astype(float))

    def _sum(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self.prompt, values, self.prompts)

    def _append(self, name: str, above: np.ndarray, below: np.ndarray) -> None:
        if name in self.names:
            raise ValueError(f"metric {name!r} is measured twice")
        self.names.append(name)
        self.above.append(above)
        self.below.append(below)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)
