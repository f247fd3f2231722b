"""How far the chances stated of a pair come true, on gold.

Legend: N samples.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from align.ensemble.calibrate import PairProbability, pairs_within
from align.evaluation.calibration import brier, expected_calibration_error, reliability


def pair_calibration(
    p_good: np.ndarray, chances: PairProbability, gold: np.ndarray, prompts: np.ndarray
) -> dict[str, Any] | None:
    """P(win) and P(tie) against gold [N] (1, 0, NaN: not judged), over pairs of responses to one prompt.

    The better one is the one with the higher P(good), as in the pairs that training sees; equal ones make no pair.
    `win` and `tie` each have the expected calibration error, the Brier score and the reliability curve: `bins` of equal
    count with the mean chance `stated` and the share `observed`.  None where no two judged responses share a prompt.
    """
    known = np.flatnonzero(~(np.isnan(gold) | np.isnan(p_good)))
    a, b = (known[side] for side in pairs_within(prompts[known]))
    better, worse = np.where(p_good[a] >= p_good[b], a, b), np.where(p_good[a] >= p_good[b], b, a)
    apart = p_good[better] > p_good[worse]
    better, worse = better[apart], worse[apart]
    if not len(better):
        return None
    win, tie, _ = chances.of(p_good[better], p_good[worse])
    return {
        "pairs": len(better),
        "win": _reliability(win, (gold[better] > gold[worse]).astype(float)),
        "tie": _reliability(tie, (gold[better] == gold[worse]).astype(float)),
    }


def _reliability(stated: np.ndarray, came: np.ndarray) -> dict[str, Any]:
    curve = reliability(stated, came)
    bins = [
        {"count": int(count), "stated": float(said), "observed": float(seen)}
        for said, seen, count in zip(curve.stated, curve.observed, curve.count, strict=True)
    ]
    return {"ece": expected_calibration_error(stated, came), "brier": brier(stated, came), "bins": bins}
