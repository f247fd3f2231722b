"""A verifier that knows nothing."""

from __future__ import annotations

from typing import Self

from align.verifiers.base import Item, PerItem, unit_hash
from align.verifiers.spec import NoiseSpec


class Noise(PerItem):
    """Yes with probability `rate`, by a hash of the verifier's name and the sample's id.

    The sample's id already depends on the run's seed, so another seed gives other coins; another name too.
    """

    kind = "binary"

    def __init__(self, name: str, rate: float) -> None:
        super().__init__(name)
        self._rate = rate

    @classmethod
    def from_spec(cls, spec: NoiseSpec) -> Self:
        return cls(spec.name, spec.rate)

    def value(self, item: Item) -> float:
        """0.0 or 1.0."""
        return float(unit_hash("noise", self.name, item.sample_id) < self._rate)
