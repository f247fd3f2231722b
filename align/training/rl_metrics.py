"""What a round of a policy gradient tells about itself (point 15 of the usual PPO checklists).

Legend: N response tokens, K responses.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from align.records import Sample
from align.training.advantages import explained_variance
from align.training.rollouts import Estimates, Rollouts

BUCKETS = 4


def round_metrics(rollouts: Rollouts, result: Estimates, samples: Sequence[Sample]) -> dict[str, float]:
    """Of the policy at the start of the round.

    kl and kl_k3 in nats per response by two estimates; score_q1 … q4 the mean score of the shortest to the longest
    quarter of the responses, which says whether length is rewarded.
    """
    lengths, scores = rollouts.lengths, rollouts.scores
    found = {
        "score": float(scores.mean()),
        "score_std": float(scores.std()),
        "length": float(lengths.mean()),
        "cut": float(np.mean([s.finish_reason == "length" for s in samples])),
        "advantage_std": float(result.advantages.std()),
    }
    token_kl = rollouts.token_kl
    if token_kl is not None:
        k3 = np.expm1(np.clip(-token_kl, -20.0, 20.0)) + token_kl
        found["kl"] = float(rollouts.per_response(token_kl).mean())
        found["kl_k3"] = float(rollouts.per_response(k3).mean())
    if rollouts.values is not None and result.returns is not None:
        found["explained_variance"] = explained_variance(rollouts.values, result.returns)
        found["value"] = float(rollouts.values.mean())
    if rollouts.sampler is not None:
        found["engine_gap"] = float(np.abs(rollouts.old - rollouts.sampler).mean())
    order = np.argsort(lengths, kind="stable")
    for i, part in enumerate(np.array_split(order, BUCKETS)):
        if len(part):
            found[f"score_q{i + 1}"] = float(scores[part].mean())
    return found
