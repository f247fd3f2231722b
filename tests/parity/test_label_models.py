"""Dawid-Skene against crowd-kit 1.4.2 and the matched moments against Snorkel 0.10.0, by answers they gave once.

`benchmarks/ensemble_vs_oracles.py` compares them afresh where both can be imported.  Here crowd-kit
ran with n_iter=100, tol=1e-5, Snorkel's LabelModel with 5000 epochs, lr 0.01, seed 0 and the class balance given.
The tolerance is 0.005: crowd-kit stops at a relative change of 1e-5, before doubtful items have settled.
"""

from __future__ import annotations

import numpy as np

from align.ensemble.channels import Channel
from align.ensemble.dawid_skene import DawidSkene, expectation_maximisation
from align.ensemble.moments import fit_matched

CROWD_KIT = [0.0234, 0.0564, 0.0395, 0.7388, 0.1777, 0.9885, 0.9781, 0.8806]
SNORKEL = [0.0198, 0.0493, 0.0336, 0.6892, 0.1600, 0.9870, 0.9751, 0.8645]


def drawn() -> np.ndarray:
    """[2000, 6] of 0, 1 and NaN: voters right with probability 0.55 to 0.85, a fifth of the votes silent."""
    rng = np.random.default_rng(5)
    truth = rng.random(2000) < 0.45
    votes = np.empty((2000, 6))
    for j, right in enumerate(np.linspace(0.55, 0.85, 6)):
        votes[:, j] = np.where(rng.random(2000) < right, truth, ~truth)
        votes[rng.random(2000) < 0.2, j] = np.nan
    votes[:, 0] = np.nan_to_num(votes[:, 0], nan=1.0)  # somebody speaks on every item
    assert np.nansum(votes) == 5001.0
    return votes


def test_dawid_skene_is_crowd_kit_s() -> None:
    votes = drawn()
    codes = np.where(np.isnan(votes), -1, votes).astype(np.int64)
    made = [Channel(column, np.array([0.0, 1.0]), (j,)) for j, column in enumerate(codes.T)]
    em = expectation_maximisation(made, np.nanmean(votes, axis=1), DawidSkene(0.0, max_iterations=500))
    np.testing.assert_allclose(em.p_good[:8], CROWD_KIT, atol=0.005)


def test_matched_moments_are_snorkel_s() -> None:
    np.testing.assert_allclose(fit_matched(drawn(), 0.45).p_good[:8], SNORKEL, atol=0.0005)
