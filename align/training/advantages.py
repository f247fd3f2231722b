"""Advantages: how much better a token or a response did than was to be expected.

Everything here is NumPy in float64 on whole rounds, computed once with numbers that every rank has, so no split into
ranks or micro-batches can change it.  Tokens of all responses lie behind each other; `lengths` cuts them.

Legend: N response tokens, K responses, T longest response, G responses of one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray
EPSILON = 1e-8


def token_rewards(scores: Array, kl: Array | None, lengths: Array, coefficient: float = 0.0) -> Array:
    """[N] -β k1 at every token, and the response's score [K] at its last one, which is its end of sequence if it has
    one (arXiv 1909.08593)."""
    rewards = np.zeros(int(lengths.sum())) if kl is None else -coefficient * np.asarray(kl, dtype=np.float64)
    rewards[np.cumsum(lengths) - 1] += scores
    return rewards


def gae(rewards: Array, values: Array, lengths: Array, gamma: float, lam: float) -> tuple[Array, Array]:
    """Advantages and returns [N] (arXiv 1506.02438): δ_t = ρ_t + γ V_{t+1} - V_t, A_t = δ_t + γλ A_{t+1}.

    Behind the last token there is no value: V = 0.  The returns are A + V.
    """
    table, known = _padded(rewards, lengths), _padded(values, lengths)
    advantages = np.zeros_like(table)
    following_value, following = np.zeros(len(lengths)), np.zeros(len(lengths))
    for t in reversed(range(table.shape[1])):  # beyond a response's end everything is 0, so nothing flows back
        delta = table[:, t] + gamma * following_value - known[:, t]
        following = np.where(t < lengths, delta + gamma * lam * following, 0.0)
        following_value = known[:, t]
        advantages[:, t] = following
    flat = _flat(advantages, lengths)
    return flat, flat + values


def rewards_to_go(rewards: Array, lengths: Array, gamma: float) -> Array:
    """[N] Σ_{s ≥ t} γ^{s-t} ρ_s."""
    return gae(rewards, np.zeros_like(rewards, dtype=np.float64), lengths, gamma, 1.0)[0]


def whiten(values: Array, counted: Array | None = None, shift: bool = True) -> Array:
    """(x - mean) / sqrt(var + 1e-8) over the counted entries of the whole round; `shift` off leaves the mean in.

    The variance is the unbiased one.  Fewer than two entries are returned as they are.
    """
    chosen = values if counted is None else values[counted]
    if len(chosen) < 2:
        return values
    mean, scale = chosen.mean(), 1.0 / np.sqrt(chosen.var(ddof=1) + EPSILON)
    return (values - mean) * scale + (0.0 if shift else mean)


def group_relative(rewards: Array, groups: Sequence[str], by_std: bool = True) -> Array:
    """[K] (r - mean of the prompt's responses) / (their unbiased std + 1e-6) (GRPO, arXiv 2402.03300).

    Without the division it is the advantage of Dr. GRPO (arXiv 2503.20783).
    """
    out = np.zeros(len(rewards))
    for members in _members(groups):
        found = rewards[members]
        scale = found.std(ddof=1) + 1e-6 if by_std and len(members) > 1 else 1.0
        out[members] = (found - found.mean()) / scale
    return out


def leave_one_out(rewards: Array, groups: Sequence[str]) -> Array:
    """[K] r_i - mean of the prompt's other responses (RLOO, arXiv 2402.14740)."""
    out = np.zeros(len(rewards))
    for members in _members(groups):
        found, size = rewards[members], len(members)
        if size < 2:
            raise ValueError(f"a leave-one-out baseline needs two responses; prompt {groups[members[0]]} has one")
        out[members] = (found - found.mean()) * size / (size - 1)
    return out


def ratings(strength: Array) -> Array:
    """[G] r that fits d_ij = r_i - r_j best, in least squares over the pairs that were answered in both orders.

    d = (D - D^T) / 2, in which a judge's liking for the first place cancels; D_ij [G, G] is what it said of i against
    j when i came first, NaN where no answer could be read.  With every pair answered, r_i = (1/G) Σ_j d_ij.  A pair
    that was not is left out and no tie is made of it: what is known of the two against the others decides.  The
    ratings of responses that are linked by comparisons add up to 0; one that was compared with none has NaN.
    """
    d = (strength - strength.T) / 2.0
    known = np.isfinite(d) & ~np.eye(len(d), dtype=bool)
    laplacian = np.diag(known.sum(axis=1)) - known.astype(np.float64)
    found = np.linalg.pinv(laplacian, rcond=1e-9, hermitian=True) @ np.where(known, d, 0.0).sum(axis=1)
    return np.where(known.any(axis=1), found, np.nan)


def from_preferences(strength: Array) -> Array:
    """[G] advantages from a matrix of preference strengths (pairwise GRPO, arXiv 2505.16265).

        A_i = r_i / sqrt( mean of d_ij² / 2 + 1e-6 ),   r = ratings(D), the mean over the pairs that were answered

    With every pair answered that is the paper's (1/G) Σ_j d_ij / sqrt( Σ_ij d_ij² / (2 G (G-1)) + 1e-6 ).  With
    D_ij = r_i - r_j it is GRPO with the unbiased standard deviation; a cycle gives zeros.
    """
    d = (strength - strength.T) / 2.0
    np.fill_diagonal(d, np.nan)
    return ratings(strength) / np.sqrt(np.nanmean(d**2) / 2.0 + 1e-6)


def over_tokens(per_response: Array, lengths: Array) -> Array:
    """[N] each response's number at each of its tokens."""
    return np.repeat(per_response, lengths)


def zero_spread(rewards: Array, groups: Sequence[str], tolerance: float = 1e-9) -> Array:
    """[K] whether all responses of the prompt have the same reward: such a group says nothing."""
    out = np.zeros(len(rewards), dtype=bool)
    for members in _members(groups):
        out[members] = np.ptp(rewards[members]) <= tolerance
    return out


def explained_variance(values: Array, returns: Array) -> float:
    """1 - var(returns - values) / var(returns); 0 for a constant guess, 1 for a perfect critic."""
    spread = float(returns.var())
    return 1.0 - float((returns - values).var()) / spread if spread > 0 else 0.0


def _members(groups: Sequence[str]) -> list[list[int]]:
    found: dict[str, list[int]] = {}
    for i, name in enumerate(groups):
        found.setdefault(name, []).append(i)
    return list(found.values())


def _mask(lengths: Array) -> Array:
    """[K, T] which places hold a token."""
    return np.arange(int(lengths.max(initial=0)))[None, :] < np.asarray(lengths)[:, None]


def _padded(values: Array, lengths: Array) -> Array:
    table = np.zeros((len(lengths), int(lengths.max(initial=0))))
    table[_mask(lengths)] = values
    return table


def _flat(table: Array, lengths: Array) -> Array:
    return table[_mask(lengths)]
