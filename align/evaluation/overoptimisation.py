"""Over-optimisation: the proxy goes up and what it stands for goes down.  Plain words for the run's report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class ProxyGap:
    """Whether what training optimises and what it is for still move together.

    Example: ProxyGap(gold="accuracy", gold_change=-0.05, changes={"verifier/nines": 0.2},
    correlations={"verifier/nines": -0.8}, warnings=("verifier/nines rose by 0.2 while accuracy fell by 0.05 …",))
    """

    gold: str | None  # the gold metric's name, None where no gold is measured
    gold_change: float  # last evaluation minus first
    changes: dict[str, float]  # the same of each verifier
    correlations: dict[str, float]  # with gold over the evaluations; only where there are three that vary
    warnings: tuple[str, ...]


def proxy_gold_gap(history: Sequence[dict[str, dict[str, float]]]) -> ProxyGap:
    """Compares every `verifier/<name>` with gold over a run's evaluations, oldest first.

    Over-optimisation (Gao et al., "Scaling Laws for Reward Model Overoptimization", 2022) is a proxy that rose beyond
    its interval while gold fell beyond its own, both since gold's best evaluation.
    """
    first, last = (history[0], history[-1]) if history else ({}, {})
    gold = next((name for name in last if name == "accuracy" or name.startswith("gold/")), None)
    if gold is None or any(gold not in metrics for metrics in history):
        return ProxyGap(None, 0.0, {}, {}, ())
    track = [metrics[gold]["value"] for metrics in history]
    best = history[int(np.argmax(track))]
    fell = last[gold]["high"] < best[gold]["low"]
    changes, correlations, warnings = {}, {}, []
    for name in last:
        if not name.startswith("verifier/") or any(name not in metrics for metrics in history):
            continue
        values = [metrics[name]["value"] for metrics in history]
        changes[name] = values[-1] - values[0]
        if len(values) > 2 and np.ptp(values) > 0 and np.ptp(track) > 0:
            correlations[name] = float(np.corrcoef(values, track)[0, 1])
        if fell and last[name]["low"] > best[name]["high"]:
            warnings.append(
                f"{name} rose from {best[name]['value']:.3g} to {last[name]['value']:.3g} while {gold} fell from "
                f"{best[gold]['value']:.3g} to {last[gold]['value']:.3g}: the policy games this verifier"
            )
    return ProxyGap(gold, last[gold]["value"] - first[gold]["value"], changes, correlations, tuple(warnings))
