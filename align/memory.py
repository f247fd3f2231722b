"""Memory of one rank, part by part, each with the formula that gives it.

States (weights, gradients, optimizer) follow DeepSpeed's ZeRO accounting and are exact up to padding; the tests
compare them with `deepspeed.runtime.zero` 's own estimators.  Activations are an estimate: the tensors that autograd
keeps in a decoder layer, counted on Llama and Qwen3 in transformers.

Legend: P parameters, T parameters with a gradient, N ranks, b bytes per number of `policy.dtype`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from align.machine import Machine
from align.model_shape import ModelShape
from align.recipe import Recipe
from align.recipe_training import Training
from align.sampling.environment import GPU_MEMORY_SHARE, cpu_cache_bytes
from align.training.deepspeed_config import effective_stage
from align.training.trainers import prompts_per_step
from align.verifiers.spec import RewardModelSpec

GIB = 2**30
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LOGIT_COPIES = 3
"""fp32 copies of a chunk's logits alive at the worst moment, while entropies are measured: the logits, the logits less
their normaliser, and the probabilities.  Training holds fewer: its backward pass works in place."""
REDUCE_BUCKET = 500_000_000
"""Numbers in DeepSpeed's communication buffer where `training.deepspeed` does not say."""
LIVE_PARAMETERS = 1_000_000_000
"""Whole parameters that ZeRO-3 keeps at once where `training.deepspeed` does not say."""
SLACK = 5
"""The heap of a CPU process keeps about a fifth of what comes and goes."""
TOKENS = "training.tokens_per_batch"
LIBRARIES = {"cpu": 800 * 2**20, "cuda": 600 * 2**20}
"""What a rank takes before it holds a model: on a CPU the interpreter with torch, vLLM, DeepSpeed and TRL (measured:
0.7 GiB); on a GPU the CUDA context and libraries (an estimate)."""


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
    recipe: Recipe,
    policy: ModelShape,
    rewards: Sequence[tuple[RewardModelSpec, ModelShape]],
    machine: Machine,
    *,
    ranks: int,
    longest: int,
    context: int,
) -> tuple[Part, ...]:
    """All parts of one rank; in tokens, `longest` is the longest prompt and response together and `context`
    the longest sequence that the sampler is made for."""
    b = DTYPE_BYTES[recipe.policy.dtype]
    tokens, row = batch_tokens(recipe, ranks, longest)
    parts = [
        Part("libraries", "device", LIBRARIES[machine.kind], "before any model", ""),
        *state_parts(recipe.training, policy, recipe.policy.dtype, ranks),
        *_critic(recipe, policy, ranks),
        _bucket(recipe.training, policy, recipe.policy.dtype, machine),
        _reference(recipe, policy, ranks),
        _logits(recipe, policy, b, tokens),
        _activations(recipe, policy, b, tokens, machine),
        _mask(b, tokens, row, machine),
    ]
    parts += [
        _slack(parts, machine),
        *_engine(recipe.sampling.engine, policy, b, machine, name="sampler", key="sampling.engine", longest=context),
    ]
    for spec, shape in rewards:
        name, key = f"reward model {spec.name}", f"the `engine` of verifier {spec.name}"
        limit = spec.max_tokens or shape.context or 2048
        parts += _engine(spec.engine, shape, b, machine, name=name, key=key, longest=limit)
    return tuple(part for part in parts if part.bytes)


def cold_start_parts(
    recipe: Recipe, policy: ModelShape, machine: Machine, *, ranks: int, longest: int
) -> tuple[Part, ...]:
    """Parts of the cold start, where there is one: all weights in fp32 on every rank, and whole logits.

    It is over before the trainer and the sampler start.
    """
    start, training = recipe.cold_start, recipe.training
    if start is None:
        return ()
    p, smaller = policy.parameters, "a smaller policy.model"
    tokens = max(longest, min(training.tokens_per_batch, -(-start.batch_size // ranks) * longest))
    width = 2 if machine.kind == "cuda" and recipe.policy.dtype == "bfloat16" else 4  # mixed precision on a GPU only
    layer = layer_activation_bytes(policy, width, machine.kind)
    shared = 4 if ranks > 1 else 0
    kept = policy.layers * layer
    if training.gradient_checkpointing:
        kept = layer + policy.layers * policy.hidden * width
    logits = tokens * policy.vocabulary * 4 * LOGIT_COPIES
    parts = [
        Part("libraries", "device", LIBRARIES[machine.kind], "before any model", ""),
        Part("weights", "device", p * 4, f"P {p:,} x 4", smaller),
        Part("gradients", "device", p * (4 + shared), f"P {p:,} x {4 + shared}", smaller),
        Part("optimizer", "device", p * 8, f"P {p:,} x 8 (two moments)", smaller),
        Part(
            "logits",
            "device",
            logits,
            f"tokens {tokens:,} x vocabulary {policy.vocabulary:,} x 4 x {LOGIT_COPIES}",
            TOKENS,
        ),
        Part("activations", "device", tokens * kept, f"estimate: tokens {tokens:,} x {kept:,} bytes", TOKENS),
    ]
    return tuple(parts)


def state_parts(training: Training, policy: ModelShape, dtype: str, ranks: int) -> list[Part]:
    """Weights, gradients and optimizer state under ZeRO.

    Half precision: gradients in b and again in fp32 where they are accumulated; Adam keeps an fp32 master copy and two
    moments, 12 bytes.  In fp32 without ZeRO the weights are the master copy.  ZeRO-1 divides optimizer state by N,
    ZeRO-2 also gradients, ZeRO-3 also weights, which it gathers where they are used.
    """
    p, t, n, b = policy.parameters, policy.trainable, ranks, DTYPE_BYTES[dtype]
    stage = effective_stage(training, dtype)
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
        parts.append(_gathered(training, policy, b))
    return parts


def _gathered(training: Training, policy: ModelShape, b: int) -> Part:
    """Weights that ZeRO-3 holds whole: a module's at least, with its gradient, and up to `stage3_max_live_parameters`
    that it keeps for the backward pass.  DeepSpeed's estimator counts the first only."""
    zero = training.deepspeed.get("zero_optimization", {})
    limit = int(zero.get("stage3_max_live_parameters", zero.get("max_live_parameters", LIVE_PARAMETERS)))
    kept = min(policy.parameters, limit)
    size = max(kept * b, policy.largest_module * 4)
    formula = f"the larger of {kept:,} kept x {b} and largest module {policy.largest_module:,} x 4"
    knob = "training.deepspeed: {zero_optimization: {stage3_max_live_parameters: …}}"
    return Part("gathered weights", "device", size, formula, knob)


def _bucket(training: Training, policy: ModelShape, dtype: str, machine: Machine) -> Part:
    """DeepSpeed's gradient buffer: allocated whole on a GPU; on a CPU only the touched pages count."""
    wanted = int(training.deepspeed.get("zero_optimization", {}).get("reduce_bucket_size", REDUCE_BUCKET))
    size = wanted if machine.kind == "cuda" else min(wanted, policy.trainable)
    size = size if effective_stage(training, dtype) else 0
    b = DTYPE_BYTES[dtype]
    knob = "training.deepspeed: {zero_optimization: {reduce_bucket_size: …}}"
    return Part("communication buffer", "device", size * b, f"bucket {size:,} x {b}", knob)


def _reference(recipe: Recipe, policy: ModelShape, ranks: int) -> Part:
    """A frozen copy of the initial policy, which KL is measured against even with `reference: round`; none with LoRA,
    where it is the policy with the adapter off."""
    training, b = recipe.training, DTYPE_BYTES[recipe.policy.dtype]
    share = ranks if training.zero_stage == 3 else 1
    copies = 1 if training.reference_sync is None else 2  # and TR-DPO's, which moves
    size = 0 if recipe.policy.lora is not None else copies * policy.parameters * b // share
    formula = f"P {policy.parameters:,} x {b}" + " x 2" * (copies - 1) + (f" / N {ranks}" if share > 1 else "")
    place = "host" if training.offload == "all" else "device"
    return Part("reference", place, size, formula, "policy.lora or training.zero_stage: 3")


def _critic(recipe: Recipe, policy: ModelShape, ranks: int) -> list[Part]:
    """The critic's weights, gradients and optimizer: counted as large as the policy, whose head it does without."""
    if not recipe.training.trainer.critic:
        return []
    knob = "an algorithm without a critic (grpo, rloo, reinforce_pp, remax), or training.zero_stage"
    return [
        replace(part, name=f"critic {part.name}", knob=knob)
        for part in state_parts(recipe.training, policy, recipe.policy.dtype, ranks)
    ]


def batch_tokens(recipe: Recipe, ranks: int, longest: int) -> tuple[int, int]:
    """(tokens of one forward pass, length of a row of it) at most.

    A row is as long as the longest group: a prompt with as many of its paired responses as the budget holds, two at
    least.  A batch holds the step's pairs at most, and one group at least.
    """
    sampling, pairs, budget = recipe.sampling, recipe.pairs, recipe.training.tokens_per_batch
    if recipe.training.trainer.consumes == "scores":
        return _group_tokens(recipe, ranks, longest)
    drawn, wrong = sampling.samples_per_prompt, pairs.steps.wrong_per_prompt
    wanted = {
        "best_worst": 2,
        "top_bottom": min(2 * pairs.k, drawn),
        "all_margin": drawn,
        "per_step": 2 * wrong,
        "partial": 3 * wrong,
        "tree": 2,
    }[pairs.builder]
    response = sampling.max_new_tokens
    prompt = longest - response
    pair = prompt + 2 * response
    row = max(pair, min(budget, prompt + wanted * response))
    step = -(-recipe.training.pairs_per_step // ranks) * pair
    return max(row, min(budget, step)), row


def _group_tokens(recipe: Recipe, ranks: int, longest: int) -> tuple[int, int]:
    """The same for a trainer of whole prompts, whose responses are split over groups where the budget is short."""
    given = recipe.training.negative.dispreferred_column is not None
    response, n = recipe.sampling.max_new_tokens, recipe.sampling.samples_per_prompt + given
    budget, prompt = recipe.training.tokens_per_batch, longest - response
    whole = prompt + n * response
    unsplit = recipe.training.algorithm in ("p3o", "d2o")
    row = whole if unsplit else max(longest, min(budget, whole))
    step = -(-prompts_per_step(recipe) // ranks) * whole
    return max(row, min(budget, step)), row


def _logits(recipe: Recipe, policy: ModelShape, b: int, tokens: int) -> Part:
    """One chunk's logits, and the head's gradient, which is summed over chunks in fp32."""
    chunk = min(recipe.training.logit_chunk_tokens, tokens)
    size = chunk * policy.vocabulary * 4 * LOGIT_COPIES
    formula = f"chunk {chunk:,} x vocabulary {policy.vocabulary:,} x 4 x {LOGIT_COPIES} copies"
    if recipe.policy.lora is None:
        size += policy.vocabulary * policy.hidden * (4 + b)
        formula += f" + head's gradient {policy.vocabulary:,} x {policy.hidden} x {4 + b}"
    return Part("logits", "device", size, formula, "training.logit_chunk_tokens")


def _activations(recipe: Recipe, policy: ModelShape, b: int, tokens: int, machine: Machine) -> Part:
    """What autograd keeps of one forward pass, and the gradients inside the layer that backward is in.

    With checkpointing only each layer's input is kept, and one layer is computed again at a time.
    """
    layer = layer_activation_bytes(policy, b, machine.kind)
    rest = policy.hidden * (4 + 2 * b) + 2 * (policy.ffn + policy.hidden) * b  # the last norm; a layer's gradients
    if recipe.training.gradient_checkpointing:
        kept, knob = policy.layers * policy.hidden * b + layer, TOKENS
        spelled = f"layers {policy.layers} x width {policy.hidden} x {b} + one layer {layer:,}"
    else:
        kept, knob = policy.layers * layer, f"training.gradient_checkpointing: true, or {TOKENS}"
        spelled = f"layers {policy.layers} x {layer:,}"
    formula = f"estimate: tokens {tokens:,} x ({spelled} + last norm and a layer's gradients {rest:,})"
    return Part("activations", "device", tokens * (kept + rest), formula, knob)


def _slack(parts: Sequence[Part], machine: Machine) -> Part:
    """A CPU's allocator keeps what was freed: measured beside the parts that come and go."""
    moving = sum(p.bytes for p in parts if p.name in ("activations", "attention mask", "logits"))
    size = moving // SLACK if machine.kind == "cpu" else 0
    return Part("heap slack", "device", size, f"estimate: a {SLACK}th of {moving:,} bytes that come and go", TOKENS)


def _mask(b: int, tokens: int, row: int, machine: Machine) -> Part:
    """Who sees whom: dense on a CPU, once as a truth value and once as a number; a GPU's block mask is small."""
    size = tokens * row * (b + 1) if machine.kind == "cpu" else 0
    formula = f"tokens {tokens:,} x row {row:,} x {b + 1}"
    return Part("attention mask", "device", size, formula, "training.tokens_per_batch or sampling.max_new_tokens")


def layer_activation_bytes(policy: ModelShape, b: int, kind: str) -> int:
    """Bytes per token that autograd keeps in one decoder layer.

    Two norms: fp32 input (4h each), normalised and scaled output (b*h each); attention: queries, keys, values and the
    output (2 b*q + 2 b*kv), on a CPU keys and values once more, gathered for each block of queries; per-head norms
    (Qwen3) fp32 input and output; feed-forward: gate, its activation, up and their product (4 b*f).  Log-sums and
    scales of a few bytes are left out.
    """
    norms = 2 * policy.hidden * (4 + 2 * b)
    attention = 2 * b * (policy.query_width + policy.kv_width * (2 if kind == "cpu" else 1))
    head_norms = (policy.query_width + policy.kv_width) * (4 + b) if policy.head_norm else 0
    return norms + attention + head_norms + policy.ffn_tensors * policy.ffn * b


def kv_bytes_per_token(policy: ModelShape, b: int) -> int:
    """A key and a value per layer."""
    return 2 * policy.layers * policy.kv_width * b


def _engine(
    engine: Mapping[str, Any], shape: ModelShape, b: int, machine: Machine, *, name: str, key: str, longest: int
) -> list[Part]:
    """vLLM's own copy of the weights and its key-value cache.

    The cache takes `kv_cache_memory_bytes` where that is given (on a CPU also VLLM_CPU_KVCACHE_SPACE, in GiB).
    Otherwise, on a GPU, weights and cache together take `gpu_memory_utilization` of the device; on a CPU the cache
    holds 256 sequences, or a quarter of what is free.
    """
    weights, per_token = shape.parameters * b, kv_bytes_per_token(shape, b)
    given = engine.get("kv_cache_memory_bytes")
    space = os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    if machine.kind == "cpu" and space:
        cache, source = int(space) * GIB, "VLLM_CPU_KVCACHE_SPACE"
    elif given is not None:
        cache, source = int(given), "kv_cache_memory_bytes"
    elif machine.kind == "cpu":
        cache, source = cpu_cache_bytes(longest, per_token, machine.host_free), f"256 sequences of {longest:,}"
    else:
        share = float(engine.get("gpu_memory_utilization", GPU_MEMORY_SHARE))
        cache = max(0, int(share * machine.device_bytes) - weights)
        source = f"gpu_memory_utilization {share:g} x {machine.device_bytes:,} - weights"
    formula = f"{source}; room for {cache // per_token:,} tokens of {per_token:,} bytes"
    return [
        Part(f"{name} weights", "device", weights, f"P {shape.parameters:,} x {b}", "policy.dtype or a smaller model"),
        Part(f"{name} KV cache", "device", cache, formula, f"{key}: {{kv_cache_memory_bytes: …}}"),
    ]
