"""Small numbers on their way to the device without the host waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def upload(values: Sequence[Any] | np.ndarray | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these numbers.

    A copy from ordinary memory waits until the GPU has done all that was asked of it; one from pinned memory does not.
    """
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
