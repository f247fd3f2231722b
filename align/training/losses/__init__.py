"""Losses: pure functions, one module per idea; `align.catalogue` names them all.

`align.training.losses.pairwise` and its neighbours take a `PairBatch` and named numbers and return one value per pair.
"""

from align.training.losses.pairs import PairBatch

__all__ = ["PairBatch"]
