"""Asks every verifier of a recipe about every response.

Verdicts depend on the items, the recipe's blocks and the seed only: not on how the items are cut into calls, as long
as a prompt's responses stay together.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

from align.errors import AlignError
from align.records import Verdict
from align.verifiers.base import Item, Outcome, Verifier, ask, judge, unit_hash
from align.verifiers.host import Host, Hosted
from align.verifiers.registry import KINDS
from align.verifiers.spec import VerifierSpec

MOST_REASONS = 50  # different ones counted per verifier; further ones go into one count
OTHER_REASONS = "other reasons"


class VerifierPool:
    """The verifiers of a recipe: most in a process that can be killed, some (reward models) in this one."""

    def __init__(
        self, specs: Sequence[VerifierSpec], seed: int, in_process: Mapping[str, Verifier] | None = None
    ) -> None:
        """`in_process` has the verifiers, by name, that need this process' accelerator."""
        self._specs, self._seed = tuple(specs), seed
        self._in_process = dict(in_process or {})
        absent = [s.name for s in self._specs if s.kind not in KINDS and s.name not in self._in_process]
        if absent:
            raise ValueError(f"verifiers {absent} run in this process and must be given in `in_process`")
        self._hosted = [s for s in self._specs if s.name not in self._in_process]
        self._host = Host([_hosted(spec) for spec in self._hosted])
        self.failures: dict[str, Counter[str]] = {spec.name: Counter() for spec in self._specs}
        """Per verifier, how often it gave none and why."""

    def verify(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict per item and verifier, sample-major: all verdicts on the first item in the recipe's order, then
        those on the second …  All responses of a prompt must be in one call."""
        outcomes = dict(zip((s.name for s in self._hosted), self._host.run(items), strict=True))
        for name, verifier in self._in_process.items():
            outcomes[name] = _ask_here(verifier, items)
        verdicts = [
            self._verdict(spec, item, outcomes[spec.name][index])
            for index, item in enumerate(items)
            for spec in self._specs
        ]
        for name, counts in count_reasons(verdicts).items():
            _add_counts(self.failures[name], counts)
        return verdicts

    def close(self) -> None:
        """End the verifier process.  In-process verifiers belong to whoever made them."""
        self._host.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _verdict(self, spec: VerifierSpec, item: Item, outcome: Outcome) -> Verdict:
        """The outcome with the recipe's `invert` and `flip_rate` in force."""
        value = outcome.value
        if value is not None:
            flipped = spec.flip_rate > 0 and unit_hash(self._seed, "flip", spec.name, item.sample_id) < spec.flip_rate
            if spec.output == "score":
                value = 0.0 - value if spec.invert else value
            elif spec.invert != flipped:
                value = 1.0 - value
        return Verdict(item.sample_id, spec.name, value, outcome.reason, outcome.seconds)


def count_reasons(verdicts: Iterable[Verdict]) -> dict[str, Counter[str]]:
    """Per verifier that gave none somewhere: how often for each reason."""
    counts: dict[str, Counter[str]] = {}
    for verdict in verdicts:
        if verdict.reason is not None:
            counts.setdefault(verdict.verifier, Counter())[verdict.reason] += 1
    return counts


def _add_counts(total: Counter[str], new: Counter[str]) -> None:
    """Add, keeping the number of different reasons bounded: a reason may quote the response."""
    for reason, count in new.items():
        known = reason in total or len(total) < MOST_REASONS
        total[reason if known else OTHER_REASONS] += count


def _hosted(spec: VerifierSpec) -> Hosted:
    return Hosted(spec.name, spec.timeout_s, KINDS[spec.kind].whole_prompts, spec.model_dump(mode="json"))


def _ask_here(verifier: Verifier, items: Sequence[Item]) -> list[Outcome]:
    """Outcomes of a verifier in this process: all items at once, and prompt by prompt where that raises.

    No deadline can be kept here; an error meant for the user (`AlignError`) ends the stage.
    """
    if not items:
        return []
    start_s = time.monotonic()
    try:
        verdicts = ask(verifier, items)
    except AlignError:
        raise
    except Exception:
        verdicts = _ask_by_prompt(verifier, items)
    seconds = (time.monotonic() - start_s) / len(items)
    return [Outcome(None, v, seconds) if isinstance(v, str) else Outcome(v, None, seconds) for v in verdicts]


def _ask_by_prompt(verifier: Verifier, items: Sequence[Item]) -> list[float | str]:
    groups: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(item.prompt_id, []).append(index)
    verdicts: list[float | str] = ["not judged"] * len(items)
    for indices in groups.values():
        for index, verdict in zip(indices, judge(verifier, [items[i] for i in indices]), strict=True):
            verdicts[index] = verdict
    return verdicts
