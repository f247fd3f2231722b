"""Summed log-probabilities of the responses of pairs: once without a gradient, or from a training forward.

LD-DPO (arXiv 2409.06411) makes the sum a matter of the pair, not of the response: tokens behind the length of the
shorter response count `ld_alpha`.

Legend: N response tokens of a batch, K its responses, B pairs, M tokens of the 2 B responses of the pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from align.records import Pair, Sample
from align.training.logps import per_response
from align.training.losses.tokens import ld_weights
from align.training.upload import upload

if TYPE_CHECKING:
    from align.training.engine import PolicyEngine

PairSums = Mapping[str, tuple[float, float]]  # pair id: summed log-probabilities of (chosen, rejected)


def pair_sums(
    engine: PolicyEngine,
    pairs: Sequence[Pair],
    samples_by_id: Mapping[str, Sample],
    ld_alpha: float | None,
    reference: bool | Literal["moving"],
) -> PairSums:
    """Sums of every pair under the policy or the reference, on every rank; each rank computes a share.  Collective."""
    prompts = sorted({p.prompt_id for p in pairs})
    mine = {prompts[i] for i in engine.ranks.share(len(prompts))}
    my_pairs = [p for p in pairs if p.prompt_id in mine]
    ids = sorted(
        {i for p in my_pairs for i in (p.chosen_id, p.rejected_id)}, key=lambda i: (samples_by_id[i].prompt_id, i)
    )
    sequences = [(samples_by_id[i].prompt_ids, samples_by_id[i].response_ids) for i in ids]
    found = dict(zip(ids, engine.token_logprobs(sequences, reference=reference).logprobs, strict=True))
    sums = {}
    for pair in my_pairs:
        chosen, rejected = found[pair.chosen_id], found[pair.rejected_id]
        sums[pair.id] = (_total(chosen, len(rejected), ld_alpha), _total(rejected, len(chosen), ld_alpha))
    return {i: both for part in engine.ranks.gather(sums, "pair sums") for i, both in part.items()}


def _total(logprobs: np.ndarray, other: int, ld_alpha: float | None) -> float:
    total = float(logprobs.sum(dtype="float64"))
    if ld_alpha is None:
        return total
    return total - (1.0 - ld_alpha) * float(logprobs[other:].sum(dtype="float64"))


def ld_totals(logprobs: Tensor, lengths: Sequence[int], pairs: Sequence[tuple[int, int]], alpha: float) -> Tensor:
    """[2, B] LD-DPO's sums of (chosen, rejected), given as places among the K responses; carries the gradient."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    slots = [c for c, _ in pairs] + [r for _, r in pairs]
    others = [r for _, r in pairs] + [c for c, _ in pairs]
    own = [lengths[k] for k in slots]
    device = logprobs.device
    places = upload(np.concatenate([np.arange(starts[k], starts[k + 1]) for k in slots]), torch.int64, device)
    weights = upload(ld_weights(own, [lengths[k] for k in others], alpha), logprobs.dtype, device)
    values = logprobs.index_select(0, places) * weights
    return per_response(values, upload(own, torch.int64, device)).view(2, -1)
