"""The sequences on which trainer and sampler are compared after a weight sync, and policy and export at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence

from align.records import Prompt

PROBE_PROMPTS = 4
PROBE_TOKENS = 48
Probe = tuple[tuple[int, ...], tuple[int, ...]]
"""Prompt ids and response ids."""


def choose_probes(prompts: Sequence[Prompt], vocabulary: int, context: int) -> list[Probe]:
    """Real prompts that fit in `context` tokens, and one sequence that walks the vocabulary so that rarely used
    embedding rows are looked at too."""
    found = [(p.token_ids[:1], p.token_ids[1:]) for p in prompts[:PROBE_PROMPTS] if len(p.token_ids) > 1]
    found = [probe for probe in found if len(probe[0]) + len(probe[1]) < context]
    length = min(PROBE_TOKENS, vocabulary, context - 1)
    stride = next(s for s in range(vocabulary // length or 1, vocabulary + 1) if math.gcd(s, vocabulary) == 1)
    walk = tuple(i * stride % vocabulary for i in range(length))
    return [*found, (walk[:1], walk[1:])]
