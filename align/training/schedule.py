"""The learning rate as a function of the optimizer step, so that resuming needs the step number and nothing else."""

from __future__ import annotations

import math
from typing import Literal


def factor(step: int, schedule: Literal["constant", "linear", "cosine"], warmup_steps: int, total_steps: int) -> float:
    """What multiplies the peak learning rate at optimizer step 0, 1, …; in [0, 1].

    Warm-up is linear and reaches 1 at step `warmup_steps`.  `linear` and `cosine` then fall to 0 at `total_steps`
    and stay there; a run whose rounds yield fewer pairs than planned simply ends before.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
