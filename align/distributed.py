"""Ranks: who takes part, one failure vote before every collective, and a deadline on every wait.

A rank that fails tells the others at the next vote, and all of them stop with the same message.  A rank that dies or
hangs is named, with the place where it was last seen.  One process needs no torch and no process group.
Control messages travel over gloo on the CPU, apart from the training collectives.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple

from align.errors import AlignError, InputError, RunError

_ANSWER_S = 5.0  # how long to ask the key-value store where a lost rank was last seen
_FAILING_S = 30.0  # how long a failed rank waits for the others to come to the vote before it leaves
_POLL_S = 0.02


class RanksFailed(RunError):
    """Every rank raises this together, after a vote or because a rank was lost."""


class RanksRefused(InputError):
    """Every rank raises this together: a rank found the user's input wrong."""


class Failure(NamedTuple):
    """One rank's error, as the others get to see it."""

    label: str
    rank: int
    refused: bool  # an InputError
    text: str


class Ranks:
    """This process's place among the ranks, and how it agrees with them.

    Example, one process: Ranks().share(3) is range(0, 3, 1), and vote() just raises the error it was given.
    """

    def __init__(
        self, rank: int = 0, world_size: int = 1, local_rank: int = 0, *, deadline_s: float = 1800.0,
        group: Any = None, places: Any = None,
    ) -> None:  # fmt: skip
        self.rank = rank
        self.world_size = world_size
        self.local_rank = local_rank
        self.deadline_s = deadline_s
        self._group = group  # gloo group of all ranks, for control messages only
        self._places = places  # torch.distributed.Store: where each rank was last seen
        self._turn = 0  # exchanges so far; equal on all ranks

    def share(self, count: int) -> range:
        """The indices below `count` that are this rank's work: i with i % world_size == rank."""
        return range(self.rank, count, self.world_size)

    def barrier(self, label: str) -> None:
        """Wait for every rank; `label` says for what in the message of a wait that fails."""
        self._exchange(label, None)

    def gather(self, value: Any, label: str = "gather") -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        return self._exchange(label, value)

    def broadcast(self, value: Any, src: int = 0, label: str = "broadcast") -> Any:
        """The value of rank `src`, on every rank."""
        return self._exchange(label, value if self.rank == src else None)[src]

    def vote(self, label: str, error: BaseException | None) -> None:
        """Raise on every rank if any rank has an error; the message names the ranks that failed and why."""
        if self.world_size == 1:
            if error is not None:
                raise error
            return
        if error is None:
            self._exchange(label, None)
            return
        if not isinstance(error, AlignError):
            traceback.print_exception(error, file=sys.stderr)
        mine = Failure(label, self.rank, isinstance(error, InputError), describe(error))
        self._places.set(f"error{self.rank}", mine.text)
        if not self._all_come(min(_FAILING_S, self.deadline_s)):
            raise RanksFailed(_message([mine])) from error  # this rank's end sets the others free
        self._exchange(label, mine, error)

    @contextmanager
    def stage(self, label: str) -> Iterator[None]:
        """Run the body, then vote: past the end of it, every rank has come through.

        Stages may be nested.  An interrupt is not voted on: it ends this rank, and the others notice.
        """
        error = None
        try:
            yield
        except (RanksFailed, RanksRefused):
            raise  # the others raise the same, so nobody waits for another vote
        except Exception as caught:
            error = caught
        self.vote(label, error)

    def _exchange(self, label: str, value: Any, cause: BaseException | None = None) -> list[Any]:
        """Every rank's value.  A rank that failed on its way here sends its Failure instead, and all raise it."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        self._turn += 1
        replies: list[Any] = [None] * self.world_size
        try:
            self._places.set(f"rank{self.rank}", f"{self._turn} {label}")
            dist.all_gather_object(replies, (label, value), group=self._group)
        except (RuntimeError, ValueError) as error:  # gloo says that a peer is gone or that it waited too long
            raise self._lost(label, error) from error
        failures = [reply[1] for reply in replies if isinstance(reply[1], Failure)]
        if failures:
            kind = RanksRefused if all(failure.refused for failure in failures) else RanksFailed
            raise kind(_message(failures)) from cause
        labels = [reply[0] for reply in replies]
        if labels != [label] * self.world_size:
            raise RanksFailed(f"the ranks are not at the same place: {dict(enumerate(labels))}")
        return [reply[1] for reply in replies]

    def _all_come(self, patience_s: float) -> bool:
        """Whether every other rank comes to this rank's next exchange soon; one stuck in a collective never will."""
        self._places.set(f"rank{self.rank}", f"{self._turn + 1} failed")
        end = time.monotonic() + patience_s
        while time.monotonic() < end:
            seen = self._last_seen()
            if len(seen) == self.world_size and all(turn > self._turn for turn, _ in seen.values()):
                return True
            time.sleep(_POLL_S)
        return False

    def _lost(self, label: str, error: BaseException) -> RanksFailed:
        """The message for an exchange that failed: who is missing, and where each was last seen."""
        seen = self._last_seen()
        missing = [rank for rank, (turn, _) in seen.items() if turn < self._turn]
        if not missing and self.world_size == 2:
            missing = [1 - self.rank]
        late = "timed out" in str(error).lower()
        how = f"did not come within {self.deadline_s:g} s" if late else "is gone"
        places = {rank: f" (last seen at {place!r})" for rank, (_, place) in seen.items()}
        who = ", ".join(f"rank {rank} {how}{places.get(rank, '')}" for rank in missing) or f"a rank {how}"
        known = "".join(f"; rank {rank} failed: {text}" for rank, text in self._ask("error").items())
        return RanksFailed(f"rank {self.rank} waited for the other ranks at {label!r}: {who}{known}. Run it again.")

    def _last_seen(self) -> dict[int, tuple[int, str]]:
        """Turn and label of each rank; empty where nobody answers."""
        seen = {}
        for rank, text in self._ask("rank").items():
            turn, _, label = text.partition(" ")
            seen[rank] = (int(turn), label)
        return seen

    def _ask(self, key: str) -> dict[int, str]:
        """What the ranks left under a key.  Bounded, because the rank that holds the answers may be dead or stopped."""
        found: dict[int, str] = {}

        def ask() -> None:
            with suppress(RuntimeError):
                for rank in range(self.world_size):
                    if self._places.check([f"{key}{rank}"]):
                        found[rank] = self._places.get(f"{key}{rank}").decode()

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(_ANSWER_S)
        return dict(found)


def describe(error: BaseException) -> str:
    """The message a user reads; for a bug also its kind and the line that raised it."""
    if isinstance(error, AlignError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _message(failures: list[Failure]) -> str:
    texts = {failure.text for failure in failures}
    if len(texts) == 1:
        ranks = ", ".join(str(failure.rank) for failure in failures)
        return f"{failures[0].label}: rank {ranks}: {texts.pop()}"
    return "; ".join(f"{failure.label}: rank {failure.rank}: {failure.text}" for failure in failures)


def connect(deadline_s: float = 1800.0) -> Ranks:
    """Join the ranks that the launcher started, as its RANK, WORLD_SIZE and LOCAL_RANK say; alone without them.

    `deadline_s` bounds every wait for another rank, so it must exceed the longest difference between two ranks' work.
    """
    rank, world_size, local_rank = (_integer(name, default) for name, default in _PLACE)
    if world_size == 1:
        return Ranks(deadline_s=deadline_s)
    _die_with_parent()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost rank is told in one line, not in C++ frames
    import torch
    import torch.distributed as dist

    wait = timedelta(seconds=deadline_s)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=wait))
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=wait)
        group = dist.new_group(backend="gloo", timeout=wait)
    except RuntimeError as error:
        others = f"the other {world_size - 1} within {deadline_s:g} s"
        raise RunError(f"rank {rank} could not join {others}: {error}") from error
    places = dist.PrefixStore("align", store)
    places.set(f"rank{rank}", "0 start")
    ranks = Ranks(rank, world_size, local_rank, deadline_s=deadline_s, group=group, places=places)
    ranks.barrier("start")
    return ranks


def close(ranks: Ranks) -> None:
    """Leave the process group.  A ZeRO-3 process that skips this can abort when the interpreter ends."""
    if ranks.world_size == 1:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


_PLACE = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))


def _integer(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit() or (name == "WORLD_SIZE" and int(text) < 1):
        raise InputError(f"environment variable {name}={text!r} is not a count; only a launcher should set it")
    return int(text)


def _die_with_parent() -> None:
    """Ask Linux to kill this rank when its launcher dies, so that a killed run leaves nobody behind.

    Elsewhere it does nothing: a rank then ends at its next vote.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    pr_set_pdeathsig = 1  # linux/prctl.h
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os.kill(os.getpid(), signal.SIGKILL)
