"""The recipe's training block in DeepSpeed's words."""

from __future__ import annotations

from typing import Any

from align.errors import InputError
from align.recipe_training import Training

DECIDED = {
    "train_batch_size": "training.pairs_per_step",
    "train_micro_batch_size_per_gpu": "training.tokens_per_batch",
    "gradient_accumulation_steps": "training.tokens_per_batch",
    "gradient_clipping": "training.max_grad_norm",
    "optimizer": "training.learning_rate and its neighbours",
    "scheduler": "training.schedule",
    "bf16": "policy.dtype",
    "fp16.enabled": "policy.dtype",
    "zero_optimization.stage": "training.zero_stage",
    "zero_optimization.offload_optimizer": "training.offload",
    "zero_optimization.offload_param": "training.offload",
}
"""DeepSpeed settings that follow from a recipe key; setting them a second time is refused."""


def effective_stage(training: Training, dtype: str) -> int:
    """The ZeRO stage that DeepSpeed is given.

    In half precision DeepSpeed has no stage 0 that keeps a whole float32 copy per rank: its wrapper shards the
    optimizer state over the ranks, as stage 1 does, with fewer checks.  So half precision starts at stage 1.
    """
    return max(training.zero_stage, 0 if dtype == "float32" else 1)


def deepspeed_config(training: Training, dtype: str, world_size: int) -> dict[str, Any]:
    """For `deepspeed.initialize`; raises InputError where `training.deepspeed` says what the recipe decides."""
    _refuse_decided(training.deepspeed)
    config: dict[str, Any] = {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        # Micro-batches are counted by this project: their number differs from step to step.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": training.max_grad_norm,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW: no compiler is needed where the state is offloaded
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
        "steps_per_print": 2**31,
        "zero_optimization": _zero(training, dtype),
    }
    if dtype != "float32":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merge(config, training.deepspeed)


def reference_config(training: Training, dtype: str, world_size: int) -> dict[str, Any]:
    """The same for a frozen model that is only evaluated, sharded over the ranks: ZeRO-3 and no optimizer."""
    config = deepspeed_config(training, dtype, world_size)
    config["zero_optimization"].pop("offload_optimizer", None)
    config.pop("data_types", None)
    return config


def _zero(training: Training, dtype: str) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": effective_stage(training, dtype)}
    if training.offload in ("optimizer", "all"):
        zero["offload_optimizer"] = {"device": "cpu"}
    if training.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    return zero


def _refuse_decided(extra: dict[str, Any]) -> None:
    for dotted, key in DECIDED.items():
        place: Any = extra
        for part in dotted.split("."):
            place = place.get(part) if isinstance(place, dict) else None
        if place is not None:
            raise InputError(f"training.deepspeed.{dotted}: the recipe decides this by {key}; set that instead")


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
