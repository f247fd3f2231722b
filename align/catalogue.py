"""Every trainer and every loss, in one table: what it needs, which settings it reads, where its function is.

The recipe is checked against it before anything loads, the trainers find their loss in it, and the README's table
is printed from it.  It imports nothing heavy: a function is named by its path and looked up when it is first used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from typing import Any, Literal

Family = Literal["preference", "group", "negative", "policy_gradient", "supervised"]
FAMILIES: tuple[Family, ...] = ("preference", "group", "negative", "policy_gradient", "supervised")
BLOCKS: dict[Family, str] = {"negative": "negative", "policy_gradient": "rl", "supervised": "supervised"}
"""The block under `training` that a family alone reads."""


@dataclass(frozen=True, slots=True)
class LossFacts:
    """One loss.

    Example: LossFacts("ipo", "preference", "align.training.losses.pairwise:ipo", formula="…", paper="2310.12036",
    options=("beta",))
    """

    name: str
    family: Family
    path: str  # "module:function"
    formula: str  # one line of plain text, in the symbols of the README
    paper: str  # arXiv id, or where it comes from
    options: tuple[str, ...] = ()  # the fields of `training.loss` that it reads, beside `name`
    reference: bool = True  # compares with the reference policy
    soft: bool = True  # takes a soft label per pair, or P(good) per response
    whole_step: bool = False  # couples all pairs of a step, so it needs a first pass over them
    needs: str = ""  # what else it needs, in words

    def function(self) -> Callable[..., Any]:
        """The pure function behind the name."""
        module, name = self.path.split(":")
        found: Callable[..., Any] = getattr(import_module(module), name)
        return found

    def arguments(self, settings: Any) -> dict[str, Any]:
        """The settings that the function takes by name, from a `Loss` block."""
        taken = signature(self.function()).parameters
        return {option: getattr(settings, option) for option in self.options if option in taken}


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One trainer, as `training.algorithm` names it.

    Example: Algorithm("dpo", "preference", losses=("dpo", "ipo"), consumes="pairs")
    """

    name: str
    family: Family
    losses: tuple[str, ...]  # what `training.loss.name` may be; the first is the default
    consumes: Literal["pairs", "scores"]
    critic: bool = False

    @property
    def module(self) -> str:
        """The module whose `train_round` trains it."""
        return f"align.training.{self.family}"


_PAIRWISE = "align.training.losses"

_LOSSES: tuple[LossFacts, ...] = (
    LossFacts(
        "dpo", "preference", f"{_PAIRWISE}:dpo",
        formula="-p log σ(z) - (1-p) log σ(-z)", paper="2305.18290", options=("beta", "nll_weight"),
    ),
)  # fmt: skip

LOSSES: dict[str, LossFacts] = {facts.name: facts for facts in _LOSSES}
assert len(LOSSES) == len(_LOSSES), "two losses of one name"


def _of(family: Family) -> tuple[str, ...]:
    return tuple(facts.name for facts in _LOSSES if facts.family == family)


_ALGORITHMS: tuple[Algorithm, ...] = (Algorithm("dpo", "preference", _of("preference"), consumes="pairs"),)

ALGORITHMS: dict[str, Algorithm] = {algorithm.name: algorithm for algorithm in _ALGORITHMS}


def loss_name(algorithm: str, name: str | None) -> str:
    """The loss that a recipe means: the one it names, or the algorithm's first."""
    return ALGORITHMS[algorithm].losses[0] if name is None else name
