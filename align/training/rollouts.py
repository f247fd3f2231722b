"""A round as a policy gradient sees it: what every token and response got, and what that says of each token.

`estimate` is the whole mathematics between log-probabilities, values and scores on one side and the loss on the
other.  It is NumPy on numbers that every rank has, once per round.

Legend: N response tokens, K responses, G responses of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from align.recipe_rl import PolicyGradient
from align.training import advantages as adv

Array = np.ndarray


@dataclass(frozen=True)
class Rollouts:
    """Responses of a round, their tokens behind each other.

    Example: Rollouts(ids=("9c…",), groups=("3f…",), lengths=array([2]), scores=array([0.7]), old=array([-0.1, -0.3]),
    reference=array([-0.2, -0.2]))
    """

    ids: Sequence[str]  # [K] sample ids
    groups: Sequence[str]  # [K] prompt ids
    lengths: Array  # [K] int
    scores: Array  # [K] one reward per response
    old: Array  # [N] log π of the trainer at the start of the round
    reference: Array | None = None  # [N]
    values: Array | None = None  # [N] the critic's, at the start of the round
    sampler: Array | None = None  # [N] log π as the sampler gave it
    baselines: Array | None = None  # [K] score of the prompt's greedy response
    masked: Array | None = None  # [K] responses whose loss is left out
    strengths: dict[str, Array] = field(default_factory=dict)  # by prompt [G, G], in the order of its responses here

    @property
    def counted(self) -> Array:
        """[K] whose loss counts."""
        return np.ones(len(self.lengths), dtype=bool) if self.masked is None else ~self.masked

    @property
    def token_kl(self) -> Array | None:
        """[N] k1 = log π - log π_ref."""
        return None if self.reference is None else self.old - self.reference

    def per_response(self, values: Array) -> Array:
        """[K] sums over each response's tokens."""
        return np.add.reduceat(values, np.cumsum(self.lengths) - self.lengths)


@dataclass(frozen=True)
class Estimates:
    """What a round's tokens are pushed by, and what the critic should have said."""

    advantages: Array  # [N]
    returns: Array | None  # [N], with a critic
    rewards: Array  # [K] the score less the KL of the whole response where that is in the reward


def estimate(rollouts: Rollouts, rl: PolicyGradient, algorithm: str, coefficient: float) -> Estimates:
    """Advantages by the algorithm's rule; `coefficient` is the β of the KL in the reward, 0 where it is not there.

    ppo, pairwise_ppo   GAE on token rewards, whitened
    reinforce_pp        rewards to go, whitened (arXiv 2501.03262)
    remax               rewards to go - score of the greedy response (arXiv 2310.10505)
    grpo, rloo          the response's reward less its group's, at every token
    pairwise_grpo       from a matrix of preferences, less the group-relative KL
    p3o                 none: its loss takes the rewards of two responses
    """
    kl = rollouts.token_kl if coefficient else None
    lengths = rollouts.lengths
    rewards = rollouts.scores - (coefficient * rollouts.per_response(kl) if kl is not None else 0.0)
    by_token = adv.token_rewards(rollouts.scores, kl, lengths, coefficient)
    counted = adv.over_tokens(rollouts.counted, lengths)
    returns = None
    if algorithm in ("ppo", "pairwise_ppo"):
        assert rollouts.values is not None, "PPO needs values"
        found, returns = adv.gae(by_token, rollouts.values, lengths, rl.gamma, rl.lam)
        found = adv.whiten(found, counted) if rl.whiten else found
    elif algorithm == "reinforce_pp":
        found = adv.rewards_to_go(by_token, lengths, rl.gamma)
        found = adv.whiten(found, counted) if rl.whiten else found
    elif algorithm == "remax":
        assert rollouts.baselines is not None, "ReMax needs greedy responses"
        found = adv.rewards_to_go(by_token, lengths, 1.0) - adv.over_tokens(rollouts.baselines, lengths)
    elif algorithm == "grpo":
        found = adv.over_tokens(adv.group_relative(rewards, rollouts.groups, rl.by_std), lengths)
    elif algorithm == "rloo":
        found = adv.over_tokens(adv.leave_one_out(rewards, rollouts.groups), lengths)
    elif algorithm == "pairwise_grpo":
        found = adv.over_tokens(_pairwise(rollouts, rewards - rollouts.scores), lengths)
    else:
        assert algorithm == "p3o", algorithm
        found = np.zeros(int(lengths.sum()))
    return Estimates(found, returns, rewards)


def _pairwise(rollouts: Rollouts, pulls: Array) -> Array:
    """[K] advantages from each prompt's preference matrix; a KL in the reward (`pulls` [K] = -β KL) enters as the
    difference of two responses, like a reward."""
    places: dict[str, list[int]] = {}
    for i, group in enumerate(rollouts.groups):
        places.setdefault(group, []).append(i)
    out = np.zeros(len(rollouts.groups))
    for group, members in places.items():
        pull = pulls[members]
        out[members] = adv.from_preferences(rollouts.strengths[group] + (pull[:, None] - pull[None, :]))
    return out
