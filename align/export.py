"""The trained policy as an ordinary Hugging Face directory, proven to be it before it is committed.

What was written is loaded again from its files, by transformers and by an engine of vLLM that has seen nothing else,
and both must give the log-probs that the trained policy gives.  Only then does the directory appear under its name.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from align.errors import RunError
from align.model_files import tensor_names
from align.recipe import Recipe
from align.sampling import environment
from align.sampling.engine import prompt_logprobs, stop_ids
from align.sampling.weights import TOLERANCES, Probe

if TYPE_CHECKING:
    from align.store import RunStore
    from align.training.engine import PolicyEngine

NAME = "export"
_ENGINE = "the check of the export"  # where messages say that an engine setting was refused


def export(
    policy: PolicyEngine,
    store: RunStore,
    recipe: Recipe,
    *,
    card: str,
    probes: Sequence[Probe],
    name: str = NAME,
    on_checked: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Commit the policy as `<name>/` with `card` as its README.md; returns how well the reloaded copies agree.

    `on_checked` gets the report before the commit.  Collective.
    Raises RunError, and leaves no directory, where a copy's log-probs on `probes` differ from the trained
    policy's by more than `export.tolerance` nats on average.
    """
    limit = recipe.export.tolerance or TOLERANCES[recipe.policy.dtype]
    report: dict[str, Any] = {"lora": recipe.export.lora if recipe.policy.lora else None, "tolerance": limit}
    with store.commit_directory(name) as directory:
        trained = np.concatenate(policy.token_logprobs(probes).logprobs)
        with _timed(report, "write"):
            policy.save_pretrained(directory, recipe.export.lora)
        with policy.ranks.stage("reload the export in transformers"):
            if policy.ranks.rank == 0:
                (directory / "README.md").write_text(card, encoding="utf-8")
                _check_tokenizer(directory, policy)
                with _timed(report, "transformers"):
                    found = _by_transformers(directory, policy.model_dir, recipe, probes)
                report["transformers"] = _compare("transformers", trained, found, limit)
        with policy.ranks.stage("reload the export in vLLM"), _timed(report, "vllm"):
            found = _by_vllm(directory, policy.model_dir, recipe, probes, policy.ranks.world_size)
            report["vllm"] = _compare("vLLM", trained, found, limit)
        report |= {"probe_tokens": len(trained), "bytes": sum(f.stat().st_size for f in directory.iterdir())}
        on_checked(report)
    return report


def _compare(reader: str, trained: np.ndarray, found: np.ndarray, limit: float) -> dict[str, float]:
    """Mean and largest |difference| in nats; RunError where the mean is over the limit or is no number."""
    assert trained.shape == found.shape, (trained.shape, found.shape)
    difference = np.abs(trained.astype(np.float64) - found)
    mean, largest = float(difference.mean()), float(difference.max())
    if not mean <= limit:
        raise RunError(
            f"export: reloaded in {reader}, the model's log-probs differ from the trained policy's by {mean:.3g} nats "
            f"on average over {len(difference)} tokens (largest {largest:.3g}, tolerance {limit:g}, export.tolerance)"
        )
    return {"mean_abs_difference": mean, "max_abs_difference": largest}


def _check_tokenizer(directory: Path, policy: PolicyEngine) -> None:
    """The exported tokenizer and stop tokens must be the policy's."""
    from transformers import AutoTokenizer

    ours, found = policy.tokenizer, AutoTokenizer.from_pretrained(directory)
    if found.get_vocab() != ours.get_vocab() or found.chat_template != ours.chat_template:
        raise RunError("export: the tokenizer read back from its files is not the policy's tokenizer")
    if not _is_adapter(directory):
        before, after = (stop_ids(d, t.eos_token_id) for d, t in ((policy.model_dir, ours), (directory, found)))
        if before != after:
            raise RunError(f"export: responses end at tokens {before}, and with the exported files at {after}")


def _is_adapter(directory: Path) -> bool:
    return (directory / "adapter_config.json").is_file()


def _by_transformers(directory: Path, base: Path, recipe: Recipe, probes: Sequence[Probe]) -> np.ndarray:
    """Log-probs of the probes' responses by a fresh transformers model, one sequence at a time.

    `base` is the model that an adapter belongs to.
    """
    import torch
    from transformers import AutoModelForCausalLM

    adapter = _is_adapter(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(
        base if adapter else directory,
        dtype=getattr(torch, recipe.policy.dtype),
        use_safetensors=True,
    )
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(directory))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    found = []
    with torch.inference_mode():
        for prompt, response in probes:
            logits = model(torch.tensor([[*prompt, *response]], device=device)).logits[0, len(prompt) - 1 : -1]
            wanted = torch.tensor(response, device=device)[:, None]
            found.append(logits.float().log_softmax(-1).gather(-1, wanted)[:, 0].cpu().numpy())
    return np.concatenate(found)


def _by_vllm(directory: Path, base: Path, recipe: Recipe, probes: Sequence[Probe], world_size: int) -> np.ndarray:
    """Log-probs of the probes' responses by a fresh vLLM engine with room for the probes only.  Collective."""
    adapter = _is_adapter(directory)
    model_dir = base if adapter else directory
    config = json.loads((model_dir / "config.json").read_text())
    longest = max(len(prompt) + len(response) for prompt, response in probes) + 1
    tokens = longest * len(probes)
    settings: dict[str, Any] = {
        "dtype": recipe.policy.dtype,
        "enforce_eager": True,
        "max_model_len": longest,
        "kv_cache_memory_bytes": max(64 << 20, tokens * environment.kv_bytes_per_token(config, recipe.policy.dtype)),
        "gpu_memory_utilization": 0.05,
    }
    request = None
    if adapter:
        from vllm.lora.request import LoRARequest

        assert recipe.policy.lora is not None
        settings |= {
            "enable_lora": True,
            "max_lora_rank": _lora_rank_slot(recipe.policy.lora.r),
            # vLLM would wrap the head as well, and its wrapped head fails on prompt log-probs (0.32, CPU).
            "lora_target_modules": _adapted_modules(directory),
        }
        request = LoRARequest("export", 1, str(directory))
    llm = environment.make_llm(model_dir, config, settings, _ENGINE, world_size=world_size)
    try:
        found = prompt_logprobs(llm, [[*prompt, *response] for prompt, response in probes], request)
    finally:
        environment.close_llm(llm)
    return np.concatenate([f[len(prompt) - 1 :] for f, (prompt, _) in zip(found, probes, strict=True)])


def _lora_rank_slot(rank: int) -> int:
    """vLLM reserves adapters of these ranks only."""
    return next(size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank)


def _adapted_modules(directory: Path) -> list[str]:
    """Last names of the modules that an adapter changes, such as `q_proj`.

    Example of a tensor's name: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
    """
    return sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensor_names(directory)})


@contextmanager
def _timed(report: dict[str, Any], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    report.setdefault("seconds", {})[name] = time.perf_counter() - started
