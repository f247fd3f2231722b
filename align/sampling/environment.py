"""What must hold around vLLM so that it can share a process with the trainer.

An engine in process would otherwise talk on the trainer's terminal, draw from its random generators, forbid it to set
its thread count, and take most of the GPU.  Nothing here imports vLLM or torch at module level.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import os
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from align.errors import InputError

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core runs in this process, where weights are handed over
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
}
_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR"}  # only where the user has not chosen a level

RESERVED = {
    "model": "it is the policy (`policy.model`)",
    "tokenizer": "it is the policy's own",
    "revision": "it is `policy.revision`",
    "tokenizer_revision": "it is `policy.revision`",
    "dtype": "it is `policy.dtype`",
    "seed": "every request has its own seed, made from the recipe's `seed`",
    "trust_remote_code": "code from a model repository is never run",
    "load_format": "only safetensors are loaded",
    "runner": "the loop decides it",
    "convert": "the loop decides it",
    "skip_tokenizer_init": "the loop works on token ids",
    "generation_config": "sampling settings are in `sampling`",
    "override_generation_config": "sampling settings are in `sampling`",
    "logprobs_mode": "records hold log-probs of the model itself, before temperature",
    "distributed_executor_backend": "every rank runs an engine of its own",
    "tensor_parallel_size": "every rank runs an engine of its own",
    "pipeline_parallel_size": "every rank runs an engine of its own",
    "data_parallel_size": "every rank runs an engine of its own",
    "enable_lora": "adapters are merged into the weights that are delivered",
    "worker_cls": "it names code to run",
    "worker_extension_cls": "it names code to run",
    "logits_processors": "it names code to run, and would change what the policy's log-probs mean",
    "hf_overrides": "trainer and sampler must be the same model; edit its config.json",
    "config_format": "the model directory is a Hugging Face one",
    "enable_sleep_mode": "weights are delivered to a running engine",
}
"""Engine settings that the loop decides, and why."""

GPU_MEMORY_SHARE = 0.3  # of the device, for weights and KV cache of the sampler: the trainer lives there too
_KV_SEQUENCES = 256  # vLLM's own default of sequences in flight


def check_engine_settings(settings: Mapping[str, Any], key: str) -> None:
    """Refuse settings that would break the loop; `key` is where they stand in the recipe.  Does not import vLLM."""
    for name in settings:
        if name in RESERVED:
            raise InputError(f"{key}.{name}: cannot be set: {RESERVED[name]}; remove it")


def prepare() -> None:
    """Set what vLLM reads from the environment; must run before vLLM is first imported."""
    os.environ.update(ENVIRONMENT)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # says that a CPU has no Triton


def make_llm(
    model_dir: Path, config: Mapping[str, Any], settings: Mapping[str, Any], key: str, *, world_size: int
) -> Any:
    """An in-process `vllm.LLM`; `settings` are our defaults with the user's on top.  Collective where world_size > 1.

    `config` is the model's config.json.

    Every rank has its own one-worker engine.  `external_launcher` makes vLLM join the process group that exists
    instead of opening one.
    """
    prepare()
    with sheltered():
        _spare_cpu_compilers(config)
        from vllm import LLM

        _keep_process_groups()
        _refuse_unknown(settings, key)
        arguments: dict[str, Any] = {
            "load_format": "safetensors",
            "trust_remote_code": False,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            **settings,
        }
        if world_size > 1:
            arguments["distributed_executor_backend"] = "external_launcher"
        try:
            return LLM(str(model_dir), **arguments)
        except (ValueError, TypeError) as error:
            raise InputError(f"{key}: vLLM refuses {model_dir}: {_first_reason(error)}") from error


def close_llm(llm: Any) -> None:
    """Free an engine's memory, and only that: other engines and the process group live on."""
    import gc

    import torch

    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _keep_process_groups() -> None:
    """An engine that ends, or is garbage, would destroy the process group of the trainer and of every other engine."""
    import vllm.v1.engine.core as core

    if hasattr(core, "cleanup_dist_env_and_memory"):
        core.cleanup_dist_env_and_memory = lambda *_, **__: None


def device_defaults(config: Mapping[str, Any], dtype: str, max_model_len: int | None) -> dict[str, Any]:
    """Settings that depend on where the engine runs.

    On CPU: no graph compilation (it takes longer than the small models take to sample); a KV cache for 256 sequences,
    or a quarter of what memory is free, instead of nearly all of it; and no prompt computed in parts, because vLLM then
    winds a seeded request's generator back, which a CPU generator cannot.
    """
    import torch

    if torch.cuda.is_available():
        return {"gpu_memory_utilization": GPU_MEMORY_SHARE}
    longest = max_model_len or context_length(config) or 2048
    free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    size = cpu_cache_bytes(longest, kv_bytes_per_token(config, dtype), free)
    return {"enforce_eager": True, "kv_cache_memory_bytes": size, "enable_chunked_prefill": False}


def cpu_cache_bytes(longest: int, bytes_per_token: int, free: int) -> int:
    """Bytes of KV cache on a CPU where the recipe does not say; `free` is this rank's share of free memory."""
    return min(max(64 << 20, _KV_SEQUENCES * longest * bytes_per_token), free // 4)


def kv_bytes_per_token(config: Mapping[str, Any], dtype: str) -> int:
    """Bytes of keys and values that one token leaves behind: 2 * layers * kv_heads * head_dim * itemsize."""
    text = config.get("text_config", config)
    heads = text.get("num_attention_heads", 1)
    head_dim = text.get("head_dim") or text.get("hidden_size", 0) // heads
    itemsize = 4 if dtype == "float32" else 2
    return 2 * text.get("num_hidden_layers", 0) * (text.get("num_key_value_heads") or heads) * head_dim * itemsize


def context_length(config: Mapping[str, Any]) -> int | None:
    """Longest sequence that the model takes, from its config.json; None where it does not say."""
    return config.get("text_config", config).get("max_position_embeddings")


@contextmanager
def sheltered() -> Iterator[None]:
    """Give the trainer its random state and its `torch.set_num_threads` back after vLLM has had its way with them."""
    import numpy
    import torch

    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    try:
        with warnings.catch_warnings():
            # Raised while vLLM looks through torch for kernels to replace; nothing here can mend it.
            warnings.filterwarnings("ignore", message="`torch.distributed.reduce_op` is deprecated")
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(vllm|torch)\b")
            yield
    finally:
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)


def _spare_cpu_compilers(config: Mapping[str, Any]) -> None:
    """Two costs that vLLM has on its first start on a CPU, and that buy nothing there.

    It counts the rank of every log-prob in a kernel compiled by g++ (8 s, and an error where there is no compiler), and
    it asks a new process what the model class can do, lest the import initialise CUDA (8 s).
    """
    import torch

    if torch.cuda.is_available():
        return
    from vllm.platforms import current_platform

    type(current_platform).simple_compile_backend = "eager"  # read when vllm.v1.sample is imported

    from vllm.model_executor.models.registry import ModelRegistry

    for name in config.get("architectures") or ():
        # A classifier that vLLM has no class for is run as the causal model under another head.
        name = name if name in ModelRegistry.models else name.replace("ForSequenceClassification", "ForCausalLM")
        known: Any = ModelRegistry.models.get(name)
        if hasattr(known, "module_name"):  # not imported yet
            ModelRegistry.register_model(name, known.load_model_cls())


def _refuse_unknown(settings: Mapping[str, Any], key: str) -> None:
    """Name a setting that vLLM does not have, with the nearest that it has."""
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    known = {*inspect.signature(EngineArgs).parameters, *_keywords(LLM.__init__)}
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f", did you mean {near[0]}?" if near else ""
            raise InputError(f"{key}.{name}: vllm.LLM has no such argument{hint}")


def _keywords(function: Callable[..., Any]) -> list[str]:
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]


def _first_reason(error: BaseException) -> str:
    """The line of a vLLM or pydantic error that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("Value error")), lines[0] if lines else type(error).__name__)
