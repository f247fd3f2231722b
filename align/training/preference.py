"""One round of preference training: pairs in, optimizer steps out.

A step takes `pairs_per_step` pairs over all ranks.  Pairs of one prompt stay together, so the prompt and any
response that several pairs share are computed once.  The loss of a step is

    sum over pairs of weight * loss / pairs of the step  +  nll_weight * sum of chosen tokens' -log π / their number,

both counted over all ranks and micro-batches, so neither the number of ranks nor `tokens_per_batch` changes it.
The last step of an epoch may have fewer pairs; it is divided by its own count.

Legend: B pairs of a micro-batch, K responses, N response tokens.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align.recipe import Recipe
from align.records import Pair, Sample
from align.training.engine import PolicyEngine
from align.training.groups import Group, PackedBatch
from align.training.logps import TokenLogProbs
from align.training.losses import PairBatch
from align.training.steps import (
    Part,
    PlainObjective,
    TrainReport,
    Unit,
    mean_report,
    response_totals,
    train_step,
)
from align.training.trainers import OnStep, RoundData


@dataclass(frozen=True, slots=True)
class PairRow:
    """A pair, and where its responses stand in its group."""

    pair: Pair
    chosen: int
    rejected: int


def train_round(engine: PolicyEngine, data: RoundData, recipe: Recipe, on_step: OnStep) -> TrainReport:
    """Train on a round's pairs.  Collective; see `align.training.trainers.train_round`."""
    if not data.pairs:
        raise ValueError("train_round needs at least one pair")
    training = recipe.training
    started = time.monotonic()
    reference: Mapping[str, float] = {}
    if training.loss_facts.reference:
        reference = reference_sums(engine, data.pairs, data.samples, initial=training.reference == "initial")
    objective = PreferenceObjective(recipe, reference)
    rows: list[dict] = []
    for epoch in range(training.epochs):
        for chosen in _steps(data.pairs, training.pairs_per_step, f"{recipe.seed}/{data.round}/{epoch}"):
            before = time.monotonic()
            row = train_step(engine, make_units(chosen, data.samples, training.tokens_per_batch), objective, recipe)
            row |= {"round": data.round, "epoch": epoch, "seconds": time.monotonic() - before}
            rows.append(row)
            on_step(row)
    return mean_report(rows, len(data.pairs) * training.epochs, time.monotonic() - started, {})


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


def make_units(pairs: Sequence[Pair], samples_by_id: Mapping[str, Sample], token_budget: int) -> list[Unit[PairRow]]:
    """Put a step's pairs of one prompt into one group, or into several where one would exceed the budget."""
    by_prompt: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt_id, []).append(pair)
    units: list[Unit[PairRow]] = []
    for members in by_prompt.values():
        taken: list[Pair] = []
        for pair in members:
            if taken and _unit([*taken, pair], samples_by_id).group.tokens > token_budget:
                units.append(_unit(taken, samples_by_id))
                taken = []
            taken.append(pair)
        units.append(_unit(taken, samples_by_id))
    return units


def _unit(pairs: Sequence[Pair], samples_by_id: Mapping[str, Sample]) -> Unit[PairRow]:
    place: dict[str, int] = {}
    for pair in pairs:
        for sample_id in (pair.chosen_id, pair.rejected_id):
            place.setdefault(sample_id, len(place))
    samples = [samples_by_id[i] for i in place]
    group = Group(tuple(samples[0].prompt_ids), tuple(tuple(s.response_ids) for s in samples))
    return Unit(group, tuple(PairRow(p, place[p.chosen_id], place[p.rejected_id]) for p in pairs))


class PreferenceObjective(PlainObjective):
    """The recipe's preference loss on a step's pairs."""

    sums = ("loss", "nll", "accuracy", "margin", "chosen_logprob", "rejected_logprob")

    def __init__(self, recipe: Recipe, reference: Mapping[str, float]) -> None:
        self._settings = recipe.training.loss
        self._facts = recipe.training.loss_facts
        self._loss = self._facts.function()
        self._arguments = self._facts.arguments(self._settings)
        self._reference = reference
        self._pairs = self._chosen_tokens = 0  # of the whole step

    def before_step(self, engine: PolicyEngine, shares: Sequence[Sequence[Unit[PairRow]]]) -> None:
        """Count what the step's loss is divided by."""
        units = [unit for share in shares for unit in share]
        self._pairs = sum(len(u.rows) for u in units)
        self._chosen_tokens = sum(len(u.group.responses[row.chosen]) for u in units for row in u.rows)

    def part(self, batch: PackedBatch, units: Sequence[Unit[PairRow]], found: TokenLogProbs) -> Part:
        """The micro-batch's share of the global loss and of the metrics."""
        rows, chosen_slots, rejected_slots = _rows_of(batch, units)
        totals = response_totals(batch, found)  # [K]
        device = totals.device
        chosen, rejected = totals[chosen_slots.to(device)], totals[rejected_slots.to(device)]

        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        records = PairBatch(
            policy_chosen=chosen,
            policy_rejected=rejected,
            ref_chosen=column([self._reference.get(r.pair.chosen_id, 0.0) for r in rows]),
            ref_rejected=column([self._reference.get(r.pair.rejected_id, 0.0) for r in rows]),
            label=column([r.pair.label for r in rows]),
        )
        losses = self._loss(records, **self._arguments)
        weighted = (column([r.pair.weight for r in rows]) * losses).sum() / self._pairs
        nll = -chosen.sum() * (self._settings.nll_weight / self._chosen_tokens)
        with torch.no_grad():
            margin = self._settings.beta * records.margin
            sums = torch.stack([weighted, nll, (margin > 0).sum(), margin.sum(), chosen.sum(), rejected.sum()])
        names = [f"{r.pair.chosen_id}/{r.pair.rejected_id}" for r in rows]
        return Part(weighted + nll, sums.detach().double(), losses.detach(), names)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Means over the step's pairs."""
        means = {k: sums[k] / self._pairs for k in ("accuracy", "margin", "chosen_logprob", "rejected_logprob")}
        return {"loss": sums["loss"] + sums["nll"], **means, "pairs": self._pairs}


def _rows_of(batch: PackedBatch, units: Sequence[Unit[PairRow]]) -> tuple[list[PairRow], Tensor, Tensor]:
    """The pairs whose groups lie in this batch, and the places [B] of their responses among the batch's K."""
    place = {member: k for k, member in enumerate(batch.members)}
    found = [
        (row, place[index, row.chosen], place[index, row.rejected])
        for index in dict.fromkeys(group for group, _ in batch.members)
        for row in units[index].rows
    ]
    return [f[0] for f in found], torch.tensor([f[1] for f in found]), torch.tensor([f[2] for f in found])
