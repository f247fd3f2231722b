"""Every trainer and every loss, in one table: what it needs, which settings it reads, where its function is.

The recipe is checked against it before anything loads, the trainers find their loss in it, and the README's table
is printed from it.  It imports nothing heavy: a function is named by its path and looked up when it is first used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from typing import Any, Literal

Family = Literal["preference", "group", "negative", "policy_gradient", "supervised"]
FAMILIES: tuple[Family, ...] = ("preference", "group", "negative", "policy_gradient", "supervised")
BLOCKS: dict[Family, str] = {"negative": "negative", "policy_gradient": "rl", "supervised": "supervised"}
"""The block under `training` that a family alone reads."""


@dataclass(frozen=True, slots=True)
class LossFacts:
    """One loss.

    Example: LossFacts("ipo", "preference", "align.training.losses.pairwise:ipo", formula="…", paper="2310.12036",
    options=("beta",))
    """

    name: str
    family: Family
    path: str  # "module:function"
    formula: str  # one line of plain text, in the symbols of the README
    paper: str  # arXiv id, or where it comes from
    options: tuple[str, ...] = ()  # the fields of `training.loss` that it reads, beside `name`
    reference: bool = True  # compares with the reference policy
    soft: bool = True  # takes a soft label per pair, or P(good) per response
    whole_step: bool = False  # couples all pairs of a step, so it needs a first pass over them
    needs: str = ""  # what else it needs, in words

    def function(self) -> Callable[..., Any]:
        """The pure function behind the name."""
        module, name = self.path.split(":")
        found: Callable[..., Any] = getattr(import_module(module), name)
        return found

    def arguments(self, settings: Any) -> dict[str, Any]:
        """The settings that the function takes by name, from a `Loss` block."""
        taken = signature(self.function()).parameters
        return {option: getattr(settings, option) for option in self.options if option in taken}


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One trainer, as `training.algorithm` names it.

    Example: Algorithm("dpo", "preference", losses=("dpo", "ipo"), consumes="pairs")
    """

    name: str
    family: Family
    losses: tuple[str, ...]  # what `training.loss.name` may be; the first is the default
    consumes: Literal["pairs", "scores"]
    critic: bool = False

    @property
    def module(self) -> str:
        """The module whose `train_round` trains it."""
        return f"align.training.{self.family}"


_PAIRS = "align.training.losses"
_ANY_PAIR = ("beta", "nll_weight", "ld_alpha")  # what every loss of pairs with a reference reads
_EACH = (*_ANY_PAIR, "wpo")  # and one that gives every pair a value of its own
_MARGIN = (*_EACH, "divergence", "divergence_alpha")  # and one of the margin
_FREE = ("beta", "nll_weight", "wpo")  # and one without a reference

_PREFERENCE: tuple[LossFacts, ...] = (
    LossFacts(
        "dpo", "preference", f"{_PAIRS}.pairwise:dpo", options=_MARGIN,
        formula="-p log σ(z) - (1-p) log σ(-z)", paper="2305.18290",
    ),
    LossFacts(
        "cdpo", "preference", f"{_PAIRS}.pairwise:cdpo", options=(*_MARGIN, "label_smoothing"),
        formula="dpo with p (1-ε) + (1-p) ε for p", paper="Mitchell 2023", needs="label_smoothing",
    ),
    LossFacts(
        "rdpo", "preference", f"{_PAIRS}.pairwise:rdpo", options=(*_MARGIN, "label_smoothing"), soft=False,
        formula="[-(1-ε) log σ(z) + ε log σ(-z)] / (1-2ε)", paper="2403.00409", needs="label_smoothing",
    ),
    LossFacts(
        "hinge", "preference", f"{_PAIRS}.pairwise:hinge", options=_MARGIN,
        formula="p max(0, 1-z) + (1-p) max(0, 1+z)", paper="2305.10425",
    ),
    LossFacts(
        "ipo", "preference", f"{_PAIRS}.pairwise:ipo", options=_MARGIN,
        formula="p (m - 1/2β)² + (1-p) (m + 1/2β)²", paper="2310.12036",
    ),
    LossFacts(
        "dpo_norm", "preference", f"{_PAIRS}.pairwise:dpo_norm", options=_MARGIN,
        formula="dpo with β m for z", paper="2411.15124",
    ),
    LossFacts(
        "exo", "preference", f"{_PAIRS}.pairwise:exo", options=(*_MARGIN, "label_smoothing"),
        formula="KL((σ(z), σ(-z)) ‖ (q, 1-q)), q = p (1-ε) + (1-p) ε", paper="2402.00856", needs="label_smoothing",
    ),
    LossFacts(
        "nca", "preference", f"{_PAIRS}.one_sided:nca", options=_EACH,
        formula="-p log σ(βc) - (1-p) log σ(βr) - ½ log σ(-βc) - ½ log σ(-βr)", paper="2402.05369",
    ),
    LossFacts(
        "bco", "preference", f"{_PAIRS}.one_sided:bco", options=(*_EACH, "reward_shift"), soft=False,
        formula="-log σ(βc - δ) - log σ(δ - βr), δ the mean reward so far", paper="2404.04656",
    ),
    LossFacts(
        "sppo_hard", "preference", f"{_PAIRS}.one_sided:sppo_hard", options=_EACH,
        formula="(c - (p-½)/β)² + (r + (p-½)/β)²", paper="2405.00675",
    ),
    LossFacts(
        "aot", "preference", f"{_PAIRS}.whole_step:aot", options=(*_ANY_PAIR, "label_smoothing"), soft=False,
        formula="cross-entropy of 1-ε at β (sort(lc-lr) - sort(lc-lr under the reference))", paper="2406.05882",
        whole_step=True,
    ),
    LossFacts(
        "aot_unpaired", "preference", f"{_PAIRS}.whole_step:aot_unpaired", options=(*_ANY_PAIR, "label_smoothing"),
        formula="cross-entropy of 1-ε at β (sort(c) - sort(r))", paper="2406.05882", soft=False, whole_step=True,
    ),
    LossFacts(
        "apo_zero", "preference", f"{_PAIRS}.one_sided:apo_zero", options=_EACH, soft=False,
        formula="σ(-βc) + σ(βr)", paper="2408.06266",
    ),
    LossFacts(
        "apo_down", "preference", f"{_PAIRS}.one_sided:apo_down", options=_EACH, soft=False,
        formula="σ(βc) + σ(-z)", paper="2408.06266",
    ),
    LossFacts(
        "discopop", "preference", f"{_PAIRS}.pairwise:discopop", options=(*_MARGIN, "discopop_tau"), soft=False,
        formula="-(1-s) log σ(z) + s exp(-z), s = σ(z/τ)", paper="2406.08414",
    ),
    LossFacts(
        "weighted", "preference", f"{_PAIRS}.pairwise:weighted", options=_MARGIN,
        formula="-(2p-1) log σ(z)", paper="-", needs="soft labels; with hard ones it is dpo",
    ),
    LossFacts(
        "gdpo", "preference", f"{_PAIRS}.pairwise:gdpo", options=_MARGIN,
        formula="-log σ((2p-1) z)", paper="2409.06691", needs="soft labels; with hard ones it is dpo",
    ),
    LossFacts(
        "dr_dpo", "preference", f"{_PAIRS}.whole_step:dr_dpo", options=(*_ANY_PAIR, "dr_temperature"),
        formula="-b log mean exp(-l/b), l the dpo losses of the step", paper="2407.07880", whole_step=True,
    ),
    LossFacts(
        "sft", "preference", f"{_PAIRS}.one_sided:sft", soft=False, reference=False,
        formula="-lc / mean |c| of the step", paper="-",
    ),
    LossFacts(
        "simpo", "preference", f"{_PAIRS}.reference_free:simpo",
        options=(*_FREE, "simpo_gamma", "label_smoothing"), reference=False,
        formula="dpo with β (lc/|c| - lr/|r|) - γ for z", paper="2405.14734",
    ),
    LossFacts(
        "orpo", "preference", f"{_PAIRS}.reference_free:orpo", options=_FREE, reference=False,
        formula="β dpo with log odds(lc/|c|) - log odds(lr/|r|) for z", paper="2403.07691",
    ),
    LossFacts(
        "cpo", "preference", f"{_PAIRS}.reference_free:cpo", options=(*_FREE, "label_smoothing"), reference=False,
        formula="dpo with β (lc - lr) for z", paper="2401.08417",
    ),
    LossFacts(
        "cpo_hinge", "preference", f"{_PAIRS}.reference_free:cpo_hinge", options=_FREE, reference=False,
        formula="hinge with β (lc - lr) for z", paper="2305.10425",
    ),
    LossFacts(
        "cpo_ipo", "preference", f"{_PAIRS}.reference_free:cpo_ipo", options=_FREE, reference=False,
        formula="ipo with lc/|c| - lr/|r| for m", paper="2310.12036",
    ),
)  # fmt: skip

# Their KL, if any, is `training.rl.kl`'s, and so is what that asks of the reference.
_POLICY_GRADIENT: tuple[LossFacts, ...] = (
    LossFacts(
        "ppo_clip", "policy_gradient", f"{_PAIRS}.policy_gradient:clipped", reference=False,
        formula="max(-A ρ, -A clip(ρ, 1-c, 1+c')), ρ = π/π_old per token", paper="1707.06347",
        needs="training.rl, training.reward",
    ),
    LossFacts(
        "p3o_joint", "policy_gradient", f"{_PAIRS}.policy_gradient:joint", reference=False,
        formula="max(-a ρ, -a clip(ρ, 1-c, 1+c')), a = (r1-r2)/2, ρ = ρ1/ρ2 of two responses", paper="2310.00212",
        needs="training.rl, training.reward",
    ),
)  # fmt: skip

_OWN = "align.training.losses.supervised"
_SUPERVISED: tuple[LossFacts, ...] = (
    LossFacts(
        "best_of_n", "supervised", f"{_OWN}:nll", reference=False, soft=False,
        formula="-log π of each prompt's best responses", paper="2305.14387",
    ),
    LossFacts(
        "filter", "supervised", f"{_OWN}:nll", reference=False,
        formula="-log π of the responses with R ≥ threshold", paper="2302.08582",
    ),
    LossFacts(
        "sharpening", "supervised", f"{_OWN}:nll", soft=False,
        formula="-log π of each prompt's response with the highest log π_base", paper="2412.01951",
    ),
    LossFacts(
        "rlhf_sharpening", "supervised", f"{_OWN}:rlhf_sharpening", options=("beta",), soft=False,
        formula="(β (Δ1 - Δ2) - (s1 - s2))², s = log π_base", paper="2412.01951",
    ),
    LossFacts(
        "poft", "supervised", f"{_OWN}:poft", reference=False,
        formula="-log σ(r - r̄), r the mean token log π, r̄ that of aligned models", paper="2412.12865",
        needs="training.supervised.aligned",
    ),
    LossFacts(
        "masked_thought", "supervised", f"{_OWN}:nll", reference=False,
        formula="-log π with part of the response hidden from the input", paper="2403.02178",
    ),
    LossFacts(
        "conditional", "supervised", f"{_OWN}:nll", reference=False,
        formula="-log π behind a control text, good or bad", paper="2302.08582",
    ),
    LossFacts(
        "reward_conditioning", "supervised", f"{_OWN}:nll", reference=False, soft=False,
        formula="-log π behind the control text of the reward's quantile", paper="2305.14387",
    ),
    LossFacts(
        "unlikelihood_sft", "supervised", f"{_OWN}:unlikelihood", reference=False,
        formula="-log π of good tokens, -α log(1 - π) of bad ones", paper="2302.08582",
    ),
    LossFacts(
        "rwr", "supervised", f"{_OWN}:rwr", options=("beta",), reference=False,
        formula="-min(exp(R/β), cap) log π", paper="2302.08582",
    ),
    LossFacts(
        "awr", "supervised", f"{_OWN}:awr", options=("beta",), reference=False,
        formula="-min(exp((R-V)/β), cap) log π, V the mean R of the prompt", paper="1910.00177",
    ),
    LossFacts(
        "mml", "supervised", f"{_OWN}:mml", reference=False,
        formula="-(1/β) log Σ π(y)^β over a prompt's good responses", paper="2205.14318",
    ),
    LossFacts(
        "quark", "supervised", f"{_OWN}:quark", soft=False,
        formula="-log π + λ KL(π ‖ π_0) on the best quantile", paper="2205.13636",
    ),
)  # fmt: skip

_LISTS = "align.training.losses.groupwise"
_SINGLE = ("beta", "desirable_weight", "undesirable_weight")
_GROUP: tuple[LossFacts, ...] = (
    LossFacts(
        "plackett_luce", "group", f"{_LISTS}:plackett_luce", options=("beta",),
        formula="-Σ_i [s_i - log Σ e^{s_j} over i and all below it]", paper="2402.01878",
    ),
    LossFacts(
        "lipo", "group", f"{_LISTS}:lipo", options=("beta",),
        formula="Σ_{ψ_i > ψ_j} λ_ij log(1 + e^{s_j - s_i}), λ = |2^ψ_i - 2^ψ_j| |1/D_i - 1/D_j|", paper="2402.01878",
    ),
    LossFacts(
        "ranklist", "group", f"{_LISTS}:ranklist", options=("beta", "rank_margin"),
        formula="Σ log(1 + e^{W - (s_i - s_j)}) over neighbours in the list", paper="reconstructed",
    ),
    LossFacts(
        "ranklist_skip", "group", f"{_LISTS}:ranklist_skip", options=("beta", "rank_margin", "rank_skip"),
        formula="Σ_i log(1 + Σ_j e^{W - (s_i - s_j)}), j up to k levels below i", paper="reconstructed",
    ),
    LossFacts(
        "gpo", "group", f"{_LISTS}:gpo", options=("beta",),
        formula="mean_i (Δ_i - mean_j (ψ_i - ψ_j) / β)²", paper="2410.02197", needs="training.reference: round",
    ),
    LossFacts(
        "reward_regression", "group", f"{_LISTS}:reward_regression", options=("beta",),
        formula="mean over pairs of ((s_i - s_j) - (ψ_i - ψ_j))²", paper="2404.16767",
    ),
    LossFacts(
        "kto", "group", f"{_PAIRS}.unpaired:kto", options=_SINGLE, whole_step=True,
        formula="p λ_D σ(β(z - Δ)) + (1-p) λ_U σ(β(Δ - z)), z the KL of the step", paper="2402.01306",
        needs="two prompts a step",
    ),
    LossFacts(
        "apo_zero_unpaired", "group", f"{_PAIRS}.unpaired:apo_zero_unpaired", options=_SINGLE,
        formula="kto with z = 0", paper="2408.06266",
    ),
)  # fmt: skip

_WRONG = "align.training.losses.negative"
_NEGATIVE: tuple[LossFacts, ...] = (
    LossFacts(
        "d2o", "negative", f"{_WRONG}:d2o", options=("beta", "d2o_alpha"), soft=False,
        formula="-log σ(β mean_i Δ(own_i) - α Δ(wrong))", paper="2403.03419", needs="training.negative",
    ),
    LossFacts(
        "nsr", "negative", f"{_WRONG}:nsr", reference=False, soft=False,
        formula="+π, or +π/π_old clipped, at the tokens of wrong responses", paper="2506.01347",
        needs="training.negative",
    ),
    LossFacts(
        "psr", "negative", f"{_WRONG}:psr", reference=False, soft=False,
        formula="-π, or -π/π_old clipped, at the tokens of right responses", paper="2506.01347",
        needs="training.negative",
    ),
    LossFacts(
        "w_reinforce", "negative", f"{_WRONG}:w_reinforce", reference=False, soft=False,
        formula="λ psr + nsr", paper="2506.01347", needs="training.negative",
    ),
    LossFacts(
        "unlikelihood", "negative", f"{_WRONG}:unlikelihood", reference=False, soft=False,
        formula="-log(1 - π) at the tokens of wrong responses", paper="1908.04319", needs="training.negative",
    ),
)  # fmt: skip

_LOSSES: tuple[LossFacts, ...] = (*_PREFERENCE, *_POLICY_GRADIENT, *_SUPERVISED, *_GROUP, *_NEGATIVE)

LOSSES: dict[str, LossFacts] = {facts.name: facts for facts in _LOSSES}
assert len(LOSSES) == len(_LOSSES), "two losses of one name"


def _of(family: Family) -> tuple[str, ...]:
    return tuple(facts.name for facts in _LOSSES if facts.family == family)


_ALGORITHMS: tuple[Algorithm, ...] = (
    Algorithm("dpo", "preference", _of("preference"), consumes="pairs"),
    Algorithm("ppo", "policy_gradient", ("ppo_clip",), consumes="scores", critic=True),
    Algorithm("grpo", "policy_gradient", ("ppo_clip",), consumes="scores"),
    Algorithm("rloo", "policy_gradient", ("ppo_clip",), consumes="scores"),
    Algorithm("reinforce_pp", "policy_gradient", ("ppo_clip",), consumes="scores"),
    Algorithm("remax", "policy_gradient", ("ppo_clip",), consumes="scores"),
    Algorithm("pairwise_grpo", "policy_gradient", ("ppo_clip",), consumes="scores"),
    Algorithm("p3o", "policy_gradient", ("p3o_joint",), consumes="scores"),
    Algorithm("pairwise_ppo", "policy_gradient", ("ppo_clip",), consumes="scores", critic=True),
    Algorithm("sft", "supervised", _of("supervised"), consumes="scores"),
    Algorithm("group", "group", _of("group"), consumes="scores"),
    Algorithm("d2o", "negative", ("d2o",), consumes="scores"),
    Algorithm("nsr", "negative", ("nsr",), consumes="scores"),
    Algorithm("psr", "negative", ("psr",), consumes="scores"),
    Algorithm("w_reinforce", "negative", ("w_reinforce",), consumes="scores"),
    Algorithm("unlikelihood", "negative", ("unlikelihood",), consumes="scores"),
)

ALGORITHMS: dict[str, Algorithm] = {algorithm.name: algorithm for algorithm in _ALGORITHMS}


def loss_name(algorithm: str, name: str | None) -> str:
    """The loss that a recipe means: the one it names, or the algorithm's first."""
    return ALGORITHMS[algorithm].losses[0] if name is None else name
