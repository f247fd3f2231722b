"""Weaver as published (arXiv 2506.18203): normalise, threshold, filter, label model, difficulty clusters.

Not the default here: its published settings were tuned on labels, and its label model takes verifiers for independent.
It stands as a method of its own so that it can be compared.

Legend: N samples, M verifiers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from align.ensemble.base import Fit
from align.ensemble.moments import fit_matched, votes_and_balance
from align.ensemble.table import VerdictTable

LOW, HIGH = 5.0, 95.0  # percentiles that become 0 and 1
RARE, COMMON = 0.2, 0.8  # marginals and class balances that the filter goes by
MIN_KEPT = 3
MIN_CLUSTER = 20  # samples of a cluster below which it is not fitted alone


@dataclass(frozen=True, slots=True)
class Weaver:
    """Scores by percentile, votes at the class-balance quantile, verifiers filtered by how often they say yes.

    The filter: with a class balance in [0.2, 0.8] a verifier must say yes in [0.2, 0.8] of the responses; with rarer
    good ones it may not say yes more often than 0.8; with more, not less often than 0.2.  Verifiers worse than chance
    on the labels go as well.  The rest are fitted by moments (MatchedMoments), one fit per cluster of prompts with
    about as many distinct answers, which needs no label.
    """

    balance: float | None = None
    clusters: int = 1

    def fit(self, table: VerdictTable, labels: np.ndarray | None = None) -> Fit:
        scaled = replace(table, values=percentiles(table))
        votes, balance = votes_and_balance(scaled, self.balance, labels)
        kept = keep(votes, balance, labels)
        warnings: tuple[str, ...] = ()
        if kept.sum() < MIN_KEPT:
            warnings = (f"Weaver's filter leaves {int(kept.sum())} verifiers; all are used",)
            kept = np.ones(len(kept), dtype=bool)
        members = distinct_answers(table, self.clusters)
        p_good = np.full(len(votes), np.nan)
        tpr, tnr = np.full(len(kept), 0.5), np.full(len(kept), 0.5)
        whole = fit_matched(votes[:, kept], balance)
        tpr[kept], tnr[kept] = whole.tpr, whole.tnr
        for cluster in np.unique(members):
            rows = members == cluster
            p_good[rows] = whole.p_good[rows]
            if rows.sum() >= MIN_CLUSTER and not rows.all():
                own = cluster_balance(votes[rows], balance, votes)
                p_good[rows] = fit_matched(votes[rows][:, kept], own).p_good
        dropped = {"dropped": float((~kept).sum()), "clusters": float(len(np.unique(members)))}
        return Fit(p_good, balance, tpr, tnr, {**whole.diagnostics, **dropped}, warnings)


def percentiles(table: VerdictTable) -> np.ndarray:
    """[N, M]: each score with its 5th percentile at 0 and its 95th at 1, cut there; votes as they are."""
    values = table.values.copy()
    for j, kind in enumerate(table.kinds):
        heard = ~np.isnan(values[:, j])
        if kind == "score" and heard.any():
            low, high = np.percentile(values[heard, j], [LOW, HIGH])
            values[:, j] = np.clip((values[:, j] - low) / (high - low if high > low else 1.0), 0.0, 1.0)
    return values


def keep(votes: np.ndarray, balance: float, labels: np.ndarray | None) -> np.ndarray:
    """[M] bool: the verifiers that pass the filter."""
    heard = ~np.isnan(votes)
    marginal = np.where(heard, votes, 0.0).sum(axis=0) / np.maximum(heard.sum(axis=0), 1)
    kept = heard.any(axis=0)
    if balance >= RARE:
        kept &= marginal >= RARE
    if balance <= COMMON:
        kept &= marginal <= COMMON
    if labels is not None:
        known = ~np.isnan(labels)
        seen, truth = votes[known], labels[known, None]
        spoke = ~np.isnan(seen)
        for truth_is in (1.0, 0.0):
            if not (truth == truth_is).any():
                return kept
        yes = np.nan_to_num(seen)
        tpr = (yes * truth).sum(axis=0) / np.maximum((spoke * truth).sum(axis=0), 1)
        fpr = (yes * (1 - truth)).sum(axis=0) / np.maximum((spoke * (1 - truth)).sum(axis=0), 1)
        kept &= tpr >= fpr
    return kept


def cluster_balance(votes: np.ndarray, balance: float, everywhere: np.ndarray) -> float:
    """The class balance of a cluster: the whole's, moved by how much oftener its verifiers say yes."""
    own, overall = (np.nansum(v) / max((~np.isnan(v)).sum(), 1) for v in (votes, everywhere))
    return float(np.clip(balance + own - overall, 0.05, 0.95))


def distinct_answers(table: VerdictTable, clusters: int) -> np.ndarray:
    """[N]: cluster of each sample's prompt by its number of distinct answers, in equal shares of the prompts.

    The number of distinct answers is a stand-in for difficulty that needs no label: on MATH its rank correlation with
    the share of right ones is -0.84, on GPQA -0.09.  Without answers, or with one cluster, all are one.
    """
    if clusters < 2 or not table.answers:
        return np.zeros(len(table.prompts), dtype=np.int64)
    pairs = {(p, a) for p, a in zip(table.prompts.tolist(), table.answers, strict=True) if a}
    _, group = np.unique(table.prompts, return_inverse=True)
    prompts = np.unique(table.prompts)
    number = dict.fromkeys(prompts.tolist(), 0)
    for prompt, _answer in pairs:
        number[prompt] += 1
    count = np.array([number[p] for p in prompts.tolist()], dtype=float)
    edges = np.unique(np.quantile(count, np.linspace(0.0, 1.0, clusters + 1)[1:-1]))
    return np.searchsorted(edges, count, side="left")[group]
