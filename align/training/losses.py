"""Preference losses: pure functions of one record of per-pair tensors, returning one unreduced loss per pair.

Weighting, averaging over the global batch and logging happen elsewhere, once (`align.training.preference`), so
a new loss is one function here and one line in `LOSSES`.

Legend: B pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Summed response log-probabilities of B pairs, and how sure we are of each preference.

    Example: PairBatch(policy_chosen=tensor([-9.0]), policy_rejected=tensor([-11.0]), ref_chosen=tensor([-10.0]),
    ref_rejected=tensor([-10.0]), label=tensor([0.9]))
    """

    policy_chosen: Tensor  # [B] log π(chosen | prompt), summed over response tokens, in nats
    policy_rejected: Tensor  # [B]
    ref_chosen: Tensor  # [B] the same under the reference
    ref_rejected: Tensor  # [B]
    label: Tensor  # [B] P(chosen better), 1 for a hard label

    def __post_init__(self) -> None:
        fields = (self.policy_chosen, self.policy_rejected, self.ref_chosen, self.ref_rejected, self.label)
        assert all(t.ndim == 1 and t.shape == self.label.shape for t in fields), [tuple(t.shape) for t in fields]

    @property
    def margin(self) -> Tensor:
        """[B] log-ratio of the chosen response minus that of the rejected one, in nats; the loss sees beta times it."""
        return (self.policy_chosen - self.ref_chosen) - (self.policy_rejected - self.ref_rejected)


def dpo(batch: PairBatch, beta: float) -> Tensor:
    """[B] DPO with a soft label p: -p log σ(z) - (1-p) log σ(-z), z = beta * margin.

    p = 1 is DPO (Rafailov et al., arXiv 2305.18290, eq. 7); p = 1 - ε is its label-smoothed form, which the paper's
    code calls conservative DPO.  At z = 0 the loss is ln 2 and the gradient with respect to the chosen
    log-probability is beta * (1/2 - p).
    """
    z = beta * batch.margin
    return -batch.label * F.logsigmoid(z) - (1.0 - batch.label) * F.logsigmoid(-z)


LOSSES: dict[str, Callable[[PairBatch, float], Tensor]] = {"dpo": dpo}
