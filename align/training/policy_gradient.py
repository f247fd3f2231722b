"""One round of a policy gradient: rewards, one look at every token with the trainer, advantages, optimizer steps.

What stays the same over the round is computed once, with the trainer and at the sampler's temperature: the
log-probabilities that the ratio starts from, those of the reference, and the critic's values.  Each step first lets the
critic learn, then the policy.  Every mean is over counts of the whole step, so neither ranks nor `tokens_per_batch`
change it.

Legend: N response tokens of a batch (of the round in NumPy), K responses, B pairs of responses.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from align.recipe import Recipe
from align.records import Sample
from align.training import kl
from align.training.engine import PolicyEngine
from align.training.preference_matrix import Answers
from align.training.rewards import Rewarded, rewarded
from align.training.rl_metrics import round_metrics
from align.training.rl_objectives import PairObjective, ResponseRow, TokenObjective, ValueObjective, to_columns
from align.training.rollouts import Estimates, Rollouts, estimate
from align.training.scored import make_steps, split_units, whole_unit
from align.training.steps import TrainReport, Unit, mean_report, train_step
from align.training.trainers import OnStep, RoundData, prompts_per_step

Array = np.ndarray


def train_round(engine: PolicyEngine, data: RoundData, recipe: Recipe, on_step: OnStep) -> TrainReport:
    """Train on a round's scored responses.  Collective; see `align.training.trainers.train_round`."""
    training, started = recipe.training, time.monotonic()
    rl, reward = training.rl, training.reward
    verdicts = data.read("verdicts") if reward.verifier is not None else []
    found = rewarded(
        training.algorithm,
        reward,
        data.samples,
        data.scores,
        verdicts,
        engine.trainer_state,
        anchor_reward=rl.anchor_reward,
        answers=Answers.of(data.read("comparisons")) if reward.judge is not None else None,
    )
    if not found.samples:
        return mean_report([], 0, time.monotonic() - started, found.counts)
    rollouts, entropy = look(engine, found, recipe)
    beta = float(engine.trainer_state.get("kl_beta", rl.kl.beta))
    result = estimate(rollouts, rl, training.algorithm, beta if rl.kl.place == "reward" else 0.0)
    told = round_metrics(rollouts, result, found.samples) | {"entropy": entropy}
    told |= {"kl_beta": beta} if rl.kl.place != "none" else {}
    rows = _steps(
        engine, rollouts, result, found.samples, recipe, round_index=data.round, beta=beta, told=told, on_step=on_step
    )
    if rl.kl.target is not None and rl.kl.place != "none" and not _warming(engine, recipe, data.round):
        adapted = kl.adapted(beta, told["kl"], rl.kl.target, rl.kl.horizon, len(found.samples))
        engine.trainer_state["kl_beta"] = adapted
    return mean_report(rows, len(found.samples) * training.epochs, time.monotonic() - started, found.counts)


def look(engine: PolicyEngine, found: Rewarded, recipe: Recipe) -> tuple[Rollouts, float]:
    """Every response once through the trainer, the reference and the critic; and the mean entropy of a token.

    Each rank looks at a share of the prompts, and every rank gets everything.
    """
    training, temperature = recipe.training, recipe.sampling.temperature
    prompts = sorted({s.prompt_id for s in found.samples})
    mine = {prompts[i] for i in engine.ranks.share(len(prompts))}
    wanted = [s for s in found.samples if s.prompt_id in mine]
    sequences = [(s.prompt_ids, s.response_ids) for s in wanted]
    now = engine.token_logprobs(sequences, entropy=True, temperature=temperature)
    assert now.entropies is not None
    columns: list[list[Array]] = [now.logprobs, now.entropies]
    compares = training.reference == "initial"
    if compares:
        columns.append(engine.token_logprobs(sequences, reference=True, temperature=temperature).logprobs)
    if engine.critic is not None:
        columns.append(engine.critic.values(sequences))
    shared = {s.id: parts for s, *parts in zip(wanted, *columns, strict=True)}
    everything = {i: parts for share in engine.ranks.gather(shared, "rollouts") for i, parts in share.items()}
    flat = [
        np.concatenate([everything[s.id][c] for s in found.samples]).astype(np.float64) for c in range(len(columns))
    ]
    old, entropies = flat[0], flat[1]
    reference = flat[2] if compares else old if training.reference == "round" else None
    sampler = None
    if training.rl.importance_cap is not None:
        sampler = np.concatenate([np.asarray(s.logprobs, dtype=np.float64) for s in found.samples])
    rollouts = Rollouts(
        ids=[s.id for s in found.samples],
        groups=[s.prompt_id for s in found.samples],
        lengths=np.array([len(s.response_ids) for s in found.samples]),
        scores=found.scores,
        old=old,
        reference=reference,
        values=flat[-1] if engine.critic is not None else None,
        sampler=sampler,
        baselines=found.baselines,
        masked=found.masked,
        strengths=found.strengths,
    )
    return rollouts, float(entropies.mean())


def _steps(
    engine: PolicyEngine,
    rollouts: Rollouts,
    result: Estimates,
    samples: Sequence[Sample],
    recipe: Recipe,
    *,
    round_index: int,
    beta: float,
    told: Mapping[str, float],
    on_step: OnStep,
) -> list[dict[str, Any]]:
    """The round's optimizer steps, the critic's before the policy's; the policy waits for a critic that warms up."""
    training = recipe.training
    columns = to_columns(rollouts, result, training.rl)
    kind = PairObjective if training.algorithm == "p3o" else TokenObjective
    actor = kind(recipe, columns, result, beta, engine)
    critic = ValueObjective(recipe, columns) if engine.critic is not None else None
    warming = _warming(engine, recipe, round_index)
    whole = training.algorithm == "p3o"  # its loss takes two responses at a time
    rows = []
    for epoch in range(training.epochs):
        seed = f"{recipe.seed}/{round_index}/{epoch}"
        for places in _minibatches(rollouts, prompts_per_step(recipe), seed, least=2 if whole else 1):
            before = time.monotonic()
            row: dict[str, Any] = {}
            units = make_units(places, rollouts, samples, 0 if whole else training.tokens_per_batch)
            if critic is not None and engine.critic is not None:
                learner = cast(PolicyEngine, engine.critic)  # the driver asks for nothing that only a policy has
                found = train_step(learner, units, critic, recipe)
                kept = ("value_loss", "value_clip_fraction", "grad_norm", "learning_rate", "skipped", "tokens")
                row |= {f"critic_{k.removeprefix('value_')}": found[k] for k in kept}
            if warming:
                engine.step += 1  # of the run: what metrics.jsonl is cut by when a round is repeated
                row = {**row, "step": engine.step, "loss": row["critic_loss"], "tokens": row["critic_tokens"]}
            else:
                row |= train_step(engine, units, actor, recipe)
            row |= {**told, "responses": len(places), "round": round_index, "epoch": epoch}
            row["seconds"] = time.monotonic() - before
            rows.append(row)
            on_step(row)
    return rows


def _warming(engine: PolicyEngine, recipe: Recipe, round_index: int) -> bool:
    """Whether only the critic learns: a policy that stands still has no KL that a coefficient should follow."""
    return engine.critic is not None and round_index < recipe.training.rl.critic.warmup_rounds


def _minibatches(rollouts: Rollouts, prompts: int, seed: str, least: int = 1) -> list[list[int]]:
    """Places of the responses of each step: whole prompts in a seeded order.

    A masked response is not computed, and a prompt with fewer than `least` others makes no step: with a gradient of
    zero the optimizer's momentum would still move the weights.
    """
    by_prompt: dict[str, list[int]] = {}
    for place, group in enumerate(rollouts.groups):
        if rollouts.counted[place]:
            by_prompt.setdefault(group, []).append(place)
    enough = {group: places for group, places in by_prompt.items() if len(places) >= least}
    return make_steps(enough, prompts, seed, lambda places: places)


def make_units(
    places: Sequence[int], rollouts: Rollouts, samples: Sequence[Sample], token_budget: int
) -> list[Unit[ResponseRow]]:
    """A prompt's responses in one group, or in several where one would exceed the budget; a budget of 0 splits none."""
    starts = np.cumsum(rollouts.lengths) - rollouts.lengths
    by_prompt: dict[str, list[ResponseRow]] = {}
    for place in places:
        row = ResponseRow(rollouts.ids[place], place, int(starts[place]))
        by_prompt.setdefault(rollouts.groups[place], []).append(row)

    def sample(row: ResponseRow) -> Sample:
        return samples[row.place]

    return [
        unit
        for rows in by_prompt.values()
        for unit in (split_units(rows, sample, token_budget) if token_budget else whole_unit(rows, sample))
    ]
