"""One optimizer step of any trainer: share the work out, forward and backward, one reduction, one check, one step.

A trainer says what its loss is (`Objective`); everything that must be right in the same way for all of them is here:
the ranks get about the same number of tokens and make the same number of backwards, the sums of all ranks and
micro-batches meet in one reduction, and a loss or gradient that is not finite on any rank stops every rank before the
weights change.  A loss is divided by numbers that are counted over the whole step, so neither the number of ranks nor
`tokens_per_batch` changes it.

Legend: B losses of a micro-batch, K responses, N response tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from align.errors import NotFiniteError
from align.recipe import Recipe
from align.training.engine import PolicyEngine, dummy_batch
from align.training.logps import TokenLogProbs, per_response
from align.training.packing import Group, PackedBatch, Plan, lay_out, plan_batches
from align.training.upload import upload

Row = TypeVar("Row")


@dataclass(frozen=True)
class TrainReport:
    """What a round of training did.

    Example: TrainReport(steps=8, examples=512, tokens=40960, seconds=3.2, metrics={"loss": 0.66, …}, counts={})
    """

    steps: int
    examples: int  # pairs or responses, counted once per epoch
    tokens: int  # positions computed in training forwards over all ranks, padding and reference left out
    seconds: float
    metrics: dict[str, float]  # mean over the round's steps
    counts: dict[str, int] = field(default_factory=dict)  # what was left out, by reason
    stopped: str = ""  # why training has ended for good, where a rule of the trainer says so
    warnings: tuple[str, ...] = ()  # what the user should see


@dataclass(frozen=True)
class Unit(Generic[Row]):
    """A prompt with responses that are computed together, and what the objective knows of them.

    Example: Unit(Group((4, 5), ((8, 1), (9, 1))), rows=(PairRow(…),))
    """

    group: Group
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Part:
    """What a micro-batch gives."""

    loss: Tensor  # [] its share of the step's loss, to be differentiated
    sums: Tensor  # [len(objective.sums)] its share of the step's sums, detached
    losses: Tensor  # [B] detached, to find what is not finite
    names: Sequence[str]  # [B] whose loss it is, for the message


class Objective(Protocol):
    """What a trainer computes on a step."""

    @property
    def sums(self) -> tuple[str, ...]:
        """Names of `Part.sums`."""

    @property
    def head(self) -> dict[str, Any]:
        """What the head is asked for beside log-probabilities: keywords of `PolicyEngine.forward`."""

    @property
    def pulls_entropy(self) -> bool:
        """Whether the loss goes back through the entropies, where the head gives them."""

    def before_step(self, engine: PolicyEngine, shares: Sequence[Sequence[Unit[Any]]]) -> None:
        """Collective; count what the step's loss is divided by.  shares[r] are the units of rank r."""

    def inputs(self, batch: PackedBatch, units: Sequence[Unit[Any]]) -> PackedBatch:
        """The batch as the network is to see it."""

    def part(self, batch: PackedBatch, units: Sequence[Unit[Any]], found: TokenLogProbs) -> Part:
        """This micro-batch's share of the step.  batch.members[k] = (index into units, index of the response)."""

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The step's metrics from its sums over all ranks; `loss` is expected."""


class PlainObjective:
    """The parts of an objective that most trainers leave as they are."""

    @property
    def head(self) -> dict[str, Any]:
        """Log-probabilities at temperature 1, and nothing else."""
        return {}

    @property
    def pulls_entropy(self) -> bool:
        """Who asks for entropies has them in the loss."""
        return True

    def before_step(self, engine: PolicyEngine, shares: Sequence[Sequence[Unit[Any]]]) -> None:
        """Nothing to count."""

    def inputs(self, batch: PackedBatch, units: Sequence[Unit[Any]]) -> PackedBatch:
        """The batch as it is."""
        return batch


def assign(units: Sequence[Unit[Row]], ranks: int) -> list[list[Unit[Row]]]:
    """Share the units out so that the ranks get about the same number of tokens: largest first, to the least loaded."""
    shares: list[list[Unit[Row]]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for unit in sorted(units, key=lambda u: -u.group.tokens):
        rank = loads.index(min(loads))
        shares[rank].append(unit)
        loads[rank] += unit.group.tokens
    return shares


def train_step(engine: PolicyEngine, units: Sequence[Unit[Any]], objective: Objective, recipe: Recipe) -> dict:
    """One optimizer step on the units of all ranks; returns its metrics.  Collective.

    Raises NotFiniteError on every rank, before the optimizer step, where a loss or a gradient is not finite on any.
    """
    shares = assign(units, engine.ranks.world_size)
    objective.before_step(engine, shares)
    mine, plans, rounds = _my_batches(engine, shares)
    sums = torch.zeros(len(objective.sums) + 2, dtype=torch.float64, device=engine.device)
    seen: list[tuple[Sequence[str], Tensor]] = []
    for i in range(rounds):
        if i < len(plans):
            batch = lay_out([u.group for u in mine], plans[i])
            found = _forward(engine, objective.inputs(batch, mine), objective)
            part = objective.part(batch, mine, found)
            seen.append((part.names, part.losses))
            sums[:-2] += part.sums
            sums[-2] += (~torch.isfinite(part.losses)).sum()
            loss = part.loss * engine.ranks.world_size  # DeepSpeed averages over the ranks
        else:
            loss = _nothing(_forward(engine, dummy_batch(), objective))
        engine.backward(loss, last=i == rounds - 1)
    sums[-1] = engine.gradient_square_sum()
    *totals, bad, gradient = engine.sum_over_ranks(sums).tolist()
    _refuse_not_finite(engine, seen, bad, gradient, allow_gradient=recipe.policy.dtype == "float16")
    learning_rate = engine.learning_rate
    applied = engine.apply()
    return {
        "step": engine.step,
        **objective.metrics(dict(zip(objective.sums, totals, strict=True))),
        "grad_norm": math.sqrt(gradient) if math.isfinite(gradient) else math.inf,
        "learning_rate": learning_rate,
        "skipped": 0 if applied else 1,
        "tokens": sum(u.group.tokens for u in units),
    }


def _forward(engine: PolicyEngine, batch: PackedBatch, objective: Objective) -> TokenLogProbs:
    """What the head says, with a gradient where the loss follows it: then every rank goes back the same way."""
    found = engine.forward(batch, **objective.head)
    if found.entropies is None or objective.pulls_entropy:
        return found
    return replace(found, entropies=found.entropies.detach())


def _nothing(found: TokenLogProbs) -> Tensor:
    """A loss of 0 that goes back through all that has a gradient: ZeRO-3 gathers weights once for each of them."""
    outputs = (found.logprobs, found.entropies, found.divergence)
    return torch.stack([x.sum() for x in outputs if x is not None and x.requires_grad]).sum() * 0.0


def _my_batches(engine: PolicyEngine, shares: Sequence[Sequence[Unit[Any]]]) -> tuple[list[Unit[Any]], list[Plan], int]:
    """This rank's units, their micro-batches, and how many micro-batches the busiest rank has.

    ZeRO reduces gradients in every backward, so all ranks make as many.
    """
    budget = engine.recipe.training.tokens_per_batch
    plans = [plan_batches([u.group for u in share], budget, engine.token_multiple) for share in shares]
    return list(shares[engine.ranks.rank]), plans[engine.ranks.rank], max(len(p) for p in plans)


def response_totals(batch: PackedBatch, found: TokenLogProbs) -> Tensor:
    """[K] summed log-probability of the batch's responses, in float64: what is asked of them are small differences."""
    lengths = upload(batch.lengths.tolist(), torch.int64, found.logprobs.device)
    return per_response(found.logprobs.double(), lengths)


def _refuse_not_finite(
    engine: PolicyEngine,
    seen: Sequence[tuple[Sequence[str], Tensor]],
    bad: float,
    gradient: float,
    allow_gradient: bool,
) -> None:
    """Stop every rank at the same step, before the weights change.  float16's overflows are DeepSpeed's to skip."""
    if not bad and (math.isfinite(gradient) or allow_gradient):
        return
    everything = [name for names, _ in seen for name in names]
    mine = [
        name
        for names, losses in seen
        for name, ok in zip(names, torch.isfinite(losses).tolist(), strict=True)
        if not ok
    ]
    culprits = [name for part in engine.ranks.gather(mine, "not finite") for name in part]
    suspects = [name for part in engine.ranks.gather(everything, "suspects") for name in part]
    what, names = ("loss", culprits) if culprits else ("gradient", suspects)
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise NotFiniteError(
        f"training step {engine.step + 1}: the {what} is not finite; the weights were not changed. "
        f"Samples: {shown}. Lower training.learning_rate, or look at these samples",
        {"step": engine.step + 1, "what": what, "samples": names},
    )


def mean_report(
    rows: Sequence[Mapping[str, Any]], examples: int, seconds: float, counts: Mapping[str, int], stopped: str = ""
) -> TrainReport:
    """A round's report from its steps' rows."""
    places = ("step", "round", "epoch", "tokens", "examples")
    names = [k for k in rows[0] if k not in places] if rows else []
    return TrainReport(
        steps=len(rows),
        examples=examples,
        tokens=sum(r["tokens"] for r in rows),
        seconds=seconds,
        metrics={k: sum(r[k] for r in rows) / len(rows) for k in names},
        counts=dict(counts),
        stopped=stopped,
    )
