"""Asks every verifier of a recipe about every response.

Verdicts depend on the items, the recipe's blocks and the seed only: not on how the items are cut into calls, as long
as a prompt's responses stay together.

Rules that take microseconds share one process.  Every other verifier has its own, or several (`workers`), and they all
run at the same time, beside those that need this process' accelerator: a slow one holds nobody up.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, Self

from align.errors import AlignError
from align.records import Verdict
from align.verifiers.base import Item, ModelVerifier, Outcome, Verifier, ask, judge, unit_hash
from align.verifiers.cache import VerdictCache, is_quick, remembers
from align.verifiers.host import Host, Hosted
from align.verifiers.registry import KINDS
from align.verifiers.spec import VerifierSpec

MOST_REASONS = 50  # different ones counted per verifier; further ones go into one count
OTHER_REASONS = "other reasons"


class VerifierPool:
    """The verifiers of a recipe: most in processes that can be killed, some (reward models) in this one."""

    def __init__(
        self,
        specs: Sequence[VerifierSpec],
        seed: int,
        in_process: Mapping[str, Verifier] | None = None,
        cache: VerdictCache | None = None,
    ) -> None:
        """`in_process` has the verifiers, by name, that need this process' accelerator."""
        self._specs, self._seed, self._cache = tuple(specs), seed, cache
        self._in_process = dict(in_process or {})
        absent = [s.name for s in self._specs if s.kind not in KINDS and s.name not in self._in_process]
        if absent:
            raise ValueError(f"verifiers {absent} run in this process and must be given in `in_process`")
        hosted = [s for s in self._specs if s.name not in self._in_process]
        shared = tuple(s for s in hosted if is_quick(s))
        self._shared = _Lane(shared) if shared else None
        self._own = {s.name: _Lane((s,)) for s in hosted if not is_quick(s)}
        self._lanes = [*([self._shared] if self._shared else []), *self._own.values()]
        self._threads: ThreadPoolExecutor | None = None
        self._paid: dict[str, dict[str, float]] = {}

    def verify(self, items: Sequence[Item], stage: str | None = None) -> list[Verdict]:
        """One verdict per item and verifier, sample-major: all verdicts on the first item in the recipe's order, then
        those on the second …  All responses of a prompt must be in one call.

        With `stage`, the name of the work in its run, verdicts are remembered: one that was given before costs 0 s.
        """
        questions = {spec.name: _Question(spec, items, self._cache, stage) for spec in self._specs}
        waiting = self._start(items, questions)
        for name, verifier in self._in_process.items():
            questions[name].answer(_ask_here(verifier, questions[name].items))
        for name, future in waiting.items():
            questions[name].answer(future())
        return [
            self._verdict(spec, item, questions[spec.name].outcomes[index])
            for index, item in enumerate(items)
            for spec in self._specs
        ]

    def _start(
        self, items: Sequence[Item], questions: Mapping[str, _Question]
    ) -> dict[str, Callable[[], list[Outcome]]]:
        """Set every lane to work; by verifier, how to wait for its outcomes."""
        waiting: dict[str, Callable[[], list[Outcome]]] = {}
        if self._shared is not None:
            rows = self._run(self._shared, items)
            for place, spec in enumerate(self._shared.specs):
                waiting[spec.name] = partial(_row, rows, place)
        for name, lane in self._own.items():
            waiting[name] = partial(_row, self._run(lane, questions[name].items), 0)
        return waiting

    def _run(self, lane: _Lane, items: Sequence[Item]) -> Callable[[], list[list[Outcome]]]:
        """Set the lane's processes to work on whole prompts.  One process and nothing beside it needs no thread."""
        if len(lane.hosts) == 1 and len(self._lanes) + len(self._in_process) == 1:
            rows = lane.hosts[0].run(items)
            return lambda: rows
        if self._threads is None:  # kept until the end: a child dies with the thread that started it
            self._threads = ThreadPoolExecutor(sum(len(each.hosts) for each in self._lanes))
        shares = _shares(items, len(lane.hosts))
        jobs = [
            self._threads.submit(host.run, [items[i] for i in share])
            for host, share in zip(lane.hosts, shares, strict=True)
        ]
        return lambda: _together(jobs, shares, len(lane.specs), len(items))

    def in_process(self, name: str) -> Verifier:
        """One of the verifiers that run in this process."""
        return self._in_process[name]

    def costs(self) -> dict[str, dict[str, float]]:
        """By in-process verifier, what it counted (tokens, requests) since this was last asked."""
        spent = {n: v.account() for n, v in self._in_process.items() if isinstance(v, ModelVerifier)}
        before, self._paid = self._paid, spent
        return {n: {k: v - before.get(n, {}).get(k, 0.0) for k, v in counts.items()} for n, counts in spent.items()}

    def close(self) -> None:
        """End the verifier processes.  In-process verifiers and the cache belong to whoever made them."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None
        for lane in self._lanes:
            for host in lane.hosts:
                host.close()

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


class _Lane:
    """Verifiers that take turns in one process, or one verifier in several."""

    def __init__(self, specs: tuple[VerifierSpec, ...]) -> None:
        self.specs = specs
        self.hosts = [Host([_hosted(spec) for spec in specs]) for _ in range(max(s.workers for s in specs))]


class _Question:
    """What one verifier is asked in a call: the items that are not known, each content once."""

    def __init__(
        self, spec: VerifierSpec, items: Sequence[Item], cache: VerdictCache | None, stage: str | None
    ) -> None:
        self.items, self.outcomes = items, list[Outcome]()
        self._remember: tuple[VerdictCache, str] | None = None
        if cache is None or stage is None or not remembers(spec):
            return
        self._remember = cache, stage
        self._keys = cache.keys(spec, items)
        self._known = cache.get(self._keys, stage)
        self._asked = sorted({k: i for i, k in reversed([*enumerate(self._keys)]) if k not in self._known}.values())
        self.items = [items[i] for i in self._asked]

    def answer(self, outcomes: list[Outcome]) -> None:
        """Take the verifier's outcomes on `items`, and remember its numbers; what was not asked took no time."""
        if self._remember is None:
            self.outcomes = outcomes
            return
        cache, stage = self._remember
        said = {self._keys[i]: outcome for i, outcome in zip(self._asked, outcomes, strict=True)}
        cache.put({key: o.value for key, o in said.items() if o.value is not None}, stage)
        free = {key: o._replace(seconds=0.0) for key, o in said.items()}
        free |= {key: Outcome(value, None) for key, value in self._known.items()}
        asked = set(self._asked)
        self.outcomes = [said[key] if i in asked else free[key] for i, key in enumerate(self._keys)]


def count_reasons(verdicts: Iterable[Verdict]) -> dict[str, Counter[str]]:
    """Per verifier that gave none somewhere: how often for each reason.

    The number of different reasons is bounded: a reason may quote the response.
    """
    counts: dict[str, Counter[str]] = {}
    for verdict in verdicts:
        if verdict.reason is not None:
            total = counts.setdefault(verdict.verifier, Counter())
            known = verdict.reason in total or len(total) < MOST_REASONS
            total[verdict.reason if known else OTHER_REASONS] += 1
    return counts


def _row(rows: Callable[[], list[list[Outcome]]], place: int) -> list[Outcome]:
    """Wait for a lane and take one verifier's outcomes."""
    return rows()[place]


def _shares(items: Sequence[Item], count: int) -> list[list[int]]:
    """Indices of the items for each of `count` processes, whole prompts in turn."""
    place: dict[str, int] = {}
    shares: list[list[int]] = [[] for _ in range(count)]
    for index, item in enumerate(items):
        shares[place.setdefault(item.prompt_id, len(place)) % count].append(index)
    return shares


def _together(
    jobs: Sequence[Future[list[list[Outcome]]]], shares: Sequence[Sequence[int]], verifiers: int, count: int
) -> list[list[Outcome]]:
    """Outcomes [verifier][item] of all processes, in the order of the items."""
    rows: list[list[Any]] = [[None] * count for _ in range(verifiers)]
    for job, share in zip(jobs, shares, strict=True):
        for row, part in zip(rows, job.result(), strict=True):
            for index, outcome in zip(share, part, strict=True):
                row[index] = outcome
    return rows


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
