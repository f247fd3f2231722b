"""What every block of the recipe is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
LARGEST_BETA, SMALLEST_BETA = 1e6, 1e-9
"""Beyond these, beta times a log-ratio of 1e4 nats, or the square of 1/(2 beta), is no float32 number of any use."""


class Block(BaseModel):
    """A part of the recipe: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    def changed(self) -> list[str]:
        """The keys that say something else than their default."""
        fields = type(self).model_fields
        return [name for name in fields if getattr(self, name) != fields[name].get_default(call_default_factory=True)]


def strength_faults(key: str, value: float) -> list[str]:
    """What is wrong with a factor on log-ratios: nothing, or one line that begins with its key."""
    if SMALLEST_BETA <= value <= LARGEST_BETA:
        return []
    return [
        f"{key}: {value:g} times a log-ratio leaves what float32 can hold; "
        f"give a number from {SMALLEST_BETA:g} to {LARGEST_BETA:g}, such as 0.1"
    ]
