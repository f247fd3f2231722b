"""What two or three ranks do in the tests of align.distributed: prints one JSON object, {case: [outcome per rank]}.

Every case runs in freshly forked ranks; an outcome is the case's return value or "<error class>: <message>".
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from align.distributed import Ranks, close, connect
from align.errors import InputError, RunError


def agree(ranks: Ranks) -> Any:
    ranks.barrier("here")
    with ranks.stage("fine"), ranks.stage("inner"):
        pass
    return [ranks.gather({"rank": ranks.rank}), ranks.broadcast("a" if ranks.rank else "b", src=1), [*ranks.share(5)]]


def one_refuses(ranks: Ranks) -> Any:
    ranks.vote("read", InputError("x.jsonl:3: no column") if ranks.rank == 1 else None)


def all_refuse(ranks: Ranks) -> Any:
    ranks.vote("read", InputError("x.jsonl:3: no column"))


def refusal_and_failure(ranks: Ranks) -> Any:
    ranks.vote("read", [InputError("bad row"), RunError("full disk"), None][ranks.rank])


def bug_in_a_nested_stage(ranks: Ranks) -> Any:
    with ranks.stage("outer"):
        with ranks.stage("inner"):
            if ranks.rank == 0:
                raise KeyError("loss")


def failure_while_the_others_gather(ranks: Ranks) -> Any:
    with ranks.stage("hash"):
        if ranks.rank == 0:
            raise RunError("unreadable")
        ranks.gather(1, label="hashes")


def different_places(ranks: Ranks) -> Any:
    ranks.barrier("left" if ranks.rank else "right")


def failure_while_the_others_train(ranks: Ranks) -> Any:
    """The others sit in a collective of the training group, where no vote can reach them."""
    import align.distributed

    align.distributed._FAILING_S = 0.5
    began = time.monotonic()
    with ranks.stage("train"):
        if ranks.rank == 1:
            raise RunError("out of memory")
        try:
            dist.all_reduce(torch.zeros(1))
        except RuntimeError:
            raise RunError(f"collective ended in {time.monotonic() - began < 10}") from None


def exit_without_a_word(ranks: Ranks) -> Any:
    if ranks.rank == 1:
        os._exit(3)
    ranks.barrier("end of round")


def too_slow(ranks: Ranks) -> Any:
    if ranks.rank == 1:
        time.sleep(8)
        return "slept"
    ranks.barrier("end of round")


CASES: dict[Callable[[Ranks], Any], tuple[int, float]] = {  # ranks, deadline
    agree: (3, 20),
    one_refuses: (2, 20),
    all_refuse: (2, 20),
    refusal_and_failure: (3, 20),
    bug_in_a_nested_stage: (2, 20),
    failure_while_the_others_gather: (3, 20),
    different_places: (2, 20),
    failure_while_the_others_train: (2, 20),
    exit_without_a_word: (2, 20),
    too_slow: (2, 4),
}


def run_case(case: Callable[[Ranks], Any], world_size: int, deadline_s: float) -> list[Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes = []
    for rank in range(world_size):
        reader, writer = os.pipe()
        if os.fork() == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            try:
                ranks = connect(deadline_s)
                outcome = case(ranks)
                close(ranks)
            except Exception as error:
                outcome = f"{type(error).__name__}: {error}"
            os.write(writer, json.dumps(outcome).encode())
            os._exit(0)
        os.close(writer)
        pipes.append(reader)
    outcomes = []
    for reader in pipes:
        with os.fdopen(reader) as file:
            text = file.read()
        outcomes.append(json.loads(text) if text else "gone")
    for _ in range(world_size):
        os.wait()
    return outcomes


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump({case.__name__: run_case(case, *how) for case, how in CASES.items()}, sys.stdout)
