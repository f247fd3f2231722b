"""Losses of all responses to a prompt at once: which of them stand above which, or what each should be worth.

s_i = β log π/π_ref(y_i) is the score that the policy implies and ψ_i in [0, 1] the utility of response i, here
P(good).  Each loss is a pure function of a `GroupBatch` and named numbers and gives one value per group, in nats
unless said otherwise.  Where two utilities are equal nothing is known of the order, and nothing is said of it.

Legend: K responses of G groups, one group behind the other; R responses of the largest group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

RANK_GRAIN = 1e-3
"""Scores are rounded to this many nats before they are ranked, so that what rounding does to equal scores, such as
all zero at the start, can never decide an order."""


@dataclass(frozen=True, slots=True)
class GroupBatch:
    """Summed response log-probabilities of whole groups, and what each response is worth.

    Example: GroupBatch(policy=tensor([-9.0, -8.0]), ref=tensor([-9.0, -9.0]), utility=tensor([0.9, 0.2]), sizes=(2,))
    """

    policy: Tensor  # [K] log π(response | prompt), summed over its tokens, in nats
    ref: Tensor  # [K] the same under the reference
    utility: Tensor  # [K] ψ
    sizes: Sequence[int]  # [G] responses of each group

    def __post_init__(self) -> None:
        shapes = {tuple(t.shape) for t in (self.policy, self.ref, self.utility)}
        assert shapes == {(sum(self.sizes),)}, (shapes, self.sizes)

    @property
    def ratio(self) -> Tensor:
        """[K] Δ = log π/π_ref."""
        return self.policy - self.ref

    def table(self, values: Tensor) -> Tensor:
        """[G, R] the values group by group, 0 where there is no response."""
        return pad_sequence(list(values.split(list(self.sizes))), batch_first=True)

    @property
    def present(self) -> Tensor:
        """[G, R] where there is a response."""
        counts = torch.tensor(self.sizes, device=self.policy.device)
        return torch.arange(max(self.sizes), device=self.policy.device) < counts[:, None]

    @property
    def above(self) -> Tensor:
        """[G, R, R] true at (i, j) where response i is worth more than response j."""
        utility, present = self.table(self.utility), self.present
        return (utility[:, :, None] > utility[:, None, :]) & present[:, :, None] & present[:, None, :]


def plackett_luce(batch: GroupBatch, *, beta: float) -> Tensor:
    """[G] List-MLE (arXiv 2402.01878, eq. 8): -Σ_i [s_i - log Σ_{j = i or ψ_j < ψ_i} e^{s_j}].

    Without ties it is the log-likelihood of the whole order under Plackett and Luce.  Tied responses are each
    compared with what stands below them and not with each other.  With two responses it is DPO.
    """
    scores = batch.table(beta * batch.ratio)
    rivals = batch.above | torch.diag_embed(batch.present)
    totals = _masked_lse(scores[:, None, :].expand_as(rivals), rivals)
    return torch.where(batch.present, totals - scores, 0.0).sum(1)


def lipo(batch: GroupBatch, *, beta: float) -> Tensor:
    """[G] LiPO-λ (arXiv 2402.01878, eq. 11): Σ_{ψ_i > ψ_j} λ_ij log(1 + e^{-(s_i - s_j)}).

    λ_ij = |G_i - G_j| |1/D_i - 1/D_j| with G = 2^ψ - 1 and D = log(1 + rank), rank 1 for the highest s.  λ carries no
    gradient.  Equal s (see RANK_GRAIN) are ranked as they come: equal ranks would give λ = 0, and training would never
    begin.  With two responses it is DPO times |G_1 - G_2| (1/log 2 - 1/log 3).
    """
    scores = batch.table(beta * batch.ratio)
    gaps = scores[:, :, None] - scores[:, None, :]
    with torch.no_grad():
        rounded = (scores / RANK_GRAIN).round().masked_fill(~batch.present, -math.inf)
        ranks = rounded.argsort(dim=1, descending=True, stable=True).argsort(dim=1) + 1
        discount = 1.0 / torch.log1p(ranks.to(scores.dtype))
        gain = torch.exp2(batch.table(batch.utility)) - 1.0
        weight = (gain[:, :, None] - gain[:, None, :]).abs() * (discount[:, :, None] - discount[:, None, :]).abs()
    return torch.where(batch.above, weight * F.softplus(-gaps), 0.0).sum((1, 2))


def ranklist(batch: GroupBatch, *, beta: float, rank_margin: float) -> Tensor:
    """[G] RankList, local: Σ log(1 + e^{W - (s_i - s_j)}) over responses i one utility level above j.

    A reconstruction: RankNet (Burges et al., 2005) over neighbours in the list, W the margin.  The published formula
    could not be confirmed.  With two responses and W = 0 it is DPO.
    """
    scores = batch.table(beta * batch.ratio)
    gaps = scores[:, :, None] - scores[:, None, :]
    near = batch.above & (_levels_between(batch) == 1)
    return torch.where(near, F.softplus(rank_margin - gaps), 0.0).sum((1, 2))


def ranklist_skip(batch: GroupBatch, *, beta: float, rank_margin: float, rank_skip: int) -> Tensor:
    """[G] RankList, skip-wise: Σ_i log(1 + Σ_j e^{W - (s_i - s_j)}), j from 1 to k utility levels below i.

    A reconstruction: the log-sum-exp bounds a response's comparisons from below, log(1 + Σ e^z) <= Σ log(1 + e^z), so
    the one that is most wrong pulls most.  W is the margin and k = `rank_skip`.  The published formula could not be
    confirmed.  With k = 1, W = 0 and two responses it is DPO.
    """
    scores = batch.table(beta * batch.ratio)
    gaps = scores[:, :, None] - scores[:, None, :]
    rivals = batch.above & (_levels_between(batch) <= rank_skip)
    shown = torch.where(rivals, rank_margin - gaps, torch.zeros_like(gaps))
    none = torch.zeros_like(scores)[:, :, None]  # the 1 of log(1 + …)
    everyone = torch.cat([torch.ones_like(rivals[:, :, :1]), rivals], 2)
    return _masked_lse(torch.cat([none, shown], 2), everyone).sum(1)


def gpo(batch: GroupBatch, *, beta: float) -> Tensor:
    """[G] GPO (arXiv 2410.02197): mean_i (log π/π_t(y_i) - s̄_i / β)².  Squared nats.

    s̄_i is the mean preference of y_i over the group, here mean_j (ψ_i - ψ_j).  π_t is the policy that drew the
    responses, so the reference must be that of the round.  The fixed point is π_{t+1} ∝ π_t e^{s̄/β}, and log Z is
    taken as 0, which holds to first order because the s̄ of a group add up to 0.
    """
    present, counts = batch.present, batch.present.sum(1, keepdim=True)
    utility = batch.table(batch.utility)
    preference = utility - utility.sum(1, keepdim=True) / counts
    return gpo_scores(batch.table(batch.ratio), preference, present, beta=beta)


def gpo_scores(ratio: Tensor, preference: Tensor, present: Tensor, *, beta: float) -> Tensor:
    """[G] the same with any preference scores [G, R], such as a judge's that go round in circles."""
    squares = torch.where(present, (ratio - preference / beta).square(), 0.0)
    return squares.sum(1) / present.sum(1)


def reward_regression(batch: GroupBatch, *, beta: float) -> Tensor:
    """[G] mean over pairs of ((s_i - s_j) - (ψ_i - ψ_j))²: the implied reward differences are the given ones.

    The regression form of DPO with known rewards (REBEL, arXiv 2404.16767, eq. 3).  What a prompt adds to all its
    rewards cancels, and the optimum is π ∝ π_ref e^{ψ/β}.  Reward differences squared.
    """
    errors = batch.table(beta * batch.ratio - batch.utility)
    gaps = (errors[:, :, None] - errors[:, None, :]).square()
    present = batch.present
    pairs = present[:, :, None] & present[:, None, :]
    counts = present.sum(1)
    return torch.where(pairs, gaps, 0.0).sum((1, 2)) / (counts * (counts - 1)).clamp(min=1)


def kendall_tau(batch: GroupBatch) -> tuple[Tensor, Tensor]:
    """[G] concordant less discordant pairs of log-ratio and utility, and [G] the pairs that utilities decide.

    Log-ratios that differ by less than RANK_GRAIN are a tie, which is neither.
    """
    ratio, above = (batch.table(batch.ratio.detach()) / RANK_GRAIN).round(), batch.above
    signs = torch.sign(ratio[:, :, None] - ratio[:, None, :])
    return torch.where(above, signs, torch.zeros_like(signs)).sum((1, 2)), above.sum((1, 2))


def _levels_between(batch: GroupBatch) -> Tensor:
    """[G, R, R] how many different utilities i stands above j, counted among those of the group."""
    utility, present = batch.table(batch.utility), batch.present
    # A response opens a level where no earlier one of its group has the same utility.
    same = (utility[:, :, None] == utility[:, None, :]) & present[:, None, :]
    opens = present & ~torch.tril(same, -1).any(2)
    level = (batch.above & opens[:, None, :]).sum(2)
    return level[:, :, None] - level[:, None, :]


def _masked_lse(values: Tensor, mask: Tensor) -> Tensor:
    """[...] log Σ e^v over the last dimension where the mask is; 0 without any, and no NaN in the gradient."""
    some = mask.any(-1)
    filled = values.masked_fill(~mask, -math.inf)
    filled = torch.where(some[..., None], filled, torch.zeros_like(filled))
    return torch.where(some, torch.logsumexp(filled, -1), 0.0)
