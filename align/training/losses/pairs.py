"""What every loss of pairs is given.

Weighting, averaging over the global batch and logging happen elsewhere, once (`align.training.preference`).
A loss returns one value per pair.  Where a soft label p is defined, a loss of pairs means

    p * L(chosen, rejected) + (1 - p) * L(rejected, chosen)

unless its paper says something else: the expected loss, where the preference is the wrong way round with
probability 1 - p.

Legend: B pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Summed response log-probabilities of B pairs, and how sure we are of each preference.

    Example: PairBatch(policy_chosen=tensor([-9.0]), policy_rejected=tensor([-11.0]), ref_chosen=tensor([-10.0]),
    ref_rejected=tensor([-10.0]), label=tensor([0.9]), weight=tensor([0.8]), chosen_length=tensor([5.0]),
    rejected_length=tensor([7.0]))
    """

    policy_chosen: Tensor  # [B] log π(chosen | prompt), summed over response tokens, in nats
    policy_rejected: Tensor  # [B]
    ref_chosen: Tensor  # [B] the same under the reference; zeros where there is none
    ref_rejected: Tensor  # [B]
    label: Tensor  # [B] P(chosen better), 1 for a hard label
    weight: Tensor  # [B] factor on each pair's loss; applied by the trainer, and read by losses of a whole step
    chosen_length: Tensor  # [B] response tokens
    rejected_length: Tensor  # [B]
    tokens_per_pair: float = 1.0  # chosen tokens of the whole step over its pairs

    def __post_init__(self) -> None:
        policy, reference = (self.policy_chosen, self.policy_rejected), (self.ref_chosen, self.ref_rejected)
        fields = (*policy, *reference, self.label, self.weight, self.chosen_length, self.rejected_length)
        assert all(t.ndim == 1 and t.shape == self.label.shape for t in fields), [tuple(t.shape) for t in fields]

    @property
    def chosen(self) -> Tensor:
        """[B] log π/π_ref of the chosen response, in nats."""
        return self.policy_chosen - self.ref_chosen

    @property
    def rejected(self) -> Tensor:
        """[B] log π/π_ref of the rejected response, in nats."""
        return self.policy_rejected - self.ref_rejected

    @property
    def margin(self) -> Tensor:
        """[B] log-ratio of the chosen response minus that of the rejected one, in nats."""
        return self.chosen - self.rejected

    @property
    def margin_per_token(self) -> Tensor:
        """[B] the same with each log-ratio divided by the tokens of its response."""
        return self.chosen / self.chosen_length - self.rejected / self.rejected_length
