"""The `training` block of the recipe: the trainer, its loss, and the settings of each family of trainers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from align.catalogue import ALGORITHMS, BLOCKS, LOSSES, Algorithm, LossFacts, loss_name
from align.recipe_base import Block, Count, Fraction, NonNegative, Positive
from align.recipe_negative import Negative
from align.recipe_rl import PolicyGradient, Reward
from align.recipe_supervised import Supervised

if TYPE_CHECKING:
    AlgorithmName = str
    LossName = str
else:  # the catalogue is the list; mypy wants literals spelt out
    AlgorithmName = Literal[tuple(ALGORITHMS)]
    LossName = Literal[tuple(LOSSES)]


class Loss(Block):
    """The loss.  Each setting belongs to some losses; one that the chosen loss does not read is refused."""

    name: LossName | None = None
    """Which loss; default: the algorithm's first."""
    beta: Positive = 0.1
    """Strength of the pull to the reference."""
    nll_weight: NonNegative = 0.0
    """Factor of an added per-token negative log-likelihood of the chosen response (RPO, CPO and ORPO have it)."""
    label_smoothing: Fraction = 0.0
    """ε: share of preferences that are the wrong way round, below 0.5."""
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """Which divergence from the reference the loss stands for (f-DPO)."""
    divergence_alpha: Positive = 0.5
    """α of the alpha-divergence; 1 is the reverse KL."""
    ld_alpha: Fraction | None = None
    """LD-DPO: factor on the log-probabilities behind the length of the pair's shorter response. Default: no cut."""
    wpo: bool = False
    """WPO: weight each pair by how likely the policy is to write its two responses."""
    reward_shift: Literal["running", "none"] = "running"
    """BCO's δ: the mean reward over all steps so far, or 0."""
    discopop_tau: Positive = 0.05
    """DiscoPOP's τ: how sharply it changes from the logistic to the exponential loss."""
    simpo_gamma: NonNegative = 0.5
    """SimPO's γ: the margin that the chosen response should win by, after beta."""
    dr_temperature: Positive = 1.0
    """Dr. DPO's b: the smaller, the less pairs with a high loss count."""
    desirable_weight: NonNegative = 1.0
    """KTO's λ_D: factor on the loss of good responses."""
    undesirable_weight: NonNegative = 1.0
    """KTO's λ_U: factor on the loss of bad responses."""
    rank_margin: NonNegative = 0.0
    """RankList's W: by how much a response should stand above one that is worth less, after beta."""
    rank_skip: Count = 3
    """RankList: how many levels of utility down a response is compared."""
    d2o_alpha: Positive = 0.1
    """D2O's α: strength of the push away from the wrong answer."""


class ReferenceSync(Block):
    """TR-DPO: the reference takes a step to the policy now and then; its log-probabilities are then computed live."""

    every_steps: Count = 256
    """Optimizer steps between two moves, counted over the whole run."""
    mix: Annotated[float, Field(gt=0.0, le=1.0)] = 0.6
    """How far it goes: reference = mix * policy + (1 - mix) * reference; 1 copies the policy."""


class Training(Block):
    """How the policy learns, under DeepSpeed."""

    algorithm: AlgorithmName = "dpo"
    """Which trainer."""
    loss: Loss = Loss()
    """The loss and its settings."""
    reference: Literal["initial", "round", "none"] = "initial"
    """The policy before the first round, the policy at the start of each round, or none, for losses without one."""
    reference_sync: ReferenceSync | None = None
    """Let the reference follow the policy during the rounds (TR-DPO). Default: it stays."""
    epochs: Count = 1
    """Passes over a round's data."""
    pairs_per_step: Count = 64
    """Pairs per optimizer step, over all ranks: the batch size of trainers that learn from pairs."""
    responses_per_step: Count = 256
    """Responses per optimizer step, over all ranks, prompts kept whole: the batch size of every other trainer."""
    tokens_per_batch: Count = 8192
    """Tokens per forward and backward on one rank. A memory knob; it never changes the mathematics."""
    learning_rate: Positive = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate over the whole run, after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    weight_decay: NonNegative = 0.0
    """AdamW weight decay."""
    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW moment decays."""
    adam_epsilon: Positive = 1e-8
    """AdamW epsilon."""
    max_grad_norm: Positive = 1.0
    """Clip the global gradient norm to this."""
    freeze: Literal["none", "half"] = "none"
    """`half` trains another half of the matrices and norms in every round and leaves the rest as they are (HFT)."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage: 1 shards optimizer state, 2 also gradients, 3 also weights."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Keep optimizer state, or with ZeRO-3 also weights, in CPU memory."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time, same result."""
    logit_chunk_tokens: Count = 2048
    """Response tokens sent through the output head at once. A memory knob."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    """Checkpoints kept; an older one goes only after the newest was read back and verified."""
    deepspeed: dict[str, Any] = {}
    """Further DeepSpeed settings; keys that the recipe already decides are refused."""
    rl: PolicyGradient = PolicyGradient()
    """Settings of the policy-gradient trainers."""
    negative: Negative = Negative()
    """Settings of the negative-sample trainers."""
    supervised: Supervised = Supervised()
    """Settings of the supervised trainers."""
    reward: Reward = Reward()
    """What number a policy-gradient trainer maximises."""

    @property
    def trainer(self) -> Algorithm:
        """What the catalogue says of the chosen trainer."""
        return ALGORITHMS[self.algorithm]

    @property
    def loss_facts(self) -> LossFacts:
        """What the catalogue says of the chosen loss."""
        return LOSSES[loss_name(self.algorithm, self.loss.name)]

    @model_validator(mode="after")
    def _offload_needs_sharding(self) -> Training:
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload: optimizer needs zero_stage 1, 2 or 3")
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError("offload: all needs zero_stage: 3")
        return self


def training_faults(training: Training) -> list[str]:
    """Settings that contradict each other or that nobody would read; each line begins with its key."""
    trainer, name = training.trainer, loss_name(training.algorithm, training.loss.name)
    if name not in trainer.losses:
        others = ", ".join(a.name for a in ALGORITHMS.values() if name in a.losses)
        return [f"training.loss.name: {name} is a loss of algorithm {others}, and this is {trainer.name}"]
    facts = LOSSES[name]
    wrong = [
        f"training.loss.{key}: {name} does not read it; take it out"
        for key in training.loss.changed()
        if key not in ("name", *facts.options)
    ]
    for family, block in BLOCKS.items():
        if family != trainer.family and getattr(training, block).changed():
            wrong.append(f"training.{block}: {trainer.name} does not read this block; take it out")
    if trainer.family != "policy_gradient" and training.reward.changed():
        wrong.append(f"training.reward: {trainer.name} does not read this block; take it out")
    unread = "responses_per_step" if trainer.consumes == "pairs" else "pairs_per_step"
    if unread in training.changed():
        other = "pairs_per_step" if trainer.consumes == "pairs" else "responses_per_step"
        wrong.append(f"training.{unread}: {trainer.name} learns from {trainer.consumes}; set training.{other}")
    return wrong
