"""What pairs are made of below the sum: tokens that count less, and how likely the policy finds a response.

Legend: N response tokens of a batch, B pairs, M tokens of B responses, one of each pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from align.training.logps import per_response


def ld_weights(lengths: Sequence[int], others: Sequence[int], alpha: float) -> list[float]:
    """[M] LD-DPO's factor per token (arXiv 2409.06411, eq. 8), response after response.

    1 up to the length of the other response of the pair, alpha behind it: the excess length of the longer response
    then counts less, in the policy and in the reference alike.
    """
    return [1.0 if t < other else alpha for own, other in zip(lengths, others, strict=True) for t in range(own)]


def wpo_log_weights(logprobs: Tensor, squares: Tensor, lengths: Tensor) -> Tensor:
    """[K] WPO's log-weight of each response (arXiv 2406.11827, eq. 2 and sect. 3.2, sampled alignment).

    mean over tokens of log π(token) - log sum_v π(v)^2.  A response that the policy itself would write gets about 0,
    one far from it a large negative number.  A pair's weight is exp of the sum over both, and carries no gradient.
    """
    with torch.no_grad():
        return per_response(logprobs - squares, lengths) / lengths
