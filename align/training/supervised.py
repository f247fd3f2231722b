"""One round of supervised training on the policy's own responses: which of them, behind what text, with what weight.

The loss of a step is the mean over its response tokens (`poft`: over its responses, `rlhf_sharpening`: over the pairs
of each prompt's responses, `mml`: over its prompts), counted over all ranks and micro-batches.  A step takes whole
prompts until it holds `responses_per_step` responses that are learned from.

Legend: N response tokens of a micro-batch, K responses, B pairs.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import signature
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from align.recipe import Recipe
from align.recipe_supervised import CONDITIONED, SELF_REWARDED
from align.records import content_id
from align.training import aligned, control, targets
from align.training.engine import PolicyEngine
from align.training.first_look import response_sums_of
from align.training.logps import TokenLogProbs, per_response
from align.training.losses.supervised import TokenBatch
from align.training.packing import PackedBatch
from align.training.scored import per_token, rows_of, split_units, whole_unit
from align.training.steps import Part, PlainObjective, TrainReport, Unit, mean_report, response_totals, train_step
from align.training.targets import Groups, Target
from align.training.thoughts import Masking, masking_of
from align.training.trainers import OnStep, RoundData
from align.training.upload import upload

IMITATED = ("best_of_n", "filter", "sharpening", "rlhf_sharpening", "poft", "masked_thought", "mml", "quark")
"""Losses to which every response is an example, so that one that was cut is left out."""


def train_round(engine: PolicyEngine, data: RoundData, recipe: Recipe, on_step: OnStep) -> TrainReport:
    """Train on the responses of a round that the loss selects.  Collective; see `align.training.trainers`."""
    started = time.monotonic()
    counts: Counter[str] = Counter()
    groups = select(engine, data, recipe, counts)
    kept = sum(map(len, groups.values()))
    objective = objective_for(engine, recipe, data.round)
    rows: list[dict] = []
    for epoch in range(recipe.training.epochs):
        seed = f"{recipe.seed}/{data.round}/{epoch}"
        for members in cut_into_steps(groups, recipe.training.responses_per_step, seed):
            before = time.monotonic()
            objective.begin(seed)
            row = train_step(engine, objective.units(members, recipe.training.tokens_per_batch), objective, recipe)
            row |= {"round": data.round, "epoch": epoch, "seconds": time.monotonic() - before}
            rows.append(row)
            on_step(row)
    return mean_report(rows, kept * recipe.training.epochs, time.monotonic() - started, counts)


def select(engine: PolicyEngine, data: RoundData, recipe: Recipe, counts: Counter[str]) -> Groups:
    """The responses that this round's loss learns from, by prompt; `counts` gets what was left out, by reason."""
    name, settings = recipe.training.loss_facts.name, recipe.training.supervised
    if name in SELF_REWARDED:
        groups = targets.unscored_targets(data.samples.values())
    else:
        groups = targets.scored_targets(data.scores, data.samples, settings)
    groups = targets.long_enough(groups, settings.min_tokens if name in SELF_REWARDED else 1, counts)
    if name in IMITATED:
        groups = targets.finished(groups, counts)
    if name in ("filter", "poft", "masked_thought", "mml"):
        groups = targets.above_threshold(groups, counts)
    if name == "mml":
        return targets.different(groups, counts)
    if name == "best_of_n":
        return targets.best(groups, settings.best, settings.best_fraction, counts)
    if name == "quark":
        return targets.best_quantile(groups, settings.quantiles, settings.quantiles_over, counts)
    if name in SELF_REWARDED:
        return _self_rewarded(engine, groups, recipe, counts)
    if name == "poft":
        return _with_aligned(engine, data, groups, recipe, counts)
    if name in CONDITIONED:
        return _behind_control(engine, groups, recipe, data.round)
    return groups


def _self_rewarded(engine: PolicyEngine, groups: Groups, recipe: Recipe, counts: Counter[str]) -> Groups:
    """Sharpening: the base policy's own opinion, and for SFT the response that it likes best."""
    training = recipe.training
    samples = [t.sample for members in groups.values() for t in members]
    sums = response_sums_of(engine, samples, reference=training.reference == "initial")
    regressed = training.loss_facts.name == "rlhf_sharpening"
    default = "sum" if regressed else "mean"
    groups = targets.with_base(groups, sums, (training.supervised.self_reward or default) == "mean")
    return targets.several(groups, counts) if regressed else targets.most_self_rewarded(groups, counts)


def _with_aligned(
    engine: PolicyEngine, data: RoundData, groups: Groups, recipe: Recipe, counts: Counter[str]
) -> Groups:
    """PoFT: what the aligned models make of every response."""
    settings = recipe.training.supervised
    if settings.aligned_verifier is not None:
        means = aligned.from_verdicts(data.read("verdicts"), settings.aligned_verifier)
    else:
        samples = [t.sample for members in groups.values() for t in members]
        means = aligned.from_models(engine, samples, settings.aligned)
    return targets.with_aligned(groups, means, counts)


def _behind_control(engine: PolicyEngine, groups: Groups, recipe: Recipe, round_index: int) -> Groups:
    """Each response behind the control text of its level, whatever text it was sampled behind."""
    settings = recipe.training.supervised
    texts = control.control_of(recipe, engine.tokenizer)
    if recipe.training.loss_facts.name == "reward_conditioning":
        groups = targets.with_levels(groups, len(settings.control), settings.quantiles_over)

    def told(target: Target) -> Target:
        sample = target.sample
        prompt = texts.bare(sample.prompt_ids, sample.policy_version)
        if not control.dropped(recipe.seed, round_index, sample.id, settings.control_drop_rate):
            prompt = texts.behind(prompt, target.level)
        return replace(target, sample=replace(sample, prompt_ids=prompt))

    return {prompt: [told(t) for t in members] for prompt, members in groups.items()}


def cut_into_steps(groups: Mapping[str, Sequence[Target]], responses: int, seed: str) -> list[list[Sequence[Target]]]:
    """The prompts in a seeded order, each with its targets, cut into steps.

    A step takes prompts while it holds at most `responses` targets; a prompt with more is a step of its own.
    """
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    steps: list[list[Sequence[Target]]] = []
    held = 0
    for prompt in order:
        members = groups[prompt]
        if not steps or held + len(members) > responses:
            steps.append([])
            held = 0
        steps[-1].append(members)
        held += len(members)
    return steps


class _Objective(PlainObjective):
    """What the supervised losses share: the function, its settings, and means over the step."""

    sums: tuple[str, ...] = ("loss", "nll", "good", "divergence")

    def __init__(self, recipe: Recipe) -> None:
        facts = recipe.training.loss_facts
        self._loss = facts.function()
        named = signature(self._loss).parameters
        settings = recipe.training.supervised
        own = {
            "unlikelihood_weight": settings.unlikelihood_weight,
            "weight_cap": settings.weight_cap,
            "mml_beta": settings.mml_beta,
            "kl_weight": settings.kl_weight,
        }
        self._arguments = {**{k: v for k, v in own.items() if k in named}, **facts.arguments(recipe.training.loss)}
        self._prompts = self._responses = self._tokens = self._pairs = 0  # of the whole step

    def begin(self, seed: str) -> None:
        """A step of this epoch begins."""

    def units(self, members: Sequence[Sequence[Target]], token_budget: int) -> list[Unit[Target]]:
        """The step's targets, those behind one prompt together."""
        by_prompt: dict[tuple[int, ...], list[Target]] = {}
        for target in (t for of_prompt in members for t in of_prompt):
            by_prompt.setdefault(target.sample.prompt_ids, []).append(target)
        return [u for rows in by_prompt.values() for u in split_units(rows, lambda t: t.sample, token_budget)]

    def before_step(self, engine: PolicyEngine, shares: Sequence[Sequence[Unit[Target]]]) -> None:
        """Count what the step's loss is divided by."""
        units = [unit for share in shares for unit in share]
        self._prompts = len(units)
        self._responses = sum(len(u.rows) for u in units)
        self._tokens = sum(len(r) for u in units for r in u.group.responses)
        self._pairs = sum(len(u.rows) * (len(u.rows) - 1) // 2 for u in units)

    def _part(self, loss: Tensor, losses: Tensor, rows: Sequence[Target], found: TokenLogProbs) -> Part:
        good = sum(t.good for t in rows)
        with torch.no_grad():
            nothing = torch.zeros_like(loss)
            divergence = nothing if found.divergence is None else found.divergence.sum()
            sums = torch.stack([loss, -found.logprobs.sum(), nothing + good, divergence]).double()
        return Part(loss, sums, losses.detach(), [t.sample.id for t in rows])

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The loss, the mean -log π of a token, the share of good responses, how many there are; Quark's KL."""
        found = {
            "loss": sums["loss"],
            "nll": sums["nll"] / self._tokens,
            "good": sums["good"] / self._responses,
            "responses": self._responses,
        }
        return found | ({"divergence": sums["divergence"] / self._tokens} if self.head else {})


class TokenObjective(_Objective):
    """A loss of tokens: its mean over the step's tokens."""

    def __init__(self, recipe: Recipe, masking: Masking | None = None) -> None:
        super().__init__(recipe)
        self._divergence = recipe.training.loss_facts.name == "quark" and recipe.training.supervised.kl_weight > 0
        self._masking = masking

    @property
    def head(self) -> dict[str, Any]:
        """With a KL, the exact one."""
        return {"divergence": True} if self._divergence else {}

    def begin(self, seed: str) -> None:
        """Masks are drawn anew in every epoch."""
        if self._masking is not None:
            self._masking = replace(self._masking, seed=seed)

    def before_step(self, engine: PolicyEngine, shares: Sequence[Sequence[Unit[Target]]]) -> None:
        """Also how far the warm-up of the masks has come."""
        super().before_step(engine, shares)
        if self._masking is not None:
            self._masking = replace(self._masking, step=engine.step)

    def inputs(self, batch: PackedBatch, units: Sequence[Unit[Target]]) -> PackedBatch:
        """The batch, with tokens hidden where the recipe says so."""
        if self._masking is None:
            return batch
        return self._masking.hide(batch, [content_id(t.sample.id) for t in rows_of(batch, units)])

    def part(self, batch: PackedBatch, units: Sequence[Unit[Target]], found: TokenLogProbs) -> Part:
        """The micro-batch's share."""
        rows, device, count = rows_of(batch, units), found.logprobs.device, len(found.logprobs)
        lengths = upload(batch.lengths.tolist(), torch.int64, device)

        def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return per_token(upload(values, dtype, device), lengths, count)

        tokens = TokenBatch(
            logprobs=found.logprobs,
            score=column([t.score for t in rows]),
            value=column([t.value for t in rows]),
            good=column([t.good for t in rows], torch.bool),
            kl=found.divergence,
        )
        losses = self._loss(tokens, **self._arguments)
        return self._part(losses.sum() / self._tokens, per_response(losses, lengths), rows, found)


class ResponseObjective(_Objective):
    """PoFT: a loss of each response's mean token log-probability."""

    def part(self, batch: PackedBatch, units: Sequence[Unit[Target]], found: TokenLogProbs) -> Part:
        """The micro-batch's share."""
        rows, totals = rows_of(batch, units), response_totals(batch, found)
        reference = upload([t.aligned for t in rows], totals.dtype, totals.device)
        lengths = upload(batch.lengths.tolist(), totals.dtype, totals.device)
        losses = self._loss(totals / lengths, reference, **self._arguments)
        return self._part(losses.sum() / self._responses, losses, rows, found)


class _WholePrompts(_Objective):
    """A loss that couples the responses of a prompt, so that they stay together."""

    def units(self, members: Sequence[Sequence[Target]], token_budget: int) -> list[Unit[Target]]:
        """One unit a prompt, whatever its size."""
        return [unit for rows in members for unit in whole_unit(rows, lambda t: t.sample)]

    @staticmethod
    def _places(batch: PackedBatch) -> list[list[int]]:
        """The places of each prompt's responses among the batch's K."""
        of_unit: dict[int, list[int]] = {}
        for k, (unit, _) in enumerate(batch.members):
            of_unit.setdefault(unit, []).append(k)
        return list(of_unit.values())


class PromptObjective(_WholePrompts):
    """MML: a loss of all good responses of a prompt together."""

    def part(self, batch: PackedBatch, units: Sequence[Unit[Target]], found: TokenLogProbs) -> Part:
        """The micro-batch's share."""
        rows, totals, places = rows_of(batch, units), response_totals(batch, found), self._places(batch)
        most = max(map(len, places))
        index = upload([[*ks, *ks[:1] * (most - len(ks))] for ks in places], torch.int64, totals.device)
        counted = upload([[i < len(ks) for i in range(most)] for ks in places], torch.bool, totals.device)
        losses = self._loss(totals[index], counted, **self._arguments)
        part = self._part(losses.sum() / self._prompts, losses, rows, found)
        return replace(part, names=[rows[ks[0]].sample.prompt_id for ks in places])


class PairObjective(_WholePrompts):
    """RLHF-sharpening: a loss of every two responses of a prompt."""

    def part(self, batch: PackedBatch, units: Sequence[Unit[Target]], found: TokenLogProbs) -> Part:
        """The micro-batch's share."""
        rows, totals = rows_of(batch, units), response_totals(batch, found)

        def column(values: Sequence[float]) -> Tensor:
            return upload(values, totals.dtype, totals.device)

        ratio = totals - column([t.base for t in rows])
        own = column([t.self_reward for t in rows])
        of_prompts = [p for ks in self._places(batch) for p in combinations(ks, 2)]
        pairs = upload(of_prompts, torch.int64, totals.device).t()
        losses = self._loss(ratio[pairs[0]] - ratio[pairs[1]], own[pairs[0]] - own[pairs[1]], **self._arguments)
        found_part = self._part(losses.sum() / self._pairs, losses, rows, found)
        names = [f"{rows[a].sample.id}/{rows[b].sample.id}" for a, b in of_prompts]
        return replace(found_part, names=names)


def objective_for(engine: PolicyEngine, recipe: Recipe, round_index: int) -> Any:
    """The objective of the recipe's loss."""
    name = recipe.training.loss_facts.name
    if name == "poft":
        return ResponseObjective(recipe)
    if name == "rlhf_sharpening":
        return PairObjective(recipe)
    if name == "mml":
        return PromptObjective(recipe)
    return TokenObjective(recipe, masking_of(recipe, engine.tokenizer) if name == "masked_thought" else None)
