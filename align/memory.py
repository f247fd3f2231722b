"""Memory of one rank, part by part, each with the formula that gives it.

States (weights, gradients, optimizer) follow DeepSpeed's ZeRO accounting and are exact up to padding; the tests
compare them with `deepspeed.runtime.zero` 's own estimators.  Activations are an estimate: the tensors that autograd
keeps in a decoder layer, counted on Llama and Qwen3 in transformers.

Legend: P parameters, T parameters with a gradient, N ranks, b bytes per number of `policy.dtype`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from align.machine import Machine
from align.model_shape import ModelShape
from align.recipe import Recipe, Training

GIB = 2**30
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LOGIT_COPIES = 3
"""fp32 copies of a chunk's logits alive at the worst moment, while entropies are measured: the logits, the logits less
their normaliser, and the probabilities.  Training holds fewer: its backward pass works in place."""
REDUCE_BUCKET = 500_000_000
"""Numbers in DeepSpeed's communication buffer where `training.deepspeed` does not say."""
VLLM_UTILIZATION = 0.92
"""vLLM's own default of `gpu_memory_utilization`."""


@dataclass(frozen=True)
class Part:
    """One part of a rank's memory.

    Example: Part("weights", "device", 3_441_149_952, "P 1,720,574,976 x b 2", "policy.dtype or training.zero_stage")
    """

    name: str
    place: str  # "device" or "host"; on a CPU both are main memory
    bytes: int
    formula: str
    knob: str  # what to turn in the recipe to make this part smaller


def memory_parts(
    recipe: Recipe, policy: ModelShape, rewards: dict[str, ModelShape], machine: Machine, *, ranks: int, longest: int
) -> tuple[Part, ...]:
    """All parts of one rank; `longest` is the longest prompt and response together, in tokens."""
    b = DTYPE_BYTES[recipe.policy.dtype]
    tokens, row = batch_tokens(recipe, ranks, longest)
    parts = [
        *state_parts(recipe.training, policy, b, ranks),
        _bucket(recipe.training, policy, b, machine),
        _reference(recipe, policy, b, ranks),
        _logits(recipe, policy, b, tokens),
        _activations(recipe, policy, b, tokens),
        _mask(b, tokens, row, machine),
        *_sampler(recipe.sampling.engine, policy, b, machine, "sampler", "sampling.engine"),
    ]
    for key, shape in rewards.items():
        engine = _reward_engine(recipe, key)
        parts += _sampler(engine, shape, b, machine, f"reward model {key}", f"the `engine` of verifier {key}")
    return tuple(part for part in parts if part.bytes)


def state_parts(training: Training, policy: ModelShape, b: int, ranks: int) -> list[Part]:
    """Weights, gradients and optimizer state under ZeRO.

    Half precision: gradients in b and again in fp32 where they are accumulated; Adam keeps an fp32 master copy and two
    moments, 12 bytes.  In fp32 without ZeRO the weights are the master copy.  ZeRO-1 divides optimizer state by N,
    ZeRO-2 also gradients, ZeRO-3 also weights, and gathers one module at a time (4 bytes per parameter: weight and
    gradient).
    """
    p, t, stage, n = policy.parameters, policy.trainable, training.zero_stage, ranks
    full = b == 4 and stage == 0
    state = 8 if full else 12
    gradient = 4 if b == 4 or stage == 3 else b + 4
    share = f" / N {n}"
    host_state = training.offload != "none"
    weights_place = "host" if training.offload == "all" else "device"
    state_place = "host" if host_state else "device"
    if host_state:
        gradient = 4
    parts = [
        Part(
            "weights",
            weights_place,
            p * b // (n if stage == 3 else 1),
            f"P {p:,} x {b}" + (share if stage == 3 else ""),
            "training.zero_stage: 3, training.offload: all, or a smaller policy.model",
        ),
        Part(
            "gradients",
            state_place,
            t * gradient // (n if stage >= 2 else 1),
            f"T {t:,} x {gradient}" + (share if stage >= 2 else ""),
            "policy.lora, training.zero_stage: 2, or more ranks",
        ),
        Part(
            "optimizer",
            state_place,
            t * state // (n if stage >= 1 else 1),
            f"T {t:,} x {state} ({'two moments' if full else 'fp32 master copy and two moments'})"
            + (share if stage >= 1 else ""),
            "policy.lora, training.zero_stage: 1 or more, training.offload: optimizer, or more ranks",
        ),
    ]
    if stage == 3:
        formula = f"largest module {policy.largest_module:,} x 4"
        parts.append(Part("gathered module", "device", policy.largest_module * 4, formula, "a smaller policy.model"))
    return parts


def _bucket(training: Training, policy: ModelShape, b: int, machine: Machine) -> Part:
    """DeepSpeed's gradient buffer: allocated whole on a GPU; on a CPU only the touched pages count."""
    settings = training.deepspeed.get("zero_optimization", {})
    wanted = int(settings.get("reduce_bucket_size", REDUCE_BUCKET))
    size = wanted if machine.kind == "cuda" else min(wanted, policy.trainable)
    size = size if training.zero_stage else 0
    knob = "training.deepspeed: {zero_optimization: {reduce_bucket_size: …}}"
    return Part("communication buffer", "device", size * b, f"bucket {size:,} x {b}", knob)


def _reference(recipe: Recipe, policy: ModelShape, b: int, ranks: int) -> Part:
    """A frozen copy for `reference: initial`; none with LoRA (adapter off) or for `round` (log-probs kept instead)."""
    training = recipe.training
    copies = int(training.reference == "initial" and recipe.policy.lora is None)
    share = ranks if training.zero_stage == 3 else 1
    formula = f"P {policy.parameters:,} x {b}" + (f" / N {ranks}" if share > 1 else "")
    place = "host" if training.offload == "all" else "device"
    return Part(
        "reference",
        place,
        copies * policy.parameters * b // share,
        formula,
        "training.reference: round, or policy.lora",
    )


def batch_tokens(recipe: Recipe, ranks: int, longest: int) -> tuple[int, int]:
    """(tokens of one forward pass, length of a row of it) at most.

    A row is as long as the longest group, a prompt with all its paired responses, and a group is never cut.
    """
    sampling, pairs = recipe.sampling, recipe.pairs
    responses = {"best_worst": 2, "top_bottom": 2 * pairs.k, "all_margin": sampling.samples_per_prompt}[pairs.builder]
    prompt = longest - sampling.max_new_tokens
    row = prompt + min(responses, sampling.samples_per_prompt) * sampling.max_new_tokens
    step = -(-recipe.training.pairs_per_step // ranks) * (prompt + 2 * sampling.max_new_tokens)
    return max(row, min(recipe.training.tokens_per_batch, step)), row


def _logits(recipe: Recipe, policy: ModelShape, b: int, tokens: int) -> Part:
    """One chunk's logits, and the head's gradient, which is summed over chunks in fp32."""
    chunk = min(recipe.training.logit_chunk_tokens, tokens)
    size = chunk * policy.vocabulary * 4 * LOGIT_COPIES
    formula = f"chunk {chunk:,} x vocabulary {policy.vocabulary:,} x 4 x {LOGIT_COPIES} copies"
    if recipe.policy.lora is None:
        size += policy.vocabulary * policy.hidden * (4 + b)
        formula += f" + head's gradient {policy.vocabulary:,} x {policy.hidden} x {4 + b}"
    return Part("logits", "device", size, formula, "training.logit_chunk_tokens")


def _activations(recipe: Recipe, policy: ModelShape, b: int, tokens: int) -> Part:
    """What autograd keeps of one forward pass; with checkpointing each layer's input and one layer's worth."""
    layer = layer_activation_bytes(policy, b)
    last_norm = policy.hidden * (4 + 2 * b)
    if recipe.training.gradient_checkpointing:
        total = tokens * (policy.layers * policy.hidden * b + layer + last_norm)
        inputs = f"layers {policy.layers} x width {policy.hidden} x {b}"
        formula = f"estimate: tokens {tokens:,} x ({inputs} + one layer {layer:,} + last norm {last_norm:,})"
        knob = "training.tokens_per_batch"
    else:
        total = tokens * (policy.layers * layer + last_norm)
        formula = f"estimate: tokens {tokens:,} x (layers {policy.layers} x {layer:,} bytes + last norm {last_norm:,})"
        knob = "training.gradient_checkpointing: true, or training.tokens_per_batch"
    return Part("activations", "device", total, formula, knob)


def _mask(b: int, tokens: int, row: int, machine: Machine) -> Part:
    """Who sees whom: dense on a CPU, once as a truth value and once as a number; a GPU's block mask is small."""
    size = tokens * row * (b + 1) if machine.kind == "cpu" else 0
    formula = f"tokens {tokens:,} x row {row:,} x {b + 1}"
    return Part("attention mask", "device", size, formula, "training.tokens_per_batch or sampling.max_new_tokens")


def layer_activation_bytes(policy: ModelShape, b: int) -> int:
    """Bytes per token that autograd keeps in one decoder layer.

    Two norms: fp32 input (4h each), normalised and scaled output (b*h each); attention: queries, keys, values
    and the output (2 b*q + 2 b*kv); per-head norms (Qwen3) fp32 input and output; feed-forward:
    gate, its activation, up and their product (4 b*f).  Log-sums and scales of a few bytes are left out.
    """
    norms = 2 * policy.hidden * (4 + 2 * b)
    attention = 2 * (policy.query_width + policy.kv_width) * b
    head_norms = (policy.query_width + policy.kv_width) * (4 + b) if policy.head_norm else 0
    return norms + attention + head_norms + policy.ffn_tensors * policy.ffn * b


def kv_bytes_per_token(policy: ModelShape, b: int) -> int:
    """A key and a value per layer."""
    return 2 * policy.layers * policy.kv_width * b


def _sampler(engine: dict[str, Any], shape: ModelShape, b: int, machine: Machine, name: str, key: str) -> list[Part]:
    """vLLM's own copy of the weights and its key-value cache.

    The cache takes `kv_cache_memory_bytes` where that is given (on a CPU also VLLM_CPU_KVCACHE_SPACE, GiB);
    otherwise vLLM claims `gpu_memory_utilization` of the device and uses what its weights leave of it.
    """
    weights = shape.parameters * b
    per_token = kv_bytes_per_token(shape, b)
    explicit = engine.get("kv_cache_memory_bytes")
    if machine.kind == "cpu" and os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        explicit = int(os.environ["VLLM_CPU_KVCACHE_SPACE"]) * GIB
    if explicit is not None:
        cache, source = int(explicit), "kv_cache_memory_bytes"
    else:
        share = float(engine.get("gpu_memory_utilization", VLLM_UTILIZATION))
        cache = max(0, int(share * machine.device_bytes) - weights)
        source = f"gpu_memory_utilization {share:g} x {machine.device_bytes:,} - weights"
    formula = f"{source}; room for {cache // per_token:,} tokens of {per_token:,} bytes"
    return [
        Part(f"{name} weights", "device", weights, f"P {shape.parameters:,} x {b}", "policy.dtype or a smaller model"),
        Part(f"{name} KV cache", "device", cache, formula, f"{key}: {{kv_cache_memory_bytes: …}}"),
    ]


def _reward_engine(recipe: Recipe, name: str) -> dict[str, Any]:
    """Engine arguments of the reward model called `name`."""
    gold = recipe.evaluation.gold
    specs = [*recipe.verifiers, *([gold] if gold is not None else [])]
    return next(s.engine for s in specs if s.kind == "reward_model" and s.name == name)
