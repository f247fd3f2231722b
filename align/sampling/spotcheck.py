"""Whether the engine holds exactly the weights that were sent, looked at through the engine's own kernels.

An engine may repack a weight, or keep a second copy of it, and then the parameter that can be read is not the one that
computes.  So each linear layer is asked: the answer to a one-hot input is one column of its weight, exactly, in any
number format, because every other product is zero.  A few columns per layer cost less than one token's forward pass,
and after an optimizer step a stale weight differs in nearly all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

COLUMNS = 4  # looked at per layer; other ones in every sync


@dataclass
class Sent:
    """What went to the engine: of each matrix a few columns, of each vector everything, in the engine's dtype."""

    dtype: str
    turn: int
    """Which columns are looked at: any integer, another one for every sync."""
    names: list[str] = field(default_factory=list)
    pieces: dict[str, torch.Tensor] = field(default_factory=dict)  # name -> [out, COLUMNS] or [out]
    widths: dict[str, int] = field(default_factory=dict)  # name -> columns of the whole matrix

    def watch(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same weights, noted in passing."""
        import torch

        dtype = getattr(torch, self.dtype)
        for name, tensor in weights:
            seen = tensor.detach()
            if seen.ndim == 2:
                self.widths[name] = seen.shape[1]
                seen = seen[:, columns(seen.shape[1], self.turn)]
            if 1 <= seen.ndim <= 2:
                self.pieces[name] = seen.to("cpu", dtype, copy=True)
            self.names.append(name)
            yield name, tensor


def columns(width: int, turn: int) -> list[int]:
    """Up to COLUMNS different columns of a matrix, evenly apart, moved along by one in every turn.

    Example: columns(8, 0) == [0, 2, 4, 6] and columns(8, 1) == [1, 3, 5, 7].
    """
    count = min(COLUMNS, width)
    return sorted({(i * width // count + turn) % width for i in range(count)})


@dataclass(frozen=True)
class Compared:
    """Names of the tensors that were compared, that differ, and that a half-delivered layer is waiting for."""

    checked: tuple[str, ...]
    wrong: tuple[str, ...]
    absent: tuple[str, ...]


def compare(worker: Any, sent: Sent) -> Compared:
    """Runs inside the engine: look at every layer whose weights were sent under a name that can be told."""
    import torch

    model = worker.model_runner.get_model()
    packed: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    checked: list[str] = []
    wrong: list[str] = []
    absent: list[str] = []
    with torch.inference_mode():
        for path, module in model.named_modules(remove_duplicate=False):
            for parameter in ("weight", "bias"):
                if module._parameters.get(parameter) is None:
                    continue
                names = _sent_names(path, parameter, packed)
                known = [name for name in names if name in sent.pieces]
                if len(known) < len(names):
                    absent.extend(name for name in names if known and name not in known)
                    continue
                held = _held(module, parameter, names, sent)
                for name, part in zip(names, held.split([len(sent.pieces[n]) for n in names]), strict=True):
                    checked.append(name)
                    if not torch.equal(part.cpu(), sent.pieces[name]):
                        wrong.append(name)
    return Compared(tuple(checked), tuple(wrong), tuple(absent))


def _sent_names(path: str, parameter: str, packed: Mapping[str, list[str]]) -> list[str]:
    """Checkpoint names behind one engine parameter: `…qkv_proj.weight` is q, k and v, in this order."""
    parent, _, last = path.rpartition(".")
    prefix = f"{parent}." if parent else ""
    return [f"{prefix}{part}.{parameter}" for part in packed.get(last, [last])]


def _held(module: Any, parameter: str, names: list[str], sent: Sent) -> torch.Tensor:
    """What the engine has in place of the pieces that were noted: [out, COLUMNS] of a matrix, [out] of a vector."""
    import torch

    rows = sum(len(sent.pieces[name]) for name in names)
    tensor = module._parameters[parameter]
    if names[0] not in sent.widths:
        return tensor[:rows]
    width = sent.widths[names[0]]
    chosen = columns(width, sent.turn)
    embeds = type(module).__name__ == "VocabParallelEmbedding"
    if embeds or not hasattr(module, "quant_method"):
        return tensor[:rows, chosen]
    one_hot = torch.zeros(len(chosen), width, dtype=getattr(torch, sent.dtype), device=tensor.device)
    one_hot[range(len(chosen)), chosen] = 1
    return module.quant_method.apply(module, one_hot, None)[:, :rows].T
