"""DPO on the pairs of the chain, with a table of logits as the policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch

from align.builders.steps import first_step
from align.recipe_steps import Steps
from align.records import Pair, Sample
from align.training.losses import PairBatch
from align.training.losses.pairwise import dpo
from tests.unit.chain_task import CRITICAL, Chain, S, V, base_policy, letters


class Learnt(NamedTuple):
    """What a policy has become."""

    success: float  # probability of a correct response
    wasted: float  # KL to the reference on the steps that do not matter, nats


def whole_pairs(seed: int, count: int) -> tuple[list[Pair], dict[str, Sample]]:
    """A correct against a wrong response, as they are."""
    chain, samples, pairs = Chain(seed, 5, 10), dict[str, Sample](), []
    for i in range(count):
        good, bad = chain.response(f"p{i}", 0, True), chain.response(f"p{i}", 1, False)
        samples |= {good.id: good, bad.id: bad}
        pairs.append(Pair(f"x{i}", f"p{i}", good.id, bad.id, 1.0, 0.0, 1.0, 1.0, "best_worst"))
    return pairs, samples


def step_pairs(seed: int, count: int) -> tuple[list[Pair], dict[str, Sample]]:
    """The first step of a good continuation against the bad step."""
    pairs, samples = continuation_pairs(seed, count)
    rule = Steps(rule="tokens", tokens_per_step=1)
    steps = {p.chosen_id: first_step(samples[p.chosen_id], rule, letters) for p in pairs}
    return pairs, samples | steps


@cache
def continuation_pairs(seed: int, count: int) -> tuple[list[Pair], dict[str, Sample]]:
    """A good continuation to its end against the bad step."""
    return Chain(seed, 5, 10, shared_prefix=True).pairs(count)


def learn(pairs: Sequence[Pair], samples: Mapping[str, Sample], updates: int = 300, beta: float = 0.1) -> Learnt:
    """Adam on the real loss, all pairs in every step."""
    reference = torch.tensor(base_policy()).log()
    logits = reference.clone().requires_grad_(True)
    chosen, rejected = (counts([samples[getattr(p, side)] for p in pairs]) for side in ("chosen_id", "rejected_id"))
    ones = torch.ones(len(pairs), dtype=torch.float64)
    optimizer = torch.optim.Adam([logits], lr=0.1)

    def total(of: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
        return (of * logprobs).sum((1, 2))

    for _ in range(updates):
        now = logits.log_softmax(-1)
        batch = PairBatch(
            policy_chosen=total(chosen, now), policy_rejected=total(rejected, now),
            ref_chosen=total(chosen, reference), ref_rejected=total(rejected, reference),
            label=ones, weight=ones, chosen_length=chosen.sum((1, 2)), rejected_length=rejected.sum((1, 2)),
        )  # fmt: skip
        optimizer.zero_grad()
        dpo(batch, beta=beta).mean().backward()
        optimizer.step()
    found = logits.detach().softmax(-1)
    kl = (found * (found.log() - reference)).sum(-1)
    idle = [step for step in range(S) if step not in CRITICAL]
    return Learnt(float(found[CRITICAL[0], 0] * found[CRITICAL[1], 0]), float(kl[idle].sum()))


def counts(samples: Sequence[Sample]) -> torch.Tensor:
    """[pairs, S, V] which tokens a response has at which steps; its prompt's first token is no step."""
    found = torch.zeros(len(samples), S, V, dtype=torch.float64)
    for row, sample in enumerate(samples):
        for i, token in enumerate(sample.response_ids):
            found[row, len(sample.prompt_ids) - 1 + i, token] += 1.0
    return found
