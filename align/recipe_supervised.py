"""The `training.supervised` block of the recipe: which responses a supervised loss learns from, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from align.recipe_base import Block, Count, Fraction, NonNegative, Positive, strength_faults

if TYPE_CHECKING:
    from align.recipe import Recipe

_THRESHOLD = ("score", "threshold")
_SELF = ("self_reward", "min_tokens")
READS: dict[str, tuple[str, ...]] = {
    "best_of_n": ("best", "best_fraction"),
    "filter": _THRESHOLD,
    "sharpening": _SELF,
    "rlhf_sharpening": _SELF,
    "poft": (*_THRESHOLD, "aligned", "aligned_verifier"),
    "masked_thought": (*_THRESHOLD, "mask_rate", "mask_warmup_steps", "mask_token"),
    "conditional": (*_THRESHOLD, "control", "control_drop_rate", "control_known"),
    "reward_conditioning": ("quantiles_over", "control", "control_drop_rate", "control_known"),
    "unlikelihood_sft": (*_THRESHOLD, "unlikelihood_weight"),
    "rwr": ("score", "weight_cap"),
    "awr": ("score", "weight_cap"),
    "mml": (*_THRESHOLD, "mml_beta"),
    "quark": ("quantiles", "quantiles_over", "kl_weight"),
}
"""The fields of `training.supervised` that each loss reads."""
CONDITIONED = ("conditional", "reward_conditioning")
"""Losses whose policy is sampled behind a control text."""
SELF_REWARDED = ("sharpening", "rlhf_sharpening")
"""Losses that ask the base policy, not the verifiers."""


class Supervised(Block):
    """Settings of the supervised trainers; one that the chosen loss does not read is refused."""

    score: Literal["p_good", "reward"] = "p_good"
    """The number that a threshold is compared with and a weight is made of: P(good), or the ensemble's reward."""
    threshold: float = 0.5
    """A response is good where its score reaches this."""
    best: Count = 1
    """Best-of-n: responses kept of each prompt, those with the highest reward."""
    best_fraction: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Keep this share of each prompt's responses instead, rounded up; 0.5 is Binary FeedME."""
    self_reward: Literal["mean", "sum"] | None = None
    """Log-probability under the base policy per token, or in all. Default: `mean` for sharpening, `sum` for
    rlhf_sharpening, whose optimum is then the base policy to the power of 1 + 1 / beta."""
    min_tokens: Count = 2
    """Sharpening: leave out responses of fewer tokens, the end of sequence counted; 2 leaves out the empty one."""
    aligned: tuple[str, ...] = ()
    """PoFT: directories of aligned models, each asked with its own tokenizer for its mean token log-probability."""
    aligned_verifier: str | None = None
    """PoFT: the verifier whose value is that mean, instead of models."""
    mask_rate: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Masked thought: share of the response tokens that the policy does not see."""
    mask_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which the share rises from 0."""
    mask_token: str | None = None
    """What stands in their place, one token. Default: the tokenizer's mask token, else its padding."""
    control: tuple[str, ...] = ("<bad>", "<good>")
    """Texts put in front of a prompt, from the worst to the best; two for `conditional`, one a quantile for
    `reward_conditioning`. The policy is sampled and evaluated behind the last."""
    control_drop_rate: Fraction = 0.01
    """Share of the training responses without a control text, so that the policy stays useful without one."""
    control_known: bool = False
    """The policy knows the texts from before; otherwise samples of the first round are drawn without them."""
    unlikelihood_weight: NonNegative = 1.0
    """Factor on the loss of the tokens of bad responses."""
    weight_cap: Positive = 1000.0
    """Largest weight exp(score / beta)."""
    quantiles: Count = 4
    """Quark: parts of about equal size that the responses are cut into by reward; the best is learned."""
    quantiles_over: Literal["round", "prompt"] = "round"
    """Cut all responses of a round together, or each prompt's by themselves."""
    mml_beta: Positive = 1.0
    """MML: 1 is the marginal likelihood; the larger, the more only the likeliest good response counts."""
    kl_weight: NonNegative = 0.05
    """Quark: factor on the exact KL from the initial policy, per token."""


def supervised_faults(recipe: Recipe) -> list[str]:
    """What is wrong with `training.supervised` in this recipe; each line begins with its key."""
    training, settings = recipe.training, recipe.training.supervised
    name, key = training.loss_facts.name, "training.supervised"
    if name not in READS:
        return []  # said elsewhere: a loss of another trainer
    wrong = [f"{key}.{k}: {name} does not read it; take it out" for k in settings.changed() if k not in READS[name]]
    if "threshold" in READS[name] and settings.score == "reward" and "threshold" not in settings.model_fields_set:
        wrong.append(f"{key}.threshold: a reward has no natural middle; say from where on a response is good")
    if settings.best_fraction is not None and "best" in settings.changed():
        wrong.append(f"{key}.best_fraction: says the same as `best` in another way; take one of them out")
    if name == "best_of_n" and settings.best > recipe.sampling.samples_per_prompt:
        wrong.append(f"{key}.best: more than sampling.samples_per_prompt, so nothing would be selected")
    if name == "mml":
        wrong += strength_faults(f"{key}.mml_beta", settings.mml_beta)
    if name == "poft":
        wrong += _poft_faults(recipe)
    if name in CONDITIONED:
        wrong += _control_faults(recipe)
    if name == "quark" and settings.kl_weight > 0:
        wrong += _divergence_faults(recipe)
    return wrong


def _poft_faults(recipe: Recipe) -> list[str]:
    settings, names = recipe.training.supervised, [v.name for v in recipe.verifiers]
    if not settings.aligned and settings.aligned_verifier is None:
        return ["training.supervised.aligned: poft compares with aligned models; name their directories, or the "
                "verifier that knows their scores in training.supervised.aligned_verifier"]  # fmt: skip
    if settings.aligned and settings.aligned_verifier is not None:
        return ["training.supervised.aligned_verifier: and `aligned` say the same twice; take one of them out"]
    if settings.aligned_verifier is not None and settings.aligned_verifier not in names:
        return [f"training.supervised.aligned_verifier: no verifier is called {settings.aligned_verifier!r}; "
                f"there are {', '.join(names)}"]  # fmt: skip
    return []


def _control_faults(recipe: Recipe) -> list[str]:
    name, texts = recipe.training.loss_facts.name, recipe.training.supervised.control
    wrong = []
    if name == "conditional" and len(texts) != 2:
        wrong.append(
            f"training.supervised.control: conditional takes two texts, bad and good, and there are {len(texts)}"
        )
    if len(texts) < 2:
        wrong.append("training.supervised.control: give at least two texts, from the worst to the best")
    if len(set(texts)) < len(texts) or "" in texts:
        wrong.append("training.supervised.control: every text must be different from the others and not empty")
    return wrong


def _divergence_faults(recipe: Recipe) -> list[str]:
    wrong = []
    if recipe.training.zero_stage == 3:
        wrong.append("training.supervised.kl_weight: the exact KL needs a whole head; use zero_stage 0 to 2, or 0 here")
    if recipe.training.reference != "initial":
        wrong.append("training.reference: quark's KL is from the initial policy; take it out")
    return wrong
