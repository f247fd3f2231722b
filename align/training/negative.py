"""One round of learning from wrong answers: D2O, NSR, PSR, W-REINFORCE and unlikelihood.

P(good) becomes a sign by two thresholds of the recipe: right (+1) from `right_from` on, wrong (-1) below
`wrong_below`, and between the two a response is left out and counted.  Only responses that the loss acts on are
computed.  The loss of a step is the sum over their tokens, divided by the tokens of all judged responses of the step
(`denominator: all`) or of those computed (`trained`), less `entropy_bonus` times the mean entropy of the latter.  D2O
sets the policy's own good responses to a prompt against a bad answer that came with it, or against the worst response
where the recipe names no column of such answers; its loss is the mean over prompts.

A step without anything to act on, such as one where all answers are right, is passed over and counted.  Where the
entropy of a token falls below `entropy_stop` of what it was in the first step of the run, training ends for good: the
stop is part of the checkpoint, so a resumed run keeps it, and of the round's report, so the loop begins no round after.

Legend: N response tokens, K responses, G prompts of a micro-batch.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.recipe import Recipe
from align.recipe_negative import Negative
from align.records import Given, Sample
from align.training.engine import PolicyEngine
from align.training.first_look import response_sums_of, response_tokens_of
from align.training.logps import TokenLogProbs, per_response
from align.training.losses.negative import TokenBatch
from align.training.packing import PackedBatch
from align.training.scored import ScoredRow, make_steps, per_token, rows_of, scored_groups, split_units, whole_unit
from align.training.steps import Part, PlainObjective, TrainReport, Unit, mean_report, response_totals, train_step
from align.training.trainers import OnStep, RoundData, prompts_per_step
from align.training.upload import upload

STATE = "negative"
"""Where `PolicyEngine.trainer_state` keeps the first step's entropy and the stop."""
SIDES = {"psr": (1,), "nsr": (-1,), "unlikelihood": (-1,), "w_reinforce": (1, -1)}
"""The signs that each loss acts on."""
D2O_ENTROPY_STOP = 0.25


@dataclass(frozen=True, slots=True)
class SignedRow:
    """A response with its sign; for D2O +1 is an own sample and -1 the answer it stands against."""

    sample: Sample
    sign: int


@dataclass(frozen=True)
class Step:
    """What one optimizer step computes, and the tokens of everything that was judged."""

    units: list[Unit[SignedRow]]
    judged_tokens: int


def train_round(engine: PolicyEngine, data: RoundData, recipe: Recipe, on_step: OnStep) -> TrainReport:
    """Train on a round's scored responses.  Collective; see `align.training.trainers.train_round`."""
    training, started = recipe.training, time.monotonic()
    counts: Counter[str] = Counter()
    state = engine.trainer_state.setdefault(STATE, {})
    if "stopped" in state:
        return mean_report([], 0, time.monotonic() - started, {}, stopped=state["stopped"])
    d2o = training.algorithm == "d2o"
    groups = scored_groups(data)
    counts["without a score or a token"] = len(data.samples) - sum(map(len, groups.values()))
    signed = _signed(groups, data, recipe, counts)
    plans = [
        list(_steps(signed, recipe, f"{recipe.seed}/{data.round}/{epoch}", Counter() if epoch else counts))
        for epoch in range(training.epochs)
    ]
    objective = (_d2o if d2o else _reinforcing)(engine, [step for steps in plans for step in steps], recipe)
    rows: list[dict] = []
    for epoch, steps in enumerate(plans):
        for step in steps:
            if "stopped" in state:
                counts["responses after the stop"] += sum(len(u.rows) for u in step.units)
                continue
            before = time.monotonic()
            objective.judged_tokens = step.judged_tokens
            row = train_step(engine, step.units, objective, recipe)
            row |= {"round": data.round, "epoch": epoch, "seconds": time.monotonic() - before}
            _look_at_entropy(state, row, recipe)
            rows.append(row)
            on_step(row)
    trained = sum(row["responses"] for row in rows)
    return mean_report(rows, trained, time.monotonic() - started, counts, stopped=state.get("stopped", ""))


def _signed(
    groups: Mapping[str, Sequence[ScoredRow]], data: RoundData, recipe: Recipe, counts: Counter[str]
) -> dict[str, list[SignedRow]]:
    """The round's responses with the signs that its algorithm gives them."""
    settings = recipe.training.negative
    if recipe.training.algorithm != "d2o":
        return signs(groups, settings, counts)
    if settings.dispreferred_column is None:
        return against_worst(groups, settings, counts)
    return against_given(groups, data.dispreferred, settings, counts)


def signs(
    groups: Mapping[str, Sequence[ScoredRow]], settings: Negative, counts: Counter[str]
) -> dict[str, list[SignedRow]]:
    """P(good) as ±1; what lies between the thresholds is left out and counted."""
    out: dict[str, list[SignedRow]] = {}
    for prompt, rows in groups.items():
        kept = []
        for row in rows:
            if row.score.p_good >= settings.right_from:
                kept.append(SignedRow(row.sample, 1))
            elif row.score.p_good < settings.wrong_below:
                kept.append(SignedRow(row.sample, -1))
            else:
                counts["between wrong_below and right_from"] += 1
        if kept:
            out[prompt] = kept
    return out


def against_worst(
    groups: Mapping[str, Sequence[ScoredRow]], settings: Negative, counts: Counter[str]
) -> dict[str, list[SignedRow]]:
    """D2O: each prompt's worst response, where that is wrong, and up to `self_samples` others that pass `self_from`."""
    out: dict[str, list[SignedRow]] = {}
    for prompt, rows in groups.items():
        *others, worst = sorted(rows, key=lambda r: (-r.score.p_good, r.sample.id))
        if worst.score.p_good >= settings.wrong_below:
            counts["of a prompt without a wrong response"] += len(rows)
            continue
        own = _own_samples(others, settings, counts)
        if own:
            out[prompt] = [*own, SignedRow(worst.sample, -1)]
    return out


def against_given(
    groups: Mapping[str, Sequence[ScoredRow]], given: Mapping[str, Given], settings: Negative, counts: Counter[str]
) -> dict[str, list[SignedRow]]:
    """D2O as published: each prompt's given answer, and up to `self_samples` responses that pass `self_from`.

    A response with the text of that answer, but for white space around it, would stand against itself.
    """
    out: dict[str, list[SignedRow]] = {}
    for prompt, rows in groups.items():
        bad = given[prompt]
        others = [row for row in rows if row.sample.text.strip() != bad.text.strip()]
        counts["own samples with the text of the dispreferred answer"] += len(rows) - len(others)
        own = _own_samples(others, settings, counts)
        if own:
            out[prompt] = [*own, SignedRow(_as_sample(bad, own[0].sample), -1)]
    return out


def _own_samples(rows: Sequence[ScoredRow], settings: Negative, counts: Counter[str]) -> list[SignedRow]:
    """Up to `self_samples` of the responses that pass `self_from`, in the order of their ids."""
    own = sorted((r.sample for r in rows if r.score.p_good >= settings.self_from), key=lambda s: s.id)
    counts["own samples below self_from"] += len(rows) - len(own)
    counts["wrong responses without an own sample to stand against"] += not own
    counts["own samples beyond self_samples"] += max(0, len(own) - settings.self_samples)
    return [SignedRow(s, 1) for s in own[: settings.self_samples]]


def _as_sample(answer: Given, beside: Sample) -> Sample:
    """A given answer in the place of a response to the same prompt; the policy did not draw it."""
    name, ids = f"dispreferred:{beside.prompt_id}", answer.response_ids
    return replace(beside, id=name, response_ids=ids, logprobs=(), text=answer.text, finish_reason="stop")


def _sample(row: SignedRow) -> Sample:
    return row.sample


def _steps(
    signed: Mapping[str, Sequence[SignedRow]], recipe: Recipe, seed: str, counts: Counter[str]
) -> Iterator[Step]:
    """The round's steps; responses that the loss does not act on are judged but not computed."""
    training = recipe.training
    sides = SIDES.get(training.algorithm, (1, -1))
    if training.algorithm == "w_reinforce" and training.negative.positive_weight == 0:
        sides = (-1,)
    for judged in make_steps(signed, prompts_per_step(recipe), seed, lambda rows: rows):
        units: list[Unit[SignedRow]] = []
        for _, members in groupby(judged, key=lambda r: r.sample.prompt_id):
            rows = [r for r in members if r.sign in sides]
            if training.algorithm == "d2o":
                units += whole_unit(rows, _sample)
            elif rows:
                units += split_units(rows, _sample, training.tokens_per_batch)
        trained = sum(len(u.rows) for u in units)
        if len(sides) == 1:
            counts["right" if sides == (-1,) else "wrong"] += len(judged) - trained
        if units:
            yield Step(units, sum(len(r.sample.response_ids) for r in judged))
        else:
            counts["steps with nothing to act on"] += 1


def _look_at_entropy(state: dict[str, Any], row: Mapping[str, Any], recipe: Recipe) -> None:
    """Remember the first step's entropy, and stop below the recipe's share of it."""
    share = recipe.training.negative.entropy_stop
    if share is None:
        share = D2O_ENTROPY_STOP if recipe.training.algorithm == "d2o" else 0.0
    first = state.setdefault("first_entropy", row["entropy"])
    if row["entropy"] < share * first:
        state["stopped"] = (
            f"step {row['step']}: the entropy of a token is {row['entropy']:.4f} nats, below {share:g} of the "
            f"{first:.4f} of the first step (training.negative.entropy_stop)"
        )


class _Counting(PlainObjective):
    """What both objectives count over a whole step."""

    judged_tokens = 0

    def __init__(self, recipe: Recipe) -> None:
        facts = recipe.training.loss_facts
        self._settings = recipe.training.negative
        options = {**facts.arguments(recipe.training.loss), **_own_arguments(facts.function(), self._settings)}
        self._loss: Callable[..., Tensor] = partial(facts.function(), **options)
        self._groups = self._responses = self._tokens = 0

    def before_step(self, engine: PolicyEngine, shares: Sequence[Sequence[Unit[SignedRow]]]) -> None:
        """Count what the step's loss and metrics are divided by."""
        units = [unit for share in shares for unit in share]
        rows = [row for unit in units for row in unit.rows]
        self._groups, self._responses = len(units), len(rows)
        self._tokens = sum(len(r.sample.response_ids) for r in rows if self.measures(r))

    def measures(self, row: SignedRow) -> bool:
        """Whether the row's entropy counts in the mean."""
        return True


def _own_arguments(function: Callable[..., Any], settings: Negative) -> dict[str, Any]:
    """The settings of the block that the loss takes by name."""
    taken = signature(function).parameters
    return {key: getattr(settings, key) for key in ("form", "clip", "positive_weight") if key in taken}


class SignedObjective(_Counting):
    """NSR, PSR, W-REINFORCE and unlikelihood: a loss per token, by the sign of its response."""

    sums = ("loss", "entropy", "right", "right_logprob", "wrong_logprob", "moved")

    def __init__(self, recipe: Recipe, old: Mapping[str, np.ndarray]) -> None:
        super().__init__(recipe)
        self._old, self._temperature = old, recipe.sampling.temperature

    @property
    def head(self) -> dict[str, Any]:
        """At the temperature that the responses were drawn at."""
        return {"entropy": True, "temperature": self._temperature}

    @property
    def pulls_entropy(self) -> bool:
        """With a bonus; otherwise they are looked at only."""
        return self._settings.entropy_bonus > 0

    def part(self, batch: PackedBatch, units: Sequence[Unit[SignedRow]], found: TokenLogProbs) -> Part:
        """The micro-batch's share of the global loss and of the metrics."""
        rows, logprobs, entropies = rows_of(batch, units), found.logprobs, found.entropies
        assert entropies is not None
        lengths = upload(batch.lengths.tolist(), torch.int64, logprobs.device)
        sign = upload([float(r.sign) for r in rows], logprobs.dtype, logprobs.device)  # [K]
        old = logprobs.detach()
        if self._old:
            old = upload(np.concatenate([self._old[r.sample.id] for r in rows]), logprobs.dtype, logprobs.device)
        by_token = self._loss(TokenBatch(logprobs, old, per_token(sign, lengths, len(logprobs))))
        losses = per_response(by_token, lengths)  # [K]
        divisor = self.judged_tokens if self._settings.denominator == "all" else self._tokens
        bonus = entropies.sum() * (self._settings.entropy_bonus / self._tokens)
        loss = losses.sum() / divisor - bonus
        with torch.no_grad():
            totals = per_response(logprobs, lengths)
            right = sign > 0
            ratio, clip = (logprobs - old).exp(), self._settings.clip
            moved = ((ratio < 1.0 - clip) | (ratio > 1.0 + clip)).sum()
            told = [loss, entropies.sum(), right.sum(), (totals * right).sum(), (totals * ~right).sum(), moved]
            sums = torch.stack([t.double() for t in told]).detach()
        return Part(loss, sums, losses.detach(), [r.sample.id for r in rows])

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Means over the step; `moved` is the share of tokens whose ratio, if any, has left the clipping range."""
        wrong = self._responses - sums["right"]
        return {
            "loss": sums["loss"],
            "entropy": sums["entropy"] / self._tokens,
            "right": sums["right"],
            "wrong": wrong,
            "right_logprob": sums["right_logprob"] / max(sums["right"], 1.0),
            "wrong_logprob": sums["wrong_logprob"] / max(wrong, 1.0),
            **({"moved": sums["moved"] / self._tokens} if self._old else {}),
            "responses": self._responses,
        }


class D2oObjective(_Counting):
    """D2O: each prompt's own samples, by the mean of their log-ratios, against its wrong answer."""

    sums = ("loss", "entropy", "own_ratio", "wrong_ratio", "accuracy")

    def __init__(self, recipe: Recipe, reference: Mapping[str, float]) -> None:
        super().__init__(recipe)
        self._reference = reference

    @property
    def head(self) -> dict[str, Any]:
        """Entropies too, for the stop."""
        return {"entropy": True}

    @property
    def pulls_entropy(self) -> bool:
        """They are looked at only."""
        return False

    def measures(self, row: SignedRow) -> bool:
        """The policy's own samples tell of its entropy; a wrong answer that dies out does not."""
        return row.sign > 0

    def part(self, batch: PackedBatch, units: Sequence[Unit[SignedRow]], found: TokenLogProbs) -> Part:
        """The micro-batch's share of the global loss and of the metrics."""
        totals, rows = response_totals(batch, found), rows_of(batch, units)
        device, entropies = totals.device, found.entropies
        assert entropies is not None
        ratio = totals - upload([self._reference[r.sample.id] for r in rows], totals.dtype, device)
        own = upload([r.sign > 0 for r in rows], torch.bool, device)
        sizes = [len(list(members)) for _, members in groupby(batch.members, key=lambda m: m[0])]
        groups = upload(sizes, torch.int64, device)
        own_ratio = per_response(torch.where(own, ratio, 0.0), groups) / (groups - 1)
        wrong_ratio = per_response(torch.where(own, 0.0, ratio), groups)
        losses = self._loss(own_ratio, wrong_ratio)
        loss = losses.sum() / self._groups
        with torch.no_grad():
            lengths = upload(batch.lengths.tolist(), torch.int64, device)
            entropy = (per_response(entropies.detach(), lengths) * own).sum()
            told = [loss, entropy, own_ratio.sum(), wrong_ratio.sum(), (own_ratio > wrong_ratio).sum()]
            sums = torch.stack([t.double() for t in told]).detach()
        parts = [u for u, _ in groupby(batch.members, key=lambda m: m[0])]
        names = ["/".join(r.sample.id for r in units[u].rows) for u in parts]
        return Part(loss, sums, losses.detach(), names)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Means over the step's prompts; the entropy over the tokens of own samples."""
        means = {k: sums[k] / self._groups for k in ("own_ratio", "wrong_ratio", "accuracy")}
        counted = {"groups": self._groups, "responses": self._responses}
        return {"loss": sums["loss"], "entropy": sums["entropy"] / self._tokens, **means, **counted}


def _trained(steps: Sequence[Step]) -> list[Sample]:
    samples = {row.sample.id: row.sample for step in steps for unit in step.units for row in unit.rows}
    return [samples[i] for i in sorted(samples)]


def _d2o(engine: PolicyEngine, steps: Sequence[Step], recipe: Recipe) -> D2oObjective:
    samples, initial = _trained(steps), recipe.training.reference == "initial"
    return D2oObjective(recipe, response_sums_of(engine, samples, initial) if samples else {})


def _reinforcing(engine: PolicyEngine, steps: Sequence[Step], recipe: Recipe) -> SignedObjective:
    samples, training = _trained(steps), recipe.training
    if not samples or training.algorithm == "unlikelihood" or training.negative.form != "ratio":
        return SignedObjective(recipe, {})
    return SignedObjective(recipe, response_tokens_of(engine, samples, recipe.sampling.temperature))
