"""New weights into the sampler, and the proof that they arrived.

Wrong weights in the engine fail silently: samples still look like text.  So every sync ends with an attestation in
two parts.  First, tensor by tensor, a few columns of what the engine computes with must equal what was sent, exactly
(`spotcheck`).  Then the log-probs of probe sequences, from the engine and from the trainer, must agree up to the
rounding of the number format, which also covers what is no weight: attention, positions, normalisation.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from align.errors import RunError
from align.sampling.spotcheck import Compared, Sent, compare

if TYPE_CHECKING:
    import torch

    from align.sampling.engine import Sampler

Probe = tuple[Sequence[int], Sequence[int]]
"""Prompt ids and response ids; the response's log-probs are compared, given the prompt."""

TOLERANCES = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.05}
"""Mean |difference of log-probs| in nats that is rounding, by dtype.

Measured on 1M-parameter models: 1e-7 to 1e-6 in float32, 0.001 to 0.02 in bfloat16.
"""

_NAMED = 5  # tensors named in a message


class PolicyWeights(Protocol):
    """What the trainer must offer (`align.training.engine.PolicyEngine`)."""

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole tensors under checkpoint names, a tied output head included."""

    def token_logprobs(self, sequences: Sequence[Probe]) -> Any:
        """`.logprobs`: per sequence, the log-prob of every response token."""


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What a sync cost and how well the two sides agree."""

    seconds: float  # delivery and attestation together
    attest_seconds: float
    tensors: int  # delivered
    tensors_compared: int  # of these, compared exactly
    probe_tokens: int
    mean_abs_difference: float  # nats
    max_abs_difference: float  # nats
    tolerance: float

    def to_dict(self) -> dict[str, float]:
        """For reports."""
        return asdict(self)


def sync(sampler: Sampler, policy: PolicyWeights, probes: Sequence[Probe], tolerance: float | None) -> SyncReport:
    """Deliver the policy's weights to this rank's sampler and attest them.  Collective; all ranks fail together.

    Raises RunError that names the tensors to suspect.
    """
    started = time.perf_counter()
    limit = TOLERANCES[sampler.dtype] if tolerance is None else tolerance
    sent = Sent(sampler.dtype, turn=sampler.syncs)
    with sampler.ranks.stage("weight sync"):
        missing = sampler.load_weights(sent.watch(policy.named_weights()))
        _refuse_gaps(sampler, sent, missing)
    attesting = time.perf_counter()
    with sampler.ranks.stage("attestation"):
        compared: Compared = sampler.llm.collective_rpc(compare, args=(sent,))[0]
        _refuse_differences(compared)
    with sampler.ranks.stage("attestation"):
        differences = logprob_differences(sampler, policy, probes)
        _judge(sent, compared, differences, limit)
    ended = time.perf_counter()
    return SyncReport(
        seconds=ended - started,
        attest_seconds=ended - attesting,
        tensors=len(sent.names),
        tensors_compared=len(compared.checked),
        probe_tokens=len(differences),
        mean_abs_difference=float(differences.mean()),
        max_abs_difference=float(differences.max()),
        tolerance=limit,
    )


def logprob_differences(sampler: Sampler, policy: PolicyWeights, probes: Sequence[Probe]) -> np.ndarray:
    """|log-prob by the sampler - log-prob by the trainer| of every response token of the probes, in nats."""
    assert probes, "attestation needs at least one probe"
    ours = policy.token_logprobs(probes).logprobs
    theirs = sampler.prompt_logprobs([[*prompt, *response] for prompt, response in probes])
    parts = [
        np.abs(np.asarray(t[len(prompt) - 1 :], dtype=np.float64) - np.asarray(o, dtype=np.float64))
        for (prompt, _), o, t in zip(probes, ours, theirs, strict=True)
    ]
    return np.concatenate(parts)


def _refuse_gaps(sampler: Sampler, sent: Sent, missing: set[str]) -> None:
    """Stop where the engine says that something was not delivered."""
    if missing:
        raise RunError(f"weight sync: the trainer sent nothing for {_some(sorted(missing))}; the sampler's are stale")
    if sampler.tied and "lm_head.weight" not in sent.names:
        raise RunError(
            "weight sync: the embeddings are tied, and lm_head.weight was not sent as well; vLLM keeps a packed copy "
            "of the output head, which would stay stale"
        )


def _refuse_differences(compared: Compared) -> None:
    """Stop where a tensor is not what was sent, before the engine computes anything with it.

    Half of a packed layer that was not delivered is unset memory; a NaN from it would stay in the KV cache.
    """
    if compared.absent:
        raise RunError(f"weight sync: the trainer sent nothing for {_some(compared.absent)}, so its layer is not whole")
    if compared.wrong:
        raise RunError(f"attestation: the sampler does not hold what was sent for {_some(compared.wrong)}")


def _judge(sent: Sent, compared: Compared, differences: np.ndarray, limit: float) -> None:
    """Stop where the sampler's log-probs are not the trainer's."""
    mean, largest = float(differences.mean()), float(differences.max())
    if mean <= limit:
        return
    says = (
        f"attestation: mean |log-prob difference| between trainer and sampler is {mean:.3g} nats over "
        f"{len(differences)} tokens (largest {largest:.3g}, tolerance {limit:g}, sampling.attest_tolerance)"
    )
    unseen = sorted(set(sent.names) - set(compared.checked))
    if unseen:
        raise RunError(f"{says}; suspect the tensors that cannot be compared directly: {_some(unseen)}")
    raise RunError(
        f"{says}; all {len(compared.checked)} tensors agree, so suspect what is no weight: sampling.engine settings, "
        "position scaling in config.json, or an attention backend"
    )


def _some(names: Sequence[str]) -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
