"""TR-DPO (arXiv 2404.09656): a reference that follows the policy.

Every so many optimizer steps, reference = mix * policy + (1 - mix) * reference, weight by weight.  It is a network
of its own beside the frozen initial policy, which evaluation measures KL against.  Checkpoints hold its weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align.training.model import gathered

FILE = "reference.safetensors"


def move(reference: Any, policy: nn.Module, mix: float) -> None:
    """Take the step.  The sum is made in float32 and rounded to the reference's dtype.  Collective under ZeRO-3."""
    for (name, target), (other, source) in zip(_parameters(reference), policy.named_parameters(), strict=True):
        assert name == other, (name, other)
        with gathered([source]), _writable(target), torch.no_grad():
            target.copy_(torch.lerp(target.float(), source.detach().to(target.device).float(), mix))


def save(reference: Any, directory: Path, keep: bool) -> None:
    """Write the whole weights, gathered one by one, where `keep` (rank 0).  Collective under ZeRO-3."""
    from safetensors.torch import save_file

    state: dict[str, Tensor] = {}
    for name, parameter in _parameters(reference):
        with gathered([parameter]):
            if keep:
                state[name] = parameter.detach().to("cpu", copy=True).contiguous()
    if keep:
        save_file(state, directory / FILE)


def load(reference: Any, directory: Path) -> None:
    """Read what `save` wrote; every rank reads it.  Collective under ZeRO-3."""
    from safetensors import safe_open

    with safe_open(directory / FILE, "pt") as file:
        for name, parameter in _parameters(reference):
            with _writable(parameter), torch.no_grad():
                parameter.copy_(file.get_tensor(name))


def _parameters(reference: Any) -> list[tuple[str, nn.Parameter]]:
    """Of the network itself, which under ZeRO-3 lies inside a DeepSpeed engine."""
    network = reference.module if hasattr(reference, "module") else reference
    return list(network.named_parameters())


def _writable(parameter: nn.Parameter) -> Any:
    """Makes a ZeRO-3 parameter whole; what rank 0 writes into it goes back to the shards."""
    return gathered([parameter], writer=0)
