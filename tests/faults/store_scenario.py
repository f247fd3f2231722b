"""A small run that goes through every part of the store, for tests that kill it.

Started with `serve` it waits for orders, one JSON object per line, and forks one process per rank and order: imports
are paid once, so a killed run and its rerun take some tens of milliseconds.  An order is
{"directory", "environment": {…}, "ranks": n, "shim": null | "count" | k}; the answer is {"status": [exit status or
-signal of each rank], "seconds", "output": […]}.  The shim kills the process before its k-th call into the operating
system that opens, writes, flushes, renames or deletes, or counts those calls.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

from align.distributed import Ranks, close, connect
from align.errors import AlignError
from align.recipe import Recipe
from align.records import Pair, Sample, Score, Verdict, content_id
from align.storage import provenance
from align.store import RunStore

ROUNDS, PROMPTS, SAMPLES, SHARDS = 2, 6, 2, 3
CALLS = ("open", "write", "pwrite", "fsync", "rename", "unlink", "rmdir", "mkdir")
DEADLINE_S = 20.0  # of every wait for another rank
PATIENCE_S = 6.0  # how long a rank may outlive a failed one


def recipe(directory: str | Path, **changes: object) -> Recipe:
    """The recipe of the small run."""
    return Recipe.model_validate(
        {
            "name": "small",
            "output_dir": str(directory),
            "policy": {"model": "model"},
            "prompts": {"source": "prompts.jsonl"},
            "verifiers": [{"kind": "repetition", "name": "repetition"}],
            "training": {"keep_checkpoints": 1},
            **changes,
        }
    )


def make_samples(round_index: int, shard: int) -> list[Sample]:
    """The samples of one shard: a function of its arguments, as a real sampler's are."""
    rows = []
    for prompt, index in itertools.product(range(shard, PROMPTS, SHARDS), range(SAMPLES)):
        tokens = tuple(range(prompt, prompt + 3))
        rows.append(
            Sample(
                id=content_id(prompt, round_index, 0, index),
                prompt_id=content_id(prompt),
                index=index,
                policy_version=round_index,
                seed=index,
                prompt_ids=(prompt,),
                response_ids=tokens,
                logprobs=tuple(-0.1 * t for t in tokens),
                text=f"{prompt}-{index}",
                finish_reason="stop",
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                max_new_tokens=8,
            )
        )
    return rows


def go(directory: str | Path, ranks: Ranks) -> None:
    """The run, from wherever it stands to its end; the same order of commits as align.loop."""
    with RunStore.open(recipe(directory), ranks, identity={"model": "3f"}) as store:
        if store.finished:
            return
        store.pin("prompts", {"digest": "5e"})
        if store.verify_directory("scratch") is None:
            with store.commit_directory("scratch") as path:
                (path / f"weights-{ranks.rank}").write_bytes(b"0" * 3000)
                (path / "nested").mkdir(exist_ok=True)
                (path / "nested" / f"part-{ranks.rank}").write_bytes(b"1")
        for round_index in range(store.latest_checkpoint() or 0, ROUNDS):
            one_round(store, ranks, round_index)
            store.write_summary({"status": "running"})
        store.write_summary({"status": "done"})


def one_round(store: RunStore, ranks: Ranks, round_index: int) -> None:
    """Sample, verify, score, pair, and a checkpoint whose bytes depend on everything before it."""
    step = 10 * round_index
    store.truncate_metrics(step)
    if not store.stage_done(round_index, "samples"):
        with ranks.stage("samples"):
            for shard in ranks.share(SHARDS):
                if not store.shard_done(round_index, "samples", shard):
                    store.commit_shard(round_index, "samples", shard, make_samples(round_index, shard))
        store.commit_stage(round_index, "samples", SHARDS)
    samples = store.read(round_index, "samples")
    made = {
        "verdicts": [Verdict(s.id, "repetition", float(s.index), None, 0.5) for s in samples],
        "scores": [Score(s.id, s.prompt_id, s.index / 2, s.index / 2, 0.0, 1) for s in samples],
        "pairs": [
            Pair(content_id(a.id, b.id), a.prompt_id, a.id, b.id, 0.5, 0.5, 1.0, 0.5, "best_worst")
            for a, b in zip(samples[::2], samples[1::2], strict=True)
        ],
    }
    for stage, rows in made.items():
        if store.stage_done(round_index, stage):
            continue
        with ranks.stage(stage):
            if ranks.rank == 0:
                store.commit_shard(round_index, stage, 0, rows)
        store.commit_stage(round_index, stage, 1)
    if store.read_json(round_index, "pairing") is None:
        store.commit_json(round_index, "pairing", {"counts": {"pairs": len(made["pairs"])}})
    for i in range(1, 4):
        store.append_metrics({"step": step + i, "loss": 1 / (step + i)})
    with store.commit_checkpoint(round_index + 1) as path:
        before = b"" if round_index == 0 else (store.verify_checkpoint(round_index) / "weights-0").read_bytes()
        pairs = [pair.id for pair in store.read(round_index, "pairs")]
        (path / f"weights-{ranks.rank}").write_bytes(hashlib.sha256(before + json.dumps(pairs).encode()).digest() * 99)


def result(directory: str | Path) -> dict[str, object]:
    """All that must not depend on how often the run was killed; also proves that the files are sound."""
    with RunStore.open(recipe(directory), Ranks(), identity={"model": "3f"}, allow_new=False) as store:
        rows = {
            f"{stage}/{r}": [repr(row) for row in store.read(r, stage)]
            for r in range(ROUNDS)
            for stage in ("samples", "verdicts", "scores", "pairs")
        }
        weights = hashlib.sha256((store.verify_checkpoint(ROUNDS) / "weights-0").read_bytes()).hexdigest()
        names = sorted(p.relative_to(store.root).as_posix() for p in store.root.rglob("*"))
        return {
            "finished": store.finished,
            "rows": {name: sorted(found) for name, found in rows.items()},
            "repeated": sum(store.duplicates.values()),
            "weights": weights,
            "metrics": store.read_metrics(),
            "files": names,
            "notices": store.notices,
        }


class Shim:
    """Counts calls into the operating system, kills the process before call number `at`, and keeps a log."""

    def __init__(self, at: int | None) -> None:
        self.at, self.count = at, 0
        self.log: list[tuple[str, ...]] = []
        self.unsynced_renames: list[str] = []
        self._flushed: set[str] = set()
        for name in CALLS:
            setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, call: object) -> object:
        def wrapped(*args: object, **kwargs: object) -> object:
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            self._note(name, args)
            return call(*args, **kwargs)  # type: ignore[operator]

        return wrapped

    def _note(self, name: str, args: tuple[object, ...]) -> None:
        """Keep the order of flushes and renames, and which files were renamed before they were flushed."""
        if name == "fsync":
            path = os.readlink(f"/proc/self/fd/{args[0]}")
            self._flushed.add(path)
            self.log.append((name, path))
        elif name == "rename":
            source = Path(str(args[0]))
            files = [source] if source.is_file() else [p for p in source.rglob("*") if p.is_file()]
            if ".tmp-gone-" not in str(args[1]):
                self.unsynced_renames.extend(str(p) for p in files if str(p) not in self._flushed)
            if str(source) in self._flushed:
                self._flushed.add(str(args[1]))
            self.log.append((name, str(args[0]), str(args[1])))


def _rank(order: dict, rank: int, port: int) -> int:
    """One rank of one order, in a process of its own; returns its exit status."""
    os.environ.update(order["environment"])
    if order["ranks"] > 1:
        place = {"RANK": rank, "WORLD_SIZE": order["ranks"], "LOCAL_RANK": rank, "MASTER_PORT": port}
        os.environ.update({"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in place.items()}})
    shim = order.get("shim")
    watcher = None if shim is None else Shim(None if shim == "count" else int(shim))
    try:
        ranks = connect(order.get("deadline_s", DEADLINE_S))
        try:
            go(order["directory"], ranks)
        finally:
            close(ranks)
    except AlignError as error:
        print(f"{type(error).__name__}: {error}")
        return error.exit_code
    if watcher is not None:
        print(json.dumps({"count": watcher.count, "log": watcher.log, "unsynced": watcher.unsynced_renames}))
    return 0


def _spawn(order: dict, rank: int, port: int, output: Path) -> int:
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            status = _rank(order, rank, port)
            sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        sys.stdout.flush()
        os._exit(status)


def _wait(children: list[int]) -> list[int]:
    """Exit status of each rank; as a launcher does, kill those that outlive a failed one by too long."""
    status: dict[int, int] = {}
    failed_at = None
    while len(status) < len(children):
        for child in (c for c in children if c not in status):
            pid, code = os.waitpid(child, os.WNOHANG)
            if pid:
                status[child] = os.waitstatus_to_exitcode(code)
        if failed_at is None and any(status.values()):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > PATIENCE_S:
            for child in (c for c in children if c not in status):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    return [status[child] for child in children]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve() -> None:
    """Answer orders until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        order = json.loads(line)
        scratch = Path(order["directory"]).with_name(Path(order["directory"]).name + ".out")
        scratch.mkdir(parents=True, exist_ok=True)
        outputs = [scratch / f"{rank}.txt" for rank in range(order["ranks"])]
        for _ in range(3):  # somebody else may take the port before the ranks do
            port = _free_port()
            began = time.monotonic()
            children = [_spawn(order, rank, port, outputs[rank]) for rank in range(order["ranks"])]
            status = _wait(children)
            output = [path.read_text() for path in outputs]
            if not any("could not join" in text for text in output):
                break
        answers.write(json.dumps({"status": status, "seconds": time.monotonic() - began, "output": output}) + "\n")
        answers.flush()


if __name__ == "__main__":
    import pandas  # noqa: F401  (Arrow imports it at the first array; here it is paid for once)

    import align.recipe_file  # noqa: F401

    provenance.environment()
    if "torch" in sys.argv:
        import torch
        import torch.distributed

        torch.set_num_threads(1)
    serve()
