"""What a round's responses are worth to a policy, once: log-probabilities of whole responses or of their tokens.

Each rank looks at a share of the prompts, and every rank gets everything.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from align.records import Sample
from align.training.engine import PolicyEngine, Sequence_


def sequence_sums(engine: PolicyEngine, sequences: Sequence[Sequence_], reference: bool) -> list[float]:
    """Summed log-probability of each response, in the order asked for, under the policy or the initial one.

    Sequences with the same prompt go to the same rank, which computes the prompt once.  Collective; every rank asks
    for the same.
    """
    prompts: dict[tuple[int, ...], int] = {}
    for prompt, _ in sequences:
        prompts.setdefault(tuple(prompt), len(prompts))
    turns = engine.ranks.share(len(prompts))
    mine = [i for i, (prompt, _) in enumerate(sequences) if prompts[tuple(prompt)] in turns]
    found = engine.token_logprobs([sequences[i] for i in mine], reference=reference).logprobs
    sums = {i: float(row.sum(dtype="float64")) for i, row in zip(mine, found, strict=True)}
    everything = {i: total for part in engine.ranks.gather(sums, "sums") for i, total in part.items()}
    return [everything[i] for i in range(len(sequences))]


def response_sums_of(engine: PolicyEngine, samples: Sequence[Sample], reference: bool) -> dict[str, float]:
    """By sample id, the summed log-probability of each response.  Collective."""
    sums = sequence_sums(engine, [(s.prompt_ids, s.response_ids) for s in samples], reference)
    return {s.id: total for s, total in zip(samples, sums, strict=True)}


def response_tokens_of(engine: PolicyEngine, samples: Sequence[Sample], temperature: float) -> dict[str, np.ndarray]:
    """By sample id, [T] the policy's log-probability of each token at this temperature.  Collective."""
    prompts = sorted({s.prompt_id for s in samples})
    mine = {prompts[i] for i in engine.ranks.share(len(prompts))}
    wanted = [s for s in samples if s.prompt_id in mine]
    found = engine.token_logprobs([(s.prompt_ids, s.response_ids) for s in wanted], temperature=temperature).logprobs
    parts = {s.id: row for s, row in zip(wanted, found, strict=True)}
    return {i: row for part in engine.ranks.gather(parts, "tokens") for i, row in part.items()}
