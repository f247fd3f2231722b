"""The matrix products of a training step, counted from the shapes that are computed, and this machine's rate of them.

Legend: m rows, k summed, n columns of a product; R rows, H heads, q queries, s keys, d width of a head.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
Shapes = Mapping[tuple[int, int, int], int]
_OPERANDS = {aten.mm: 0, aten.addmm: 1, aten.bmm: 0}  # place of the first factor among the arguments
_FORWARD = aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward


class Products(TorchDispatchMode):
    """Counts what runs inside it: shapes of matrix products, and the products inside attention kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[int, int, int]] = Counter()
        self.attention = 0  # floating-point operations

    @property
    def flops(self) -> int:
        """Two for each multiplication with its addition."""
        return self.attention + sum(2 * m * k * n * count for (m, k, n), count in self.shapes.items())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet in _OPERANDS:
            a, b = args[_OPERANDS[packet] :][:2]
            m, k = a.shape[-2:]
            self.shapes[m, k, b.shape[-1]] += a.shape[0] if a.ndim == 3 else 1
        elif packet in (_FORWARD, _BACKWARD):
            query, key = args[:2] if packet is _FORWARD else args[1:3]
            rows, heads, queries, width = query.shape
            products = 2 if packet is _FORWARD else 5  # scores and values; backward: scores again and four gradients
            self.attention += products * 2 * rows * heads * queries * key.shape[2] * width
        return func(*args, **(kwargs or {}))


def gemm_rate(shapes: Shapes, dtype: torch.dtype = torch.float32, repeats: int = 3) -> float:
    """Floating-point operations a second of plain products of these shapes, mixed as they are; the rarest left out."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = {s: 2 * s[0] * s[1] * s[2] * count for s, count in shapes.items()}
    total = sum(weight.values())
    operations = seconds = 0.0
    for (m, k, n), of_shape in weight.items():
        if of_shape < 0.01 * total:
            continue
        a, b, out = (torch.ones(shape, dtype=dtype, device=device) for shape in ((m, k), (k, n), (m, n)))
        torch.mm(a, b, out=out)
        times = []
        for _ in range(repeats):
            _wait()
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            _wait()
            times.append(time.perf_counter() - start)
        operations += of_shape
        seconds += of_shape / (2 * m * k * n) * min(times)
    return operations / seconds


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
