"""What a policy writes to disk: a training checkpoint that resumes bitwise, and a Hugging Face directory.

The directory belongs to the caller (`align.store`), who commits it with hashes and verifies them before a load.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from align.errors import RunError
from align.training import moving_reference, weights_view

if TYPE_CHECKING:
    from align.training.engine import PolicyEngine

TAG = "deepspeed"  # DeepSpeed's part lies in a folder of this name
CRITIC_TAG = "critic"  # and the critic's in this one
PROGRESS = "progress.json"


def save(policy: PolicyEngine, directory: Path) -> None:
    """DeepSpeed's state, every rank's random number generators, and how far training has come."""
    ranks = policy.ranks
    policy.engine.save_checkpoint(
        str(directory), tag=TAG, save_latest=False, exclude_frozen_parameters=policy.peft is not None
    )
    if policy.critic is not None:
        policy.critic.engine.save_checkpoint(str(directory), tag=CRITIC_TAG, save_latest=False)
    if policy.moving_reference is not None:
        moving_reference.save(policy.moving_reference, directory, keep=ranks.rank == 0)
    (directory / f"rng-{ranks.rank:05d}.json").write_text(json.dumps(_random_state()))
    if ranks.rank == 0:
        progress = {
            "version": policy.version,
            "step": policy.step,
            "critic_step": None if policy.critic is None else policy.critic.step,
            "world_size": ranks.world_size,
            "trainer_state": policy.trainer_state,
        }
        (directory / PROGRESS).write_text(json.dumps(progress))
    ranks.barrier("checkpoint written")


def load(policy: PolicyEngine, directory: Path) -> None:
    """Restore what `save` wrote; raises RunError where it was written by another number of ranks."""
    progress = json.loads((directory / PROGRESS).read_text())
    ranks = policy.ranks
    if progress["world_size"] != ranks.world_size:
        raise RunError(
            f"{directory}: written by {progress['world_size']} ranks and this run has {ranks.world_size}; "
            f"go on with --ranks {progress['world_size']}"
        )
    policy.begin_round(progress["trainer_state"].get("frozen_for", 0))  # the optimizer that wrote it
    loaded, _ = policy.engine.load_checkpoint(
        str(directory), tag=TAG, load_module_strict=policy.peft is None, load_lr_scheduler_states=False
    )
    if loaded is None:
        raise RunError(f"{directory}: DeepSpeed found no checkpoint in it")
    if policy.critic is not None:
        loaded, _ = policy.critic.engine.load_checkpoint(str(directory), tag=CRITIC_TAG, load_lr_scheduler_states=False)
        if loaded is None:
            raise RunError(f"{directory}: DeepSpeed found no critic in it")
        policy.critic.step = progress["critic_step"]
    if (directory / moving_reference.FILE).exists():
        policy.load_moving_reference(directory)
    policy.version, policy.step = progress["version"], progress["step"]
    policy.trainer_state = progress["trainer_state"]
    _set_random_state(json.loads((directory / f"rng-{ranks.rank:05d}.json").read_text()))


def _random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators as plain JSON."""
    _, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes(state["torch"]))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def save_pretrained(policy: PolicyEngine, directory: Path, lora: str) -> None:
    """The policy as anybody can load it: adapters merged, or (`keep`) the adapter alone beside the name of its base."""
    writes = policy.ranks.rank == 0
    if policy.peft is not None and lora == "keep":
        _save_adapter(policy, directory, writes)
    else:
        state = weights_view.full_state(policy.model, keep=writes)
        if writes:
            tied = policy.model.get_output_embeddings().weight is policy.model.get_input_embeddings().weight
            if tied:  # on disk a tied head is the embedding, as the configuration says
                name = next(n for n, m in policy.model.named_modules() if m is policy.model.get_output_embeddings())
                del state[f"{name}.weight"]
            policy.model.save_pretrained(
                directory, state_dict=state, max_shard_size=policy.recipe.export.max_shard_size
            )
    if writes:
        policy.tokenizer.save_pretrained(directory)
    policy.ranks.barrier("model written")


def _save_adapter(policy: PolicyEngine, directory: Path, writes: bool) -> None:
    assert policy.peft is not None
    state = weights_view.adapter_state(policy.model, keep=writes)
    if writes:
        policy.peft.save_pretrained(directory, state_dict={f"base_model.model.{k}": v for k, v in state.items()})
