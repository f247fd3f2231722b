"""One round of preference training: pairs in, optimizer steps out.

A step takes `pairs_per_step` pairs over all ranks.  Pairs of one prompt stay together, so the prompt and any
response that several pairs share are computed once.  The loss of a step is

    sum over pairs of weight * loss / pairs of the step  +  nll_weight * sum of chosen tokens' -log π / their number,

both counted over all ranks and micro-batches, so neither the number of ranks nor `tokens_per_batch` changes it.  WPO
multiplies the weight by how likely the policy is to write the two responses.
The last step of an epoch may have fewer pairs; it is divided by its own count.

Legend: B pairs of a micro-batch, K responses, N response tokens.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align.recipe import Recipe
from align.records import Pair, Sample
from align.training.engine import PolicyEngine
from align.training.logps import TokenLogProbs, per_response
from align.training.losses.divergence import with_divergence
from align.training.losses.pairs import PairBatch
from align.training.losses.tokens import wpo_log_weights
from align.training.packing import Group, PackedBatch
from align.training.pair_sums import PairSums, ld_totals, pair_sums
from align.training.steps import (
    Part,
    PlainObjective,
    TrainReport,
    Unit,
    mean_report,
    train_step,
)
from align.training.trainers import OnStep, RoundData
from align.training.upload import upload


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
    reference: PairSums = {}
    if training.loss_facts.reference and training.reference_sync is None:
        initial = training.reference == "initial"
        reference = pair_sums(engine, data.pairs, data.samples, training.loss.ld_alpha, reference=initial)
    objective = PreferenceObjective(recipe, reference, data.samples)
    rows: list[dict] = []
    for epoch in range(training.epochs):
        for chosen in _steps(data.pairs, training.pairs_per_step, f"{recipe.seed}/{data.round}/{epoch}"):
            before = time.monotonic()
            row = train_step(engine, make_units(chosen, data.samples, training.tokens_per_batch), objective, recipe)
            sync = training.reference_sync
            if sync is not None and engine.step % sync.every_steps == 0:
                engine.move_reference(sync.mix)
            row |= {"round": data.round, "epoch": epoch, "seconds": time.monotonic() - before}
            rows.append(row)
            on_step(row)
    return mean_report(rows, len(data.pairs) * training.epochs, time.monotonic() - started, {})


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
    """The recipe's preference loss on a step's pairs.

    A loss that couples the whole step is differentiated once, on the log-probabilities of a first pass over all
    pairs; each micro-batch then gives its terms of sum_i (d loss / d log π_i) log π_i, which has the same gradient.
    """

    sums = ("loss", "nll", "accuracy", "margin", "chosen_logprob", "rejected_logprob", "reward", "wpo_weight")

    def __init__(self, recipe: Recipe, reference: PairSums, samples: Mapping[str, Sample]) -> None:
        self._settings = recipe.training.loss
        self._facts = recipe.training.loss_facts
        self._loss = self._facts.function()
        self._arguments = self._facts.arguments(self._settings)
        self._running = "reward_shift" in self._facts.options and self._settings.reward_shift == "running"
        self._live = recipe.training.reference_sync is not None
        self._reference, self._samples = reference, samples
        self._pairs = self._chosen_tokens = 0  # of the whole step
        self._slopes: dict[str, tuple[float, float, float]] = {}  # whole-step losses: loss, and its slopes, by pair
        self._state: dict[str, Any] = {}  # the engine's

    @property
    def head(self) -> dict[str, Any]:
        """WPO asks how peaked each token's distribution is."""
        return {"squares": True} if self._settings.wpo else {}

    def before_step(self, engine: PolicyEngine, shares: Sequence[Sequence[Unit[PairRow]]]) -> None:
        """Count what the step's loss is divided by, and do what needs all pairs of the step."""
        units = [unit for share in shares for unit in share]
        self._pairs = sum(len(u.rows) for u in units)
        self._chosen_tokens = sum(len(u.group.responses[row.chosen]) for u in units for row in u.rows)
        self._state = engine.trainer_state
        if self._running:
            self._arguments["shift"] = self._state.get("mean_reward", 0.0)
        pairs = [row.pair for unit in units for row in unit.rows]
        if self._live:
            self._reference = pair_sums(engine, pairs, self._samples, self._settings.ld_alpha, reference="moving")
        if self._facts.whole_step:
            sums = pair_sums(engine, pairs, self._samples, self._settings.ld_alpha, reference=False)
            self._slopes = self._differentiate(pairs, sums)

    def _differentiate(self, pairs: Sequence[Pair], sums: PairSums) -> dict[str, tuple[float, float, float]]:
        """By pair: its loss, and what the step's loss changes by per nat of its chosen and rejected response."""
        both = torch.tensor([sums[p.id] for p in pairs], dtype=torch.float64).T.contiguous().requires_grad_()
        with torch.enable_grad():
            batch = self._batch(pairs, both[0], both[1])
            losses = self._loss(batch, **self._arguments)
            (slope,) = torch.autograd.grad((batch.weight * losses).sum() / self._pairs, both)
        columns = (losses.detach().tolist(), *slope.tolist())
        return {p.id: numbers for p, *numbers in zip(pairs, *columns, strict=True)}  # type: ignore[misc]

    def _batch(self, pairs: Sequence[Pair], chosen: Tensor, rejected: Tensor) -> PairBatch:
        """The pairs with these sums [B] as the policy's."""
        reference = [self._reference.get(p.id, (0.0, 0.0)) for p in pairs]
        columns = [
            [c for c, _ in reference],
            [r for _, r in reference],
            [p.label for p in pairs],
            [p.weight for p in pairs],
            [len(self._samples[p.chosen_id].response_ids) for p in pairs],
            [len(self._samples[p.rejected_id].response_ids) for p in pairs],
        ]
        names = ("ref_chosen", "ref_rejected", "label", "weight", "chosen_length", "rejected_length")
        known = dict(zip(names, upload(columns, chosen.dtype, chosen.device), strict=True))
        batch = PairBatch(chosen, rejected, **known, tokens_per_pair=self._chosen_tokens / self._pairs)
        return with_divergence(batch, self._settings.divergence, self._settings.divergence_alpha)

    def part(self, batch: PackedBatch, units: Sequence[Unit[PairRow]], found: TokenLogProbs) -> Part:
        """The micro-batch's share of the global loss and of the metrics."""
        rows, slots = _rows_of(batch, units)
        pairs = [row.pair for row in rows]
        # A margin is a small difference of sums over many tokens: in float32 most of its digits would be gone.
        logprobs, device = found.logprobs.double(), found.logprobs.device
        lengths = upload(batch.lengths.tolist(), torch.int64, device)
        places = upload(slots, torch.int64, device).T  # [2, B]
        plain = per_response(logprobs, lengths)[places]  # [2, B]
        alpha = self._settings.ld_alpha
        sums = plain if alpha is None else ld_totals(logprobs, batch.lengths.tolist(), slots, alpha)
        records = self._batch(pairs, sums[0], sums[1])
        likely = torch.ones_like(records.weight)
        if found.squares is not None:
            likely = wpo_log_weights(logprobs, found.squares, lengths)[places].sum(0).exp()
        weight = records.weight * likely
        if self._facts.whole_step:
            known = upload([self._slopes[p.id] for p in pairs], torch.float64, device).T
            losses = known[0]
            to_differentiate = (known[1:] * sums).sum()
        else:
            losses = self._loss(records, **self._arguments)
            to_differentiate = (weight * losses).sum() / self._pairs
        nll = -plain[0].sum() * (self._settings.nll_weight / self._chosen_tokens)
        with torch.no_grad():
            beta = self._settings.beta
            seen = {
                "loss": (weight * losses).sum() / self._pairs,
                "nll": nll,
                "accuracy": (records.margin > 0).sum(),
                "margin": beta * records.margin.sum(),
                "chosen_logprob": plain[0].sum(),
                "rejected_logprob": plain[1].sum(),
                "reward": beta * (records.chosen + records.rejected).sum() / 2,
                "wpo_weight": likely.sum(),
            }
            totals = torch.stack([seen[name].detach().double() for name in self.sums])
        names = [f"{p.chosen_id}/{p.rejected_id}" for p in pairs]
        return Part(to_differentiate + nll, totals, losses.detach(), names)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Means over the step's pairs; BCO's mean reward takes this step in."""
        means = {k: sums[k] / self._pairs for k in ("accuracy", "margin", "chosen_logprob", "rejected_logprob")}
        if self._settings.wpo:
            means["wpo_weight"] = sums["wpo_weight"] / self._pairs
        if self._running:
            before, mean = self._state.get("rewards", 0), self._state.get("mean_reward", 0.0)
            self._state["rewards"] = before + self._pairs
            self._state["mean_reward"] = mean + (sums["reward"] / self._pairs - mean) * self._pairs / (
                before + self._pairs
            )
            means["reward_shift"] = mean
        return {"loss": sums["loss"] + sums["nll"], **means, "pairs": self._pairs}


def _rows_of(batch: PackedBatch, units: Sequence[Unit[PairRow]]) -> tuple[list[PairRow], list[tuple[int, int]]]:
    """The pairs whose groups lie in this batch, and the places (chosen, rejected) among its K responses."""
    place = {member: k for k, member in enumerate(batch.members)}
    found = [
        (row, (place[index, row.chosen], place[index, row.rejected]))
        for index in dict.fromkeys(group for group, _ in batch.members)
        for row in units[index].rows
    ]
    return [row for row, _ in found], [slots for _, slots in found]
