"""One round of learning from whole groups: every response of a prompt with its P(good), no pairs in between.

A step takes the responses of `responses_per_step` over all ranks, prompts kept whole.  A loss that compares the
responses of a prompt gets them in one piece: a group is never split over micro-batches, whatever `tokens_per_batch`
says.  The loss of a step is the mean over its groups, or over its responses for losses of single ones (KTO).

What says nothing is left out and counted: a prompt with one response, and, where a loss reads only the order, a prompt
whose responses are all worth the same.

Legend: G groups of a micro-batch, K responses.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from align.recipe import Recipe
from align.records import Sample
from align.training.engine import PolicyEngine, Sequence_
from align.training.first_look import response_sums_of, sequence_sums
from align.training.logps import TokenLogProbs
from align.training.losses.groupwise import GroupBatch, kendall_tau
from align.training.losses.unpaired import reference_point
from align.training.packing import PackedBatch
from align.training.scored import ScoredRow, make_steps, rows_of, scored_groups, split_units, whole_unit
from align.training.steps import Part, PlainObjective, TrainReport, Unit, mean_report, response_totals, train_step
from align.training.trainers import OnStep, RoundData, prompts_per_step
from align.training.upload import upload

Rows = Sequence[ScoredRow]
SINGLE = ("kto", "apo_zero_unpaired")
"""Losses of one response at a time."""
WITHOUT_Z = "of a round with one prompt, learned from with KTO's z at 0"
NO_OTHER_PROMPT = (
    "warning: only one prompt has a usable response, so KTO has no other prompt's to estimate its z from and takes 0: "
    "what it trains is apo_zero_unpaired"
)
ORDER_ONLY = ("plackett_luce", "lipo", "ranklist", "ranklist_skip")
"""Losses to which a group of equal utilities says nothing."""


def train_round(engine: PolicyEngine, data: RoundData, recipe: Recipe, on_step: OnStep) -> TrainReport:
    """Train on a round's scored responses.  Collective; see `align.training.trainers.train_round`."""
    training, name, started = recipe.training, recipe.training.loss_facts.name, time.monotonic()
    counts: Counter[str] = Counter()
    groups = usable(scored_groups(data), name, counts)
    responses = sum(map(len, groups.values()))
    counts["without a score or a token"] = len(data.samples) - sum(counts.values()) - responses

    def to_units(rows: Rows) -> list[Unit]:
        return split_units(rows, _sample, training.tokens_per_batch) if name in SINGLE else whole_unit(rows, _sample)

    seeds = [f"{recipe.seed}/{data.round}/{epoch}" for epoch in range(training.epochs)]
    epochs = [make_steps(groups, prompts_per_step(recipe), seed, to_units) for seed in seeds]
    if name == "kto":
        epochs = [with_company(steps) for steps in epochs]
        counts.update(without_z(epochs[0]))
    objective = _objective(engine, [step for steps in epochs for step in steps], recipe)
    rows: list[dict] = []
    for epoch, steps in enumerate(epochs):
        for units in steps:
            before = time.monotonic()
            row = train_step(engine, units, objective, recipe)
            row |= {"round": data.round, "epoch": epoch, "seconds": time.monotonic() - before}
            rows.append(row)
            on_step(row)
    report = mean_report(rows, responses * training.epochs, time.monotonic() - started, counts)
    return replace(report, warnings=(NO_OTHER_PROMPT,)) if counts[WITHOUT_Z] else report


def _sample(row: ScoredRow) -> Sample:
    return row.sample


def usable(groups: Mapping[str, Rows], name: str, counts: Counter[str]) -> dict[str, Rows]:
    """The groups that the loss can learn from; responses of the others are counted by reason."""
    if name in SINGLE:
        return dict(groups)
    kept: dict[str, Rows] = {}
    for prompt, rows in groups.items():
        if len(rows) < 2:
            counts["alone under their prompt"] += len(rows)
        elif name in ORDER_ONLY and len({r.score.p_good for r in rows}) < 2:
            counts["of equal P(good) throughout a prompt"] += len(rows)
        else:
            kept[prompt] = rows
    return kept


def with_company(steps: list[list[Unit[ScoredRow]]]) -> list[list[Unit[ScoredRow]]]:
    """A last step of one prompt joins the one before it: alone, KTO's z would have nothing to be estimated from."""
    if len(steps) < 2 or len({row.sample.prompt_id for unit in steps[-1] for row in unit.rows}) > 1:
        return steps
    return [*steps[:-2], steps[-2] + steps[-1]]


def without_z(steps: Sequence[Sequence[Unit[ScoredRow]]]) -> dict[str, int]:
    """How many responses KTO learns from with z = 0, because their step has no other prompt; empty where none do."""
    alone = sum(len(unit.rows) for units in steps if not mismatches(units) for unit in units)
    return {WITHOUT_Z: alone} if alone else {}


def _objective(engine: PolicyEngine, steps: Sequence[Sequence[Unit]], recipe: Recipe) -> GroupObjective | KtoObjective:
    """The loss with what it knows of the reference, which may be the policy as it is now: before the first step."""
    name, initial = recipe.training.loss_facts.name, recipe.training.reference == "initial"
    samples = {row.sample.id: row.sample for units in steps for unit in units for row in unit.rows}
    reference = response_sums_of(engine, [samples[i] for i in sorted(samples)], initial) if samples else {}
    if name not in SINGLE:
        return GroupObjective(recipe, reference)
    mismatched: dict[tuple[str, str], float] = {}
    if name == "kto":
        keys = {key: sequence for units in steps for key, sequence in mismatches(units).items()}
        mismatched = dict(zip(keys, sequence_sums(engine, list(keys.values()), initial), strict=True))
    return KtoObjective(recipe, reference, mismatched)


def mismatches(units: Sequence[Unit[ScoredRow]]) -> dict[tuple[str, str], Sequence_]:
    """(prompt id, sample id) -> every response of a step behind the prompt after its own, in a circle of prompts.

    Empty where the step has one prompt.  Pairs the responses of a whole step, so neither ranks nor micro-batches
    change it.
    """
    by_prompt: dict[str, list[Sample]] = {}
    for row in sorted((r for unit in units for r in unit.rows), key=lambda r: (r.sample.prompt_id, r.sample.id)):
        by_prompt.setdefault(row.sample.prompt_id, []).append(row.sample)
    prompts = list(by_prompt)
    if len(prompts) < 2:
        return {}
    following = dict(zip(prompts, [*prompts[1:], prompts[0]], strict=True))
    return {
        (following[prompt], sample.id): (by_prompt[following[prompt]][0].prompt_ids, sample.response_ids)
        for prompt, samples in by_prompt.items()
        for sample in samples
    }


class GroupObjective(PlainObjective):
    """A loss of whole groups: the mean over the groups of a step."""

    sums = ("loss", "concordant", "decided", "best", "worst")

    def __init__(self, recipe: Recipe, reference: Mapping[str, float]) -> None:
        facts = recipe.training.loss_facts
        self._loss, self._arguments = facts.function(), facts.arguments(recipe.training.loss)
        self._reference = reference
        self._groups = self._responses = 0  # of the whole step

    def before_step(self, engine: PolicyEngine, shares: Sequence[Sequence[Unit[ScoredRow]]]) -> None:
        """Count what the step's loss is divided by."""
        units = [unit for share in shares for unit in share]
        self._groups, self._responses = len(units), sum(len(u.rows) for u in units)

    def part(self, batch: PackedBatch, units: Sequence[Unit[ScoredRow]], found: TokenLogProbs) -> Part:
        """The micro-batch's share of the global loss and of the metrics."""
        totals, rows = response_totals(batch, found), rows_of(batch, units)
        sizes = [len(list(members)) for _, members in groupby(batch.members, key=lambda m: m[0])]
        records = GroupBatch(
            policy=totals,
            ref=_column([self._reference[r.sample.id] for r in rows], totals),
            utility=_column([r.score.p_good for r in rows], totals),
            sizes=sizes,
        )
        losses = self._loss(records, **self._arguments)
        loss = losses.sum() / self._groups
        with torch.no_grad():
            concordant, decided = kendall_tau(records)
            best, worst = _ends(records)
            told = [loss, concordant.sum(), decided.sum(), best, worst]
            sums = torch.stack([t.double() for t in told]).detach()
        parts = [u for u, _ in groupby(batch.members, key=lambda m: m[0])]
        names = ["/".join(r.sample.id for r in units[u].rows) for u in parts]
        return Part(loss, sums, losses.detach(), names)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Means over the step's groups; `kendall_tau` over the pairs that the utilities decide."""
        return {
            "loss": sums["loss"],
            "kendall_tau": sums["concordant"] / max(sums["decided"], 1.0),
            "best_ratio": sums["best"] / self._groups,
            "worst_ratio": sums["worst"] / self._groups,
            "groups": self._groups,
            "responses": self._responses,
        }


class KtoObjective(PlainObjective):
    """KTO and APO-zero for single responses: the mean over the responses of a step."""

    sums = ("loss", "good", "bad", "good_ratio", "bad_ratio")

    def __init__(
        self, recipe: Recipe, reference: Mapping[str, float], mismatched: Mapping[tuple[str, str], float]
    ) -> None:
        facts = recipe.training.loss_facts
        self._coupled = facts.whole_step
        self._loss, self._arguments = facts.function(), facts.arguments(recipe.training.loss)
        self._reference, self._mismatched = reference, mismatched
        self._responses, self._z_ref = 0, 0.0  # of the whole step

    def before_step(self, engine: PolicyEngine, shares: Sequence[Sequence[Unit[ScoredRow]]]) -> None:
        """Count the responses and, for KTO, ask the policy for the mismatched ones of the whole step."""
        units = [unit for share in shares for unit in share]
        self._responses = sum(len(u.rows) for u in units)
        if self._coupled:
            asked = mismatches(units)
            now = sequence_sums(engine, list(asked.values()), reference=False) if asked else []
            gaps = [policy - self._mismatched[key] for key, policy in zip(asked, now, strict=True)]
            self._z_ref = float(reference_point(torch.tensor(gaps, dtype=torch.float64)))

    def part(self, batch: PackedBatch, units: Sequence[Unit[ScoredRow]], found: TokenLogProbs) -> Part:
        """The micro-batch's share of the global loss and of the metrics."""
        totals, rows = response_totals(batch, found), rows_of(batch, units)
        ratio = totals - _column([self._reference[r.sample.id] for r in rows], totals)
        label = _column([r.score.p_good for r in rows], totals)
        arguments = self._arguments | ({"z_ref": _column(self._z_ref, totals)} if self._coupled else {})
        losses = self._loss(ratio, label, **arguments)
        loss = losses.sum() / self._responses
        with torch.no_grad():
            told = [loss, label.sum(), (1.0 - label).sum(), (label * ratio).sum(), ((1.0 - label) * ratio).sum()]
            sums = torch.stack([t.double() for t in told]).detach()
        return Part(loss, sums, losses.detach(), [r.sample.id for r in rows])

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Means over the step's responses; the log-ratios of good and bad ones weighted by P(good)."""
        return {
            "loss": sums["loss"],
            "good_ratio": sums["good_ratio"] / max(sums["good"], 1e-12),
            "bad_ratio": sums["bad_ratio"] / max(sums["bad"], 1e-12),
            **({"z_ref": self._z_ref} if self._coupled else {}),
            "responses": self._responses,
        }


def _column(values: Sequence[float] | float, like: Tensor) -> Tensor:
    return upload(values, like.dtype, like.device)


def _ends(records: GroupBatch) -> tuple[Tensor, Tensor]:
    """[] sums over groups of the log-ratio of the response worth most, and of the one worth least."""
    ratio, present, utility = records.table(records.ratio), records.present, records.table(records.utility)
    best = utility.masked_fill(~present, -1.0).argmax(1, keepdim=True)
    worst = utility.masked_fill(~present, 2.0).argmin(1, keepdim=True)
    return ratio.gather(1, best).sum(), ratio.gather(1, worst).sum()
