"""Other divergences from the reference than the reverse KL (f-DPO, arXiv 2309.16240, eq. 9).

With the penalty D_f(π || π_ref) the implicit reward is beta f'(u), u = π/π_ref.  DPO's log u is f' of the reverse KL,
so every loss of the margin takes another f by seeing f'(u) in place of log u.

Legend: B pairs.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from align.training.losses.pairs import PairBatch

LARGEST_EXPONENT = 80.0  # e^80 is still a float32


def with_divergence(batch: PairBatch, divergence: str, alpha: float) -> PairBatch:
    """The same pairs with f'(u) of each response in place of its log-ratio: policy part f'(u), reference part 0."""
    if divergence == "reverse_kl":
        return batch
    chosen, rejected = score(batch.chosen, divergence, alpha), score(batch.rejected, divergence, alpha)
    nothing = torch.zeros_like(chosen)
    return replace(batch, policy_chosen=chosen, policy_rejected=rejected, ref_chosen=nothing, ref_rejected=nothing)


def score(ratio: Tensor, divergence: str, alpha: float) -> Tensor:
    """[B] f'(u) of the log-ratio log u, up to a constant, which a margin does not see.

    | divergence | f'(u) |
    |---|---|
    | reverse_kl | log u |
    | forward_kl | 1 - 1/u |
    | js | log 2 + log σ(log u) = log(2u / (1+u)) |
    | alpha | (u^(α-1) - 1) / (α-1); log u at α = 1 |

    The α form is flat where u^(α-1) would exceed e^80, as in TRL; forward_kl overflows there and is refused at run
    time as a loss that is not finite.
    """
    if divergence == "forward_kl":
        return 1.0 - torch.exp(-ratio)
    if divergence == "js":
        return math.log(2.0) + F.logsigmoid(ratio)
    if divergence == "alpha" and abs(alpha - 1.0) >= 1e-6:
        power = ((alpha - 1.0) * ratio).clamp(max=LARGEST_EXPONENT)
        return (power.exp() - 1.0) / (alpha - 1.0)
    assert divergence in ("reverse_kl", "alpha"), divergence
    return ratio
