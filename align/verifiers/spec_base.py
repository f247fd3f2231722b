"""What every verifier's block in a recipe has, and what the blocks share in reading it."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class VerifierBlock(BaseModel):
    """Settings that every verifier takes."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    output: ClassVar[Literal["binary", "score"]]
    """What the verifier answers with: 0 or 1, or a number of which larger is better.  No key of the recipe."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    """Name in reports and artifacts."""
    family: str | None = None
    """Verifiers that share a source of error (one judge under two prompts) share a family."""
    invert: bool = False
    """Swap yes and no, or negate the score: for a verifier that is known to prefer the wrong end."""
    flip_rate: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of a binary verifier's answers turned round, chosen by hash: for studying bad supervision."""
    timeout_s: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 5.0
    """Longest time one response may take; past it the verdict is none."""
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that judge at the same time, each on its share of the prompts."""

    @property
    def checkpoint(self) -> tuple[str, str | None] | None:
        """(directory or hub name, commit) of the model that the verifier loads; None where it loads none."""
        model = getattr(self, "model", None)
        return None if model is None or getattr(self, "endpoint", None) else (model, getattr(self, "revision", None))

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the prompt source that the verifier reads, beside the prompt and its answer."""
        return ()

    @model_validator(mode="after")
    def _only_votes_flip(self) -> VerifierBlock:
        if self.flip_rate > 0 and self.output == "score":
            raise ValueError("flip_rate: turns yes and no round, but this kind gives a score; use `invert`")
        return self


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The compiled expression; raises ValueError with the reason where it is not one."""
    try:
        return re.compile(pattern, re.DOTALL)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"pattern: not a regular expression: {error}") from None
