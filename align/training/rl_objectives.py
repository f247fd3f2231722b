"""What a policy gradient computes on a step: the loss of every token, of every two responses, and of the critic.

The numbers of a round lie in flat arrays; a micro-batch finds its tokens in them.

Legend: N response tokens of a batch (of the round in NumPy), K responses, B pairs of responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.recipe import Recipe
from align.recipe_rl import PolicyGradient
from align.training import kl
from align.training.engine import PolicyEngine
from align.training.logps import TokenLogProbs
from align.training.losses import policy_gradient as losses
from align.training.packing import PackedBatch
from align.training.rollouts import Estimates, Rollouts
from align.training.steps import Part, PlainObjective, Unit, response_totals
from align.training.upload import upload

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class ResponseRow:
    """A response of a unit, by its place in the round."""

    sample_id: str
    place: int  # among the K responses of the round
    start: int  # of its tokens among the round's


@dataclass(frozen=True)
class Columns:
    """What the round knows of each token, as float32."""

    old: Array  # [N]
    advantages: Array  # [N]
    reference: Array | None
    weights: Array | None  # importance weights
    values: Array | None
    returns: Array | None


def to_columns(rollouts: Rollouts, result: Estimates, rl: PolicyGradient) -> Columns:
    """What the objectives read, in float32."""

    def lean(values: Array | None) -> Array | None:
        return None if values is None else values.astype(np.float32)

    weights = None
    if rl.importance_cap is not None:
        assert rollouts.sampler is not None
        old, sampler = torch.from_numpy(rollouts.old), torch.from_numpy(rollouts.sampler)
        weights = losses.importance_weights(old, sampler, rl.importance_cap).numpy()
    return Columns(
        old=rollouts.old.astype(np.float32),
        advantages=result.advantages.astype(np.float32),
        reference=lean(rollouts.reference),
        weights=lean(weights),
        values=lean(rollouts.values),
        returns=lean(result.returns),
    )


class _Objective(PlainObjective):
    """What the objectives share: the step's counts, and the round's numbers for a batch's tokens."""

    def __init__(self, recipe: Recipe, columns: Columns) -> None:
        self._rl, self._columns = recipe.training.rl, columns
        self._fixed = recipe.training.rl.fixed_length or recipe.sampling.max_new_tokens
        self._tokens = self._responses = 0  # of the whole step

    def before_step(self, engine: PolicyEngine, shares: Sequence[Sequence[Unit[ResponseRow]]]) -> None:
        """Count what the step's loss is divided by."""
        lengths = [len(response) for share in shares for unit in share for response in unit.group.responses]
        self._responses, self._tokens = len(lengths), sum(lengths)

    def rows(self, batch: PackedBatch, units: Sequence[Unit[ResponseRow]]) -> list[ResponseRow]:
        """[K] the batch's responses."""
        return [units[u].rows[r] for u, r in batch.members]

    def tokens(self, batch: PackedBatch, rows: Sequence[ResponseRow]) -> Array:
        """[N] where the batch's tokens stand among the round's."""
        lengths = batch.lengths.tolist()  # the batch is laid out on the host, so nothing waits for a device
        return np.concatenate([np.arange(row.start, row.start + n) for row, n in zip(rows, lengths, strict=True)])

    def factors(self, batch: PackedBatch, mode: str, device: torch.device) -> Tensor:
        """[N] what each token's loss is multiplied by."""
        weights = losses.token_weights(
            batch.lengths,
            mode,
            tokens=self._tokens,
            responses=self._responses,
            fixed_length=self._fixed,
        )
        return upload(weights.numpy(), weights.dtype, device)


def _on(values: Array | None, where: Array, device: torch.device) -> Tensor:
    assert values is not None
    return upload(values[where], torch.float32, device)


class TokenObjective(_Objective):
    """The clipped loss of every token, the KL where it stands in the loss, and the entropy bonus."""

    sums = ("policy_loss", "kl_loss", "entropy", "clipped", "log_ratio")

    def __init__(
        self, recipe: Recipe, columns: Columns, result: Estimates, beta: float, engine: PolicyEngine | None
    ) -> None:
        super().__init__(recipe, columns)
        self._head = {"entropy": self._rl.entropy_bonus > 0, "temperature": recipe.sampling.temperature}
        self._beta, self._engine = beta if self._rl.kl.place == "loss" else 0.0, engine
        self._largest: Tensor | None = None  # ratio of the step on this rank

    @property
    def head(self) -> dict[str, Any]:
        """The sampler's temperature, so that the ratio is that of the distribution which was drawn from."""
        return self._head

    def before_step(self, engine: PolicyEngine, shares: Sequence[Sequence[Unit[ResponseRow]]]) -> None:
        """Count what the step's loss is divided by."""
        super().before_step(engine, shares)
        self._largest = None

    def part(self, batch: PackedBatch, units: Sequence[Unit[ResponseRow]], found: TokenLogProbs) -> Part:
        """This micro-batch's share of the loss; a token's loss is named after its response."""
        rl, device = self._rl, found.logprobs.device
        rows = self.rows(batch, units)
        where = self.tokens(batch, rows)
        columns = self._columns
        tokens = losses.TokenBatch(
            found.logprobs, _on(columns.old, where, device), _on(columns.advantages, where, device)
        )
        each = losses.clipped(tokens, rl.clip_low, rl.clip_high, rl.dual_clip)
        if columns.weights is not None:
            each = each * _on(columns.weights, where, device)
        weight = self.factors(batch, rl.aggregation, device)
        by_token = self.factors(batch, "token_mean", device)
        loss = policy = (weight * each).sum()
        pull = bonus = torch.zeros((), device=device)
        if self._beta:
            reference = _on(columns.reference, where, device)
            pull = (weight * kl.penalty(tokens.logprobs, reference, tokens.old, rl.kl.estimator or "k3")).sum()
            loss = loss + self._beta * pull
        if found.entropies is not None:
            bonus = (by_token * found.entropies).sum()
            loss = loss - rl.entropy_bonus * bonus
        with torch.no_grad():
            clip = (by_token * losses.clip_share(tokens, rl.clip_low, rl.clip_high)).sum()
            moved = (by_token * (tokens.old - tokens.logprobs)).sum()
            largest = tokens.ratio.max()
            self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)
            sums = torch.stack([policy, pull, bonus, clip, moved]).double()
            lengths = upload(batch.lengths.tolist(), torch.int64, device)
            shown = torch.segment_reduce(each.detach(), "mean", lengths=lengths, unsafe=True)
        return Part(loss, sums.detach(), shown, [row.sample_id for row in rows])

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The step's means over tokens; `approx_kl` is the policy's from the start of the round."""
        found = {
            "loss": sums["policy_loss"] + self._beta * sums["kl_loss"] - self._rl.entropy_bonus * sums["entropy"],
            "policy_loss": sums["policy_loss"],
            "clip_fraction": sums["clipped"],
            "approx_kl": sums["log_ratio"],
            "ratio_max": self._ratio_max(),
        }
        if self._beta:
            found["kl_loss"] = sums["kl_loss"]
        if self._rl.entropy_bonus:
            found["step_entropy"] = sums["entropy"]
        return found

    def _ratio_max(self) -> float:
        """Over all ranks; one without work has seen no ratio."""
        device = "cpu" if self._engine is None else self._engine.device
        largest = torch.zeros(1, device=device) if self._largest is None else self._largest.reshape(1).clone()
        return float(largest if self._engine is None else self._engine.max_over_ranks(largest))


class PairObjective(TokenObjective):
    """P3O: every two responses of a prompt, on summed log-probabilities, clipped jointly; a mean over the pairs."""

    def __init__(
        self, recipe: Recipe, columns: Columns, result: Estimates, beta: float, engine: PolicyEngine | None
    ) -> None:
        super().__init__(recipe, columns, result, 0.0, engine)
        self._rewards = result.rewards.astype(np.float32)
        self._pairs = 0

    def before_step(self, engine: PolicyEngine, shares: Sequence[Sequence[Unit[ResponseRow]]]) -> None:
        """Count the step's pairs too."""
        super().before_step(engine, shares)
        sizes = [len(unit.rows) for share in shares for unit in share]
        self._pairs = sum(n * (n - 1) // 2 for n in sizes)

    def part(self, batch: PackedBatch, units: Sequence[Unit[ResponseRow]], found: TokenLogProbs) -> Part:
        """This micro-batch's share; a pair's loss is named after both responses."""
        rl, device = self._rl, found.logprobs.device
        rows = self.rows(batch, units)
        where = self.tokens(batch, rows)
        old = _on(self._columns.old, where, device)
        sums_old = response_totals(batch, TokenLogProbs(old))
        now = response_totals(batch, found)
        rewards = upload(self._rewards[[row.place for row in rows]], torch.float32, device)
        firsts, seconds = _pairs_of(batch)
        a, b = upload(firsts, torch.int64, device), upload(seconds, torch.int64, device)
        each = losses.joint(
            (now[a], now[b]), (sums_old[a], sums_old[b]), (rewards[a], rewards[b]), rl.clip_low, rl.clip_high
        )
        loss = policy = each.sum() / max(self._pairs, 1)
        by_token = self.factors(batch, "token_mean", device)
        bonus = torch.zeros((), device=device)
        if found.entropies is not None:
            bonus = (by_token * found.entropies).sum()
            loss = loss - rl.entropy_bonus * bonus
        with torch.no_grad():
            gap = (now[a] - sums_old[a]) - (now[b] - sums_old[b])
            ratio = kl.bounded_exp(gap)
            outside = ((ratio < 1.0 - rl.clip_low) | (ratio > 1.0 + rl.clip_high)).float().sum() / max(self._pairs, 1)
            moved = (by_token * (old - found.logprobs)).sum()
            if len(firsts):
                largest = ratio.max().float()  # as on a rank that has seen no pair
                self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)
            sums = torch.stack([policy, torch.zeros_like(bonus), bonus, outside, moved]).double()
        names = [f"{rows[i].sample_id}/{rows[j].sample_id}" for i, j in zip(firsts, seconds, strict=True)]
        return Part(loss, sums.detach(), each.detach(), names)


def _pairs_of(batch: PackedBatch) -> tuple[list[int], list[int]]:
    """Every two responses of a group, as places among the batch's K."""
    by_unit: dict[int, list[int]] = {}
    for k, (unit, _) in enumerate(batch.members):
        by_unit.setdefault(unit, []).append(k)
    found = [pair for members in by_unit.values() for pair in combinations(members, 2)]
    return [i for i, _ in found], [j for _, j in found]


class ValueObjective(_Objective):
    """The critic's clipped squared error, a mean over the step's tokens."""

    sums = ("value_loss", "value_clipped")

    def part(self, batch: PackedBatch, units: Sequence[Unit[ResponseRow]], found: TokenLogProbs) -> Part:
        """This micro-batch's share; `found.logprobs` holds the critic's values."""
        device, clip = found.logprobs.device, self._rl.critic.value_clip
        rows = self.rows(batch, units)
        where = self.tokens(batch, rows)
        old, returns = _on(self._columns.values, where, device), _on(self._columns.returns, where, device)
        each = losses.value_loss(found.logprobs, old, returns, clip)
        weight = self.factors(batch, "token_mean", device)
        loss = (weight * each).sum()
        with torch.no_grad():
            outside = torch.zeros_like(loss)
            if clip is not None:
                outside = (weight * ((found.logprobs - old).abs() > clip)).sum()
            lengths = upload(batch.lengths.tolist(), torch.int64, device)
            shown = torch.segment_reduce(each.detach(), "mean", lengths=lengths, unsafe=True)
        sums = torch.stack([loss.detach(), outside]).double()
        return Part(loss, sums, shown, [row.sample_id for row in rows])

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The step's means over tokens."""
        loss = sums["value_loss"]
        return {"loss": loss, "value_loss": loss, "value_clip_fraction": sums["value_clipped"]}
