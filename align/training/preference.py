"""One round of preference training: pairs in, optimizer steps out.

A step takes `pairs_per_step` pairs over all ranks.  Pairs of one prompt stay together, so the prompt and any
response that several pairs share are computed once.  The loss of a step is

    sum over pairs of weight * loss / pairs of the step  +  nll_weight * sum of chosen tokens' -log π / their number,

both counted over all ranks and micro-batches, so neither the number of ranks nor `tokens_per_batch` changes it.
The last step of an epoch may have fewer pairs; it is divided by its own count.

Legend: B pairs of a micro-batch, K responses, N response tokens.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from align.errors import RunError
from align.recipe import Recipe
from align.records import Pair, Sample
from align.training.engine import PolicyEngine, dummy_batch
from align.training.groups import Group, PackedBatch, Plan, lay_out, plan_batches
from align.training.logps import per_response
from align.training.losses import LOSSES, PairBatch

SUMS = ("loss", "nll", "accuracy", "margin", "chosen_logprob", "rejected_logprob", "not_finite", "gradient")
"""What is summed over ranks once per step, in this order; see `TrainReport` for the metrics made of them."""


@dataclass(frozen=True)
class TrainReport:
    """What a round of training did.

    Example: TrainReport(steps=8, pairs=512, tokens=40960, seconds=3.2, metrics={"loss": 0.66, "accuracy": 0.71, …})
    """

    steps: int
    pairs: int  # counted once per epoch
    tokens: int  # positions computed in training forwards over all ranks, padding and reference left out
    seconds: float
    metrics: dict[str, float]  # mean over the round's steps


@dataclass(frozen=True)
class Unit:
    """Pairs of one prompt that are computed together: the group and, per pair, which responses it compares."""

    group: Group
    pairs: tuple[Pair, ...]
    slots: tuple[tuple[int, int], ...]  # per pair: (chosen, rejected) as places in group.responses


@dataclass
class _Step:
    """One optimizer step's global numbers and what came of it so far."""

    units: list[Unit]  # of all ranks
    pairs: int = 0
    chosen_tokens: int = 0
    tokens: int = 0
    losses: list[tuple[list[Pair], Tensor]] = field(default_factory=list)  # this rank's, for naming a culprit

    def __post_init__(self) -> None:
        self.pairs = sum(len(u.pairs) for u in self.units)
        self.tokens = sum(u.group.tokens for u in self.units)
        self.chosen_tokens = sum(len(u.group.responses[c]) for u in self.units for c, _ in u.slots)


def train_round(
    engine: PolicyEngine,
    pairs: Sequence[Pair],
    samples_by_id: Mapping[str, Sample],
    recipe: Recipe,
    round: int,
    on_step: Callable[[dict], None],
) -> TrainReport:
    """Train on a round's pairs; `on_step` gets each step's metrics, on every rank.  Collective.

    Raises RunError on every rank, before the optimizer step, where a loss or a gradient is not finite on any.
    """
    if not pairs:
        raise ValueError("train_round needs at least one pair")
    training = recipe.training
    started = time.monotonic()
    reference = reference_sums(engine, pairs, samples_by_id, initial=training.reference == "initial")
    rows: list[dict] = []
    for epoch in range(training.epochs):
        for chosen in _steps(pairs, training.pairs_per_step, f"{recipe.seed}/{round}/{epoch}"):
            before = time.monotonic()
            step = _Step(make_units(chosen, samples_by_id, training.tokens_per_batch))
            row = _train_step(engine, step, reference, recipe)
            row |= {"round": round, "epoch": epoch, "seconds": time.monotonic() - before}
            rows.append(row)
            on_step(row)
    means = {
        k: sum(r[k] for r in rows) / len(rows)
        for k in rows[0]
        if k not in ("step", "round", "epoch", "tokens", "pairs")
    }
    return TrainReport(
        steps=len(rows),
        pairs=sum(r["pairs"] for r in rows),
        tokens=sum(r["tokens"] for r in rows),
        seconds=time.monotonic() - started,
        metrics=means,
    )


def reference_sums(
    engine: PolicyEngine, pairs: Sequence[Pair], samples_by_id: Mapping[str, Sample], initial: bool
) -> dict[str, float]:
    """Summed reference log-probability of every response in the pairs, on every rank; each rank computes a share."""
    ids = sorted(
        {i for p in pairs for i in (p.chosen_id, p.rejected_id)}, key=lambda i: (samples_by_id[i].prompt_id, i)
    )
    prompts = sorted({samples_by_id[i].prompt_id for i in ids})
    mine = {prompts[i] for i in engine.ranks.share(len(prompts))}
    wanted = [i for i in ids if samples_by_id[i].prompt_id in mine]
    sequences = [(samples_by_id[i].prompt_ids, samples_by_id[i].response_ids) for i in wanted]
    found = engine.token_logprobs(sequences, reference=initial).logprobs
    sums = {i: float(row.sum(dtype="float64")) for i, row in zip(wanted, found, strict=True)}
    return {i: total for part in engine.ranks.gather(sums, "reference") for i, total in part.items()}


def _steps(pairs: Sequence[Pair], pairs_per_step: int, seed: str) -> list[list[Pair]]:
    """The pairs in a seeded order, prompt by prompt, cut into steps."""
    by_prompt: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt_id, []).append(pair)
    prompts = sorted(by_prompt)
    random.Random(seed).shuffle(prompts)
    ordered = [pair for prompt in prompts for pair in sorted(by_prompt[prompt], key=lambda p: p.id)]
    return [ordered[i : i + pairs_per_step] for i in range(0, len(ordered), pairs_per_step)]


def make_units(pairs: Sequence[Pair], samples_by_id: Mapping[str, Sample], token_budget: int) -> list[Unit]:
    """Put a step's pairs of one prompt into one group, or into several where one would exceed the budget."""
    by_prompt: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt_id, []).append(pair)
    units: list[Unit] = []
    for members in by_prompt.values():
        taken: list[Pair] = []
        for pair in members:
            if taken and _unit([*taken, pair], samples_by_id).group.tokens > token_budget:
                units.append(_unit(taken, samples_by_id))
                taken = []
            taken.append(pair)
        units.append(_unit(taken, samples_by_id))
    return units


def _unit(pairs: Sequence[Pair], samples_by_id: Mapping[str, Sample]) -> Unit:
    place: dict[str, int] = {}
    for pair in pairs:
        for sample_id in (pair.chosen_id, pair.rejected_id):
            place.setdefault(sample_id, len(place))
    samples = [samples_by_id[i] for i in place]
    group = Group(tuple(samples[0].prompt_ids), tuple(tuple(s.response_ids) for s in samples))
    return Unit(group, tuple(pairs), tuple((place[p.chosen_id], place[p.rejected_id]) for p in pairs))


def assign(units: Sequence[Unit], ranks: int) -> list[list[Unit]]:
    """Share the units out so that the ranks get about the same number of tokens: largest first, to the least loaded."""
    shares: list[list[Unit]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for unit in sorted(units, key=lambda u: -u.group.tokens):
        rank = loads.index(min(loads))
        shares[rank].append(unit)
        loads[rank] += unit.group.tokens
    return shares


def _train_step(engine: PolicyEngine, step: _Step, reference: Mapping[str, float], recipe: Recipe) -> dict:
    """Forward and backward over this rank's share, one reduction, one check, one optimizer step."""
    budget = recipe.training.tokens_per_batch
    shares = assign(step.units, engine.ranks.world_size)
    plans = [plan_batches([u.group for u in share], budget, engine.token_multiple) for share in shares]
    mine, my_plans = shares[engine.ranks.rank], plans[engine.ranks.rank]
    rounds = max(len(p) for p in plans)  # ZeRO reduces gradients in every backward: all ranks make as many
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=engine.device)
    for i in range(rounds):
        if i < len(my_plans):
            loss, part = _micro_batch(engine, step, mine, my_plans[i], reference, recipe)
            sums[: len(part)] += part
        else:
            loss = engine.forward(dummy_batch()).logprobs.sum() * 0.0
        engine.backward(loss, last=i == rounds - 1)
    sums[-1] = engine.gradient_square_sum()
    totals = dict(zip(SUMS, engine.sum_over_ranks(sums).tolist(), strict=True))
    _refuse_not_finite(engine, step, totals, allow_gradient=recipe.policy.dtype == "float16")
    learning_rate = engine.learning_rate
    applied = engine.apply()
    means = {k: totals[k] / step.pairs for k in ("accuracy", "margin", "chosen_logprob", "rejected_logprob")}
    return {
        "step": engine.step,
        "loss": totals["loss"] + totals["nll"],
        **means,
        "grad_norm": math.sqrt(totals["gradient"]) if math.isfinite(totals["gradient"]) else math.inf,
        "learning_rate": learning_rate,
        "skipped": 0 if applied else 1,
        "pairs": step.pairs,
        "tokens": step.tokens,
    }


def _micro_batch(
    engine: PolicyEngine,
    step: _Step,
    units: Sequence[Unit],
    plan: Plan,
    reference: Mapping[str, float],
    recipe: Recipe,
) -> tuple[Tensor, Tensor]:
    """This micro-batch's share of the global loss, to be differentiated, and its share of the metrics [7]."""
    settings = recipe.training.loss
    batch = lay_out([u.group for u in units], plan)
    pairs, chosen_slots, rejected_slots = _pairs_of(batch, units)
    device = engine.device
    logprobs = engine.forward(batch).logprobs
    lengths = batch.lengths.to(device)
    totals = per_response(logprobs, lengths)  # [K]
    chosen, rejected = totals[chosen_slots.to(device)], totals[rejected_slots.to(device)]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    records = PairBatch(
        policy_chosen=chosen,
        policy_rejected=rejected,
        ref_chosen=column([reference[p.chosen_id] for p in pairs]),
        ref_rejected=column([reference[p.rejected_id] for p in pairs]),
        label=column([p.label for p in pairs]),
    )
    losses = LOSSES[settings.name](records, settings.beta)
    weighted = (column([p.weight for p in pairs]) * losses).sum() / step.pairs
    nll = -chosen.sum() * (settings.nll_weight / step.chosen_tokens)
    with torch.no_grad():
        step.losses.append((pairs, losses.detach()))
        margin = settings.beta * records.margin
        bad = (~torch.isfinite(losses)).sum()
        part = torch.stack(
            [weighted, nll, (margin > 0).sum(), margin.sum(), chosen.sum(), rejected.sum(), bad]
        ).double()
    return (weighted + nll) * engine.ranks.world_size, part


def _pairs_of(batch: PackedBatch, units: Sequence[Unit]) -> tuple[list[Pair], Tensor, Tensor]:
    """The pairs whose groups lie in this batch, and the places [B] of their responses among the batch's K."""
    place = {member: k for k, member in enumerate(batch.members)}
    found = [
        (pair, place[index, c], place[index, r])
        for index in dict.fromkeys(group for group, _ in batch.members)
        for pair, (c, r) in zip(units[index].pairs, units[index].slots, strict=True)
    ]
    return [f[0] for f in found], torch.tensor([f[1] for f in found]), torch.tensor([f[2] for f in found])


def _refuse_not_finite(engine: PolicyEngine, step: _Step, totals: Mapping[str, float], allow_gradient: bool) -> None:
    """Stop every rank at the same step, before the weights change.  float16's overflows are DeepSpeed's to skip."""
    gradient_bad = not math.isfinite(totals["gradient"]) and not allow_gradient
    if not totals["not_finite"] and not gradient_bad:
        return
    mine = [
        p
        for pairs, losses in step.losses
        for p, ok in zip(pairs, torch.isfinite(losses).tolist(), strict=True)
        if not ok
    ]
    culprits = [p for part in engine.ranks.gather(mine, "not finite") for p in part]
    what = "loss" if culprits else "gradient"
    names = [f"{p.chosen_id}/{p.rejected_id}" for p in culprits or [p for u in step.units for p in u.pairs]]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise RunError(
        f"training step {engine.step + 1}: the {what} is not finite; the weights were not changed. "
        f"Pairs (chosen/rejected sample): {shown}. Lower training.learning_rate, or look at these samples"
    )
