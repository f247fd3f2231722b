"""The `training.rl` and `training.reward` blocks of the recipe: policy gradients and what they maximise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from align.recipe_base import Block, Count, Fraction, NonNegative, Positive, strength_faults

if TYPE_CHECKING:
    from align.recipe import Recipe

_EVERY_TOKEN = ("clip_low", "clip_high", "dual_clip", "aggregation", "fixed_length", "importance_cap")
READS: dict[str, tuple[str, ...]] = {
    "ppo": (*_EVERY_TOKEN, "gamma", "lam", "whiten", "critic"),
    "grpo": (*_EVERY_TOKEN, "by_std"),
    "rloo": _EVERY_TOKEN,
    "reinforce_pp": (*_EVERY_TOKEN, "gamma", "whiten"),
    "remax": _EVERY_TOKEN,
    "pairwise_grpo": _EVERY_TOKEN,
    "p3o": ("clip_low", "clip_high"),
    "pairwise_ppo": (*_EVERY_TOKEN, "gamma", "lam", "whiten", "critic", "anchor_reward"),
}
"""The fields of `training.rl` that each algorithm reads, beside `kl` and `entropy_bonus`, which all of them read."""
ONE_IS_ENOUGH = ("ppo", "reinforce_pp", "remax", "pairwise_ppo")
"""Algorithms that take nothing from a prompt's other responses."""
NEEDS_GREEDY = ("remax", "pairwise_ppo")
"""Algorithms that compare with the greedy response of a prompt, so that one is drawn beside the others."""
PAIRWISE = ("pairwise_grpo", "pairwise_ppo")
"""Algorithms that compare two responses, by P(good) or by a judge's word."""
DROPS_EQUAL = ("grpo", "rloo", "pairwise_grpo", "p3o")
"""Algorithms to which a prompt whose responses all got the same reward says nothing: it is left out and counted."""
NEEDS_CRITIC = ("ppo", "pairwise_ppo")
"""Algorithms with a model of the value."""
LARGEST_ERROR = 0.2
"""How far off its target, as a share of that, an adaptive coefficient takes the KL to be at most."""


class Kl(Block):
    """The pull to the reference."""

    place: Literal["reward", "loss", "none"] = "reward"
    """Taken off the reward of every token, added to the loss, or left out."""
    estimator: Literal["k1", "k2", "k3"] | None = None
    """Default: k1 in the reward, where no other is right; in the loss k3 is shown and the gradient is exact."""
    beta: NonNegative = 0.05
    """Coefficient, or the first one where it adapts."""
    target: Positive | None = None
    """Adapt the coefficient so that the KL of a response comes near this many nats."""
    horizon: Positive = 10000.0
    """Responses over which the coefficient adapts."""


class Critic(Block):
    """A second model that predicts the reward to come from each token, with its own weights and optimizer."""

    model: str | None = None
    """Directory or hub name of a reward model with the policy's tokenizer to start from; default: the policy."""
    revision: str | None = None
    """Commit of a hub model."""
    learning_rate: Positive = 1e-5
    """Peak learning rate; schedule and optimizer are the policy's."""
    value_clip: Positive | None = 0.2
    """Largest step of a prediction that the loss rewards; null for none."""
    warmup_rounds: Annotated[int, Field(ge=0)] = 0
    """First rounds in which only the critic learns."""


class PolicyGradient(Block):
    """Settings of the policy-gradient trainers; one that the chosen algorithm does not read is refused."""

    kl: Kl = Kl()
    """The pull to the reference."""
    clip_low: Positive = 0.2
    """How far below 1 the ratio of new to old probability is followed."""
    clip_high: Positive = 0.2
    """How far above 1 the ratio is followed."""
    dual_clip: Annotated[float, Field(gt=1.0)] | None = None
    """Bound of the loss of a bad token, as a multiple of its advantage."""
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum", "sequence_sum_fixed"] = "token_mean"
    """Mean over tokens, over responses of their means, over responses of their sums, or of sums / `fixed_length`."""
    fixed_length: Count | None = None
    """Divisor for `sequence_sum_fixed`; default: sampling.max_new_tokens."""
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Discount per token."""
    lam: Fraction = 0.95
    """λ of generalised advantage estimation."""
    whiten: bool = True
    """Advantages to mean 0 and variance 1 over the round's tokens."""
    by_std: bool = True
    """Divide GRPO's advantages by the group's standard deviation; off is Dr. GRPO."""
    entropy_bonus: NonNegative = 0.0
    """Factor of the mean token entropy that is taken off the loss."""
    importance_cap: Annotated[float, Field(ge=1.0)] | None = None
    """Weight tokens by trainer over sampler probability, at most this (2 is usual); default: no weights."""
    anchor_reward: Literal["logit", "probability"] = "logit"
    """Pairwise PPO: the reward is the chance to beat the prompt's greedy response, or its logit."""
    critic: Critic = Critic()
    """The model of the value."""


class Reward(Block):
    """What number a policy-gradient trainer maximises.  A response without it leaves the round and is counted."""

    source: Literal["p_good", "reward", "logit", "verifier"] = "p_good"
    """The ensemble's P(good), its reward, the logit of P(good), or one verifier's raw value."""
    verifier: str | None = None
    """Name of the verifier for `source: verifier`, and of the raw reward model for `shaping: qwen_math`."""
    judge: str | None = None
    """Name of a verifier of kind judge in mode pairwise that says who wins: pairwise_grpo asks it about every two of a
    prompt's responses, pairwise_ppo about each and the greedy one, always in both orders. Default: P(good) says."""
    shaping: Literal["none", "qwen_math"] = "none"
    """`qwen_math`: σ(α r_m) + (r_v - 1), r_m the raw value of `verifier` and r_v what `source` says, in [0, 1]."""
    alpha: Positive = 0.5
    """α of `qwen_math`."""
    normalise: Literal["none", "initial", "std"] = "none"
    """`initial`: mean 0 and variance 1 on the first round's responses, fixed from then on; `std`: divide by each
    round's standard deviation, the mean stays."""
    clip: Positive | None = None
    """Cut the reward to plus and minus this, after normalising."""
    truncated: Literal["keep", "penalty", "mask", "zero"] = "keep"
    """A response cut at max_new_tokens: keep its reward, replace it by `penalty` or by 0, or mask its loss."""
    penalty: float = -1.0
    """Reward of a cut response, for `truncated: penalty`."""


def greedy_per_prompt(recipe: Recipe) -> int:
    """Greedy responses drawn beside a prompt's others: 1 where the algorithm compares with one, else 0."""
    return int(recipe.training.algorithm in NEEDS_GREEDY)


def questions_per_prompt(recipe: Recipe) -> int:
    """What the judge of `training.reward` is asked about a prompt: every two responses, or each and the greedy one, in
    both orders; 0 without a judge."""
    drawn = recipe.sampling.samples_per_prompt
    if recipe.training.reward.judge is None:
        return 0
    return drawn * (drawn - 1) if recipe.training.algorithm == "pairwise_grpo" else 2 * drawn


def policy_gradient_faults(recipe: Recipe) -> list[str]:
    """What is wrong with `training.rl` and `training.reward` in this recipe; each line begins with its key."""
    training = recipe.training
    name, rl = training.algorithm, training.rl
    reads = (*READS[name], "kl", "entropy_bonus")
    wrong = [f"training.rl.{key}: {name} does not read it; take it out" for key in rl.changed() if key not in reads]
    wrong += _kl_faults(recipe)
    if rl.fixed_length is not None and rl.aggregation != "sequence_sum_fixed":
        wrong.append("training.rl.fixed_length: only `aggregation: sequence_sum_fixed` reads it; take it out")
    sampling = recipe.sampling
    if rl.importance_cap is not None:
        odd = [
            key
            for key, plain in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 0))
            if getattr(sampling, key) != plain
        ]
        wrong += [
            f"training.rl.importance_cap: the sampler's log-probabilities are those at temperature 1 with nothing cut "
            f"off, so it needs sampling.{key} at its default; take one of the two out"
            for key in odd
        ]
    elif sampling.top_p != 1.0 or sampling.top_k != 0:
        key = "top_p" if sampling.top_p != 1.0 else "top_k"
        wrong.append(
            f"sampling.{key}: {name} needs samples of the policy itself, and a cut-off has another distribution; "
            "take it out"
        )
    if name in NEEDS_CRITIC and recipe.policy.lora is not None:
        wrong.append(
            f"policy.lora: {name} trains a critic with all its weights beside the policy; take the adapter out, or "
            "choose an algorithm without a critic (grpo, rloo, reinforce_pp, remax)"
        )
    if training.reference == "none" and rl.kl.place != "none":
        wrong.append(
            f"training.reference: the KL of {name} needs one; use initial or round, or training.rl.kl.place: none"
        )
    if training.reference_sync is not None:
        wrong.append(f"training.reference_sync: {name} looks at the reference once a round; take it out")
    if rl.critic.revision is not None and rl.critic.model is None:
        wrong.append("training.rl.critic.revision: belongs to training.rl.critic.model, which is not given")
    if rl.critic.warmup_rounds >= recipe.rounds.count and rl.critic.warmup_rounds:
        wrong.append("training.rl.critic.warmup_rounds: the policy would never learn; it must be below rounds.count")
    return wrong + _reward_faults(recipe)


def _kl_faults(recipe: Recipe) -> list[str]:
    training = recipe.training
    kl, wrong = training.rl.kl, []
    if kl.place == "reward" and kl.estimator in ("k2", "k3"):
        wrong.append(
            f"training.rl.kl.estimator: {kl.estimator} in the reward has another optimum than exp(reward / beta) times "
            "the reference; use k1, or place: loss"
        )
    if kl.place == "loss" and kl.estimator == "k1":
        wrong.append(
            "training.rl.kl.estimator: the gradient of k1 as a loss is 0 on average; use k3 or k2, or place: reward"
        )
    if kl.place == "loss" and training.algorithm == "p3o":
        wrong.append("training.rl.kl.place: p3o takes the KL in the reward of a response; use reward or none")
    if training.reference == "round" and kl.place == "reward":
        wrong.append(
            "training.reference: the responses are the round's own policy's, so a KL to it in their reward is 0 for "
            "every one; use reference: initial, or training.rl.kl.place: loss or none"
        )
    if training.reference == "round" and kl.place == "loss" and kl.target is not None:
        wrong.append(
            "training.rl.kl.target: the coefficient follows the KL at the start of a round, which is 0 with reference: "
            "round; use reference: initial, or take target out"
        )
    if kl.place == "none" and set(kl.changed()) - {"place"}:
        wrong.append("training.rl.kl: with place: none nothing else in this block is read; take it out")
    if kl.beta > 0:
        wrong += strength_faults("training.rl.kl.beta", kl.beta)
    if kl.target is not None:
        wrong += _adaptive_faults(recipe)
    if kl.target is None and "horizon" in kl.changed():
        wrong.append("training.rl.kl.horizon: only an adaptive coefficient has one; set target or take it out")
    return wrong


def _adaptive_faults(recipe: Recipe) -> list[str]:
    kl, wrong = recipe.training.rl.kl, []
    if kl.beta == 0:
        wrong.append("training.rl.kl.beta: a coefficient of 0 cannot adapt; give a positive one or take target out")
    responses = recipe.rounds.prompts_per_round * recipe.sampling.samples_per_prompt
    if LARGEST_ERROR * responses >= kl.horizon:
        wrong.append(
            f"training.rl.kl.horizon: a round has up to {responses:,} responses, and {LARGEST_ERROR:g} of their number "
            f"over {kl.horizon:g} is taken off the coefficient: none would be left; give {responses:,} or more"
        )
    return wrong


def _reward_faults(recipe: Recipe) -> list[str]:
    name, reward = recipe.training.algorithm, recipe.training.reward
    raw = {v.name: v for v in recipe.verifiers}
    wrong = []
    wants = reward.source == "verifier" or reward.shaping == "qwen_math"
    if wants and reward.verifier is None:
        wrong.append("training.reward.verifier: name the verifier whose raw value is meant")
    if reward.verifier is not None and not wants:
        wrong.append("training.reward.verifier: only `source: verifier` and `shaping: qwen_math` read it; take it out")
    if reward.verifier is not None and reward.verifier not in raw:
        wrong.append(f"training.reward.verifier: no verifier is called {reward.verifier!r}; there are {', '.join(raw)}")
    if reward.shaping == "qwen_math" and reward.source != "p_good":
        wrong.append("training.reward.source: qwen_math adds r_v in [0, 1], which only p_good is")
    if reward.shaping == "none" and "alpha" in reward.changed():
        wrong.append("training.reward.alpha: only `shaping: qwen_math` reads it; take it out")
    if reward.truncated != "penalty" and "penalty" in reward.changed():
        wrong.append("training.reward.penalty: only `truncated: penalty` reads it; take it out")
    wrong += _judge_faults(recipe)
    if name in PAIRWISE:
        odd = [key for key in reward.changed() if key not in ("truncated", "judge")]
        wrong += [f"training.reward.{key}: {name} compares two responses; take it out" for key in odd]
        if reward.truncated in ("penalty", "zero"):
            wrong.append(f"training.reward.truncated: {name} has no reward to replace; use keep or mask")
    if recipe.ensemble.min_voters > len(recipe.verifiers):
        wrong.append(f"ensemble.min_voters: {name} has no reward where no response can have that many verdicts")
    if all(v.kind == "noise" for v in recipe.verifiers):
        wrong.append(f"verifiers: {name} maximises what they say, and noise says nothing; name one that looks")
    return wrong


def _judge_faults(recipe: Recipe) -> list[str]:
    """What is wrong with the judge that is to compare responses."""
    name, judge, key = recipe.training.algorithm, recipe.training.reward.judge, "training.reward.judge"
    if judge is None:
        return []
    if name not in PAIRWISE:
        return [f"{key}: only {' and '.join(PAIRWISE)} ask one; take it out"]
    named = {v.name: v for v in recipe.verifiers}
    pairwise = [v.name for v in recipe.verifiers if v.kind == "judge" and v.mode == "pairwise"]
    there = f"there are: {', '.join(pairwise) or 'none here'}"
    if judge not in named:
        return [f"{key}: no verifier is called {judge!r}; of kind judge in mode pairwise {there}"]
    found = named[judge]
    if found.kind != "judge" or found.mode != "pairwise":
        return [f"{key}: {judge!r} compares no two responses; name a verifier of kind judge in mode pairwise, {there}"]
    if name == "pairwise_grpo" and found.opponents is not None:
        return [
            f"{key}: pairwise_grpo asks {judge!r} about every two of a prompt's responses, so its `opponents` would "
            "save nothing; take `opponents` out"
        ]
    return []
