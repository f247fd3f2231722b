"""The run directory: what is committed, by whom it is held, and where a resumed run goes on.

    <output_dir>/<name>/  lock  run.json  recipe.yaml  environment.json  metrics.jsonl  summary.json  …
      rounds/00003/       samples-00000.parquet + .json (its ledger entry) …, evaluation.json …, manifest.json
      checkpoints/00003/  files + manifest.json;  checkpoints/LATEST
      cold_start/, export/ …  files + manifest.json

A stage's shard counts once its ledger entry is there and matches; a stage counts once the round's manifest lists it.
Nothing committed is overwritten, except the files that only describe the run (summary, plan, metrics).
Methods marked collective must be called by every rank; the others may be called by any.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from align.distributed import Ranks
from align.errors import InputError, RunError
from align.recipe import Recipe
from align.storage import directories, provenance
from align.storage.durable import (
    TEMPORARY,
    make_directory,
    need_bytes,
    read_document,
    remove,
    write_document,
    write_file,
)
from align.storage.metrics_log import MetricsLog, Truncation
from align.storage.parquet import Record
from align.storage.rounds import RoundFiles
from align.storage.run_lock import RunLock

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_OWN_FILES = ("run", "environment")  # written by the store alone
_STATUS = ("running", "done", "failed")


class RunStore:
    """One run's directory, held by this process.

    Example, one rank: store = RunStore.open(recipe, Ranks(), identity={"model": "3f…"}); store.stage_done(0, "samples")
    """

    def __init__(self, root: Path, ranks: Ranks, lock: RunLock, notices: Sequence[str], keep_checkpoints: int) -> None:
        self.root = root
        self.notices = list(notices)  # what the user should know: environment changed, damage that was passed over
        self.duplicates: dict[tuple[int, str], int] = {}  # rows that `read` dropped because their id came twice
        self._ranks = ranks
        self._lock = lock
        self._keep = keep_checkpoints
        self._metrics = MetricsLog(root / "metrics.jsonl")
        self._verified: set[str] = set()  # directories whose hashes this process has seen to be right
        self._latest: int | None = None

    # ---- life ----------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, recipe: Recipe, ranks: Ranks, *, identity: Mapping[str, str], allow_new: bool = True) -> RunStore:
        """Take the run's directory, begin the run or check that it is the same one, and find its newest checkpoint.

        Collective.  `identity` holds hashes of what the recipe only names, such as {"model": "3f…"}.
        InputError where the run was started with something else, RunError where another process holds it.
        """
        given = Path(recipe.output_dir).expanduser() / recipe.name
        with ExitStack() as undo:
            notices: list[str] = []
            with ranks.stage("open the run directory"):
                if ranks.rank == 0:
                    root, lock = _take(given, allow_new)
                    undo.callback(lock.release)
                    notices = _begin_or_check(root, recipe, identity, allow_new)
            with ranks.stage("join the run directory"):
                if ranks.rank != 0:
                    root = given.resolve()
                    lock = RunLock.join(root)
                    undo.callback(lock.release)
            store = cls(root, ranks, lock, notices, recipe.training.keep_checkpoints)
            store._find_latest()
            undo.pop_all()
        return store

    def close(self) -> None:
        """Let the directory go.  The end of the process does it too."""
        self._lock.release()

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def finished(self) -> bool:
        """Whether the run reached its end."""
        summary = self.read_json(None, "summary")
        return summary is not None and summary.get("status") == "done"

    # ---- rounds: shards, stages, small reports -------------------------------------------------------------

    def shard_done(self, round_index: int, stage: str, index: int) -> bool:
        """Whether this shard is committed and undamaged; a pending one is to be made again."""
        return self._round(round_index).shard_done(stage, index)

    def commit_shard(self, round_index: int, stage: str, index: int, rows: Sequence[Record]) -> None:
        """Commit one shard's rows; any one rank.  ValueError where that shard is committed with other rows."""
        self._round(round_index).commit_shard(stage, index, rows)

    def commit_stage(self, round_index: int, stage: str, shards: int) -> None:
        """Declare the stage complete in `shards` shards.  Collective; RunError where one is missing or damaged."""
        files = self._round(round_index)
        with self._ranks.stage(f"round {round_index}: finish {stage}"):
            pass
        with self._ranks.stage(f"round {round_index}: commit {stage}"):
            if self._ranks.rank == 0:
                files.commit_stage(stage, shards)

    def stage_done(self, round_index: int, stage: str) -> bool:
        """Whether the stage is in the round's manifest."""
        return self._round(round_index).stage_done(stage)

    def read(self, round_index: int, stage: str) -> list[Any]:
        """A committed stage's rows in shard and row order, each id once; RunError where a shard is damaged."""
        rows, repeated = self._round(round_index).read(stage)
        self.duplicates[round_index, stage] = repeated
        return rows

    def _round(self, round_index: int) -> RoundFiles:
        return RoundFiles(self._inside(f"rounds/{round_index:05d}"), round_index)

    # ---- small reports -------------------------------------------------------------------------------------

    def commit_json(self, round_index: int | None, name: str, value: Mapping[str, Any]) -> None:
        """Commit a small report as <name>.json; rank 0 writes, on other ranks this does nothing.

        A round's report is listed in its manifest and never changes.  One of the run (round None) may be replaced.
        """
        _check_name(name)
        if self._ranks.rank != 0:
            return
        if round_index is not None:
            self._round(round_index).commit_json(name, value)
        elif name in _OWN_FILES:
            raise ValueError(f"{name}.json is the store's own")
        else:
            write_document(self._inside(f"{name}.json"), value)

    def read_json(self, round_index: int | None, name: str) -> dict[str, Any] | None:
        """A committed report, or None where there is none; RunError where it is damaged."""
        _check_name(name)
        if round_index is not None:
            return self._round(round_index).read_json(name)
        return read_document(self._inside(f"{name}.json"))

    def pin(self, name: str, value: Mapping[str, Any]) -> None:
        """Remember what an input looked like when the run began; InputError where it looks different now.

        For inputs whose hash needs more than the recipe, such as the rendered prompts.  Every rank may call it.
        """
        known = self.read_json(None, name)
        if known is None:
            self.commit_json(None, name, value)
        elif changes := provenance.differences(known, value):
            raise InputError(provenance.refusal(self.root, f"input ({name})", changes))

    def write_summary(self, value: Mapping[str, Any]) -> None:
        """Replace summary.json; rank 0 writes, on other ranks this does nothing."""
        if value.get("status") not in _STATUS:
            raise ValueError(f"summary status {value.get('status')!r} is none of {_STATUS}")
        self.commit_json(None, "summary", value)

    # ---- metrics -------------------------------------------------------------------------------------------

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl; `row` has an integer "step".  Rank 0 writes, on other ranks this does nothing."""
        if self._ranks.rank == 0:
            self._metrics.append(row)

    def truncate_metrics(self, after_step: int) -> Truncation | None:
        """Drop the lines of steps that will be made again, and torn lines; rank 0 only, returns what was dropped."""
        return self._metrics.truncate(after_step) if self._ranks.rank == 0 else None

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a torn line is left out."""
        return self._metrics.read()

    # ---- directories and checkpoints -----------------------------------------------------------------------

    @contextmanager
    def commit_directory(self, name: str, *, need: int = 0) -> Iterator[Path]:
        """Yield a temporary directory for every rank to write into; at the end of the body it is committed as `name`.

        Collective.  `need` is the bytes it will take where that is known: refused at once where they are not free.
        A directory of that name that is damaged is replaced, a sound one is never.
        """
        final = self._inside(name)
        with self._ranks.stage(f"prepare {name}"):
            need_bytes(final.parent, need)
            damaged = directories.problems(final, self._ranks) if final.exists() else []
            if final.exists() and not damaged:
                raise ValueError(f"{final} is committed already")
            if damaged and self._ranks.rank == 0:
                remove(final, "store.directory.replace")
        if damaged:
            self.notices.append(f"{final} was damaged and is made again: {damaged[0]}")
        with directories.commit(final, self._ranks) as temporary:
            yield temporary
        self._verified.add(name)

    def verify_directory(self, name: str) -> Path | None:
        """Path of a committed directory whose files all match their hashes, or None where there is none.

        Hashes are computed once per process.  RunError names the damaged files and how to mend it.
        """
        path = self._inside(name)
        if not path.exists():
            return None
        if name not in self._verified:
            found = directories.problems(path, Ranks())
            if found:
                raise RunError("\n".join(found) + f"\nDelete {path} and start the run again to make it anew.")
            self._verified.add(name)
        return path

    def verify_checkpoint(self, version: int) -> Path:
        """Path of a checkpoint that may be loaded; RunError where it is missing or damaged."""
        path = self.verify_directory(f"checkpoints/{version:05d}")
        if path is None:
            raise RunError(f"{self.root / 'checkpoints'}: no checkpoint {version}")
        return path

    def latest_checkpoint(self) -> int | None:
        """The newest checkpoint that verified when the run was opened or was committed since, or None."""
        return self._latest

    @contextmanager
    def commit_checkpoint(self, version: int) -> Iterator[Path]:
        """Commit a directory as checkpoint `version`, move LATEST, and drop the oldest beyond the recipe's number.

        Collective.  An old one goes only after the new one was read back from the disk and its hashes matched.
        """
        name = f"checkpoints/{version:05d}"
        before = f"checkpoints/{self._latest:05d}" if self._latest is not None else None
        need = directories.total_bytes(self._inside(before)) if before else 0
        with self.commit_directory(name, need=need) as temporary:
            yield temporary
        with self._ranks.stage(f"move LATEST to {version}"):
            if self._ranks.rank == 0:
                self._metrics.sync()
                self._point_latest(version)
        damaged = directories.problems(self._inside(name), self._ranks, from_disk=True)
        if damaged:
            raise RunError("\n".join(damaged) + "\nThe disk did not keep what was written; older checkpoints are kept.")
        self._latest = version
        self._drop_old()

    def _drop_old(self) -> None:
        """Delete the verified newest checkpoint's oldest predecessors; collective."""
        with self._ranks.stage("drop old checkpoints"):
            if self._ranks.rank == 0 and self._latest is not None:
                older = [version for version in self._versions() if version <= self._latest]
                for old in older[self._keep :]:
                    remove(self._inside(f"checkpoints/{old:05d}"), "store.checkpoint.drop")

    def _versions(self) -> list[int]:
        """Numbers of the checkpoints that have their final name, newest first."""
        with suppress(FileNotFoundError):
            return sorted(
                (int(p.name) for p in (self.root / "checkpoints").iterdir() if p.name.isdigit()), reverse=True
            )
        return []

    def _point_latest(self, version: int) -> None:
        write_file(self._inside("checkpoints/LATEST"), f"{version:05d}\n".encode(), "store.latest")

    def _find_latest(self) -> None:
        """Newest checkpoint whose files match their hashes; collective.  LATEST follows it.

        A checkpoint is committed by its rename, so one that LATEST does not name yet counts.
        """
        damaged: list[str] = []
        versions = self._ranks.broadcast(self._versions(), label="checkpoints")
        for version in versions:
            name = f"checkpoints/{version:05d}"
            found = directories.problems(self._inside(name), self._ranks)
            if not found:
                self._verified.add(name)
                self._latest = version
                break
            damaged.extend(found)
        if damaged and self._latest is None:
            raise RunError("\n".join(damaged) + f"\nNo checkpoint in {self.root / 'checkpoints'} is sound. Restore one "
                           "from a backup, or delete that directory to train again from the first round.")  # fmt: skip
        self.notices.extend(f"passed over: {problem}" for problem in damaged)
        with self._ranks.stage("point LATEST"):
            if self._ranks.rank == 0 and self._latest is not None and _latest_text(self.root) != f"{self._latest:05d}":
                self._point_latest(self._latest)
        self._drop_old()

    # ---- paths ---------------------------------------------------------------------------------------------

    def _inside(self, name: str) -> Path:
        """A path in the run directory; a name that could lead out of it is refused, and so is a link."""
        path = self.root
        for part in name.split("/"):
            _check_name(part)
            path = path / part
            if path.is_symlink():
                raise RunError(f"{path}: is a symbolic link; a run directory holds real files only")
        return path


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a part of a run: letters, digits and _.- only, at most 64")


def _take(given: Path, allow_new: bool) -> tuple[Path, RunLock]:
    """Rank 0: the resolved run directory, made if need be, and the lock on it."""
    if not given.is_dir() and not allow_new:
        raise InputError(f"{given}: there is no such run; start it with `align run` or `align sample`")
    existing = next(p for p in (given, *given.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise InputError(f"{existing}: is not a directory; change `name` or `output_dir` in the recipe")
    make_directory(given)
    root = given.resolve()
    return root, RunLock.own(root)


def _begin_or_check(root: Path, recipe: Recipe, identity: Mapping[str, str], allow_new: bool) -> list[str]:
    """Rank 0, with the lock: what changed in the environment since the run began."""
    if provenance.is_run(root):
        try:
            notices = provenance.check(root, recipe, identity)
        except InputError:
            if any((root / made).exists() for made in _MADE):
                raise
            for written in _BEFORE_WORK:  # the recipe was mended before anything was made with it: begin again
                remove(root / written, "store.begin_again")
        else:
            _clear_leftovers(root)
            return notices
    if not allow_new:
        raise InputError(f"{root}: no run was begun there; start it with `align run`")
    _clear_leftovers(root)
    foreign = sorted(p.name for p in root.iterdir() if p.name not in _BEGUN_WITH)
    if foreign:
        raise InputError(f"{root}: holds {foreign[0]!r} but no run; change `name` or `output_dir`, or empty it")
    provenance.begin(root, recipe, identity)
    return []


_MADE = ("rounds", "checkpoints", "cold_start", "export", "metrics.jsonl")  # any of these is work done with a recipe
_BEFORE_WORK = ("run.json", "scratch", "prompts.json", "plan.json", "summary.json", "environment.json", "recipe.yaml")
_BEGUN_WITH = ("lock", "lock.ranks", "recipe.yaml", "environment.json")


def _clear_leftovers(root: Path) -> None:
    """Remove what a dead process did not finish; the lock is held, so nobody is writing."""
    for folder in (root, *(p for p in root.glob("*") if p.is_dir()), *(p for p in root.glob("rounds/*") if p.is_dir())):
        if folder.is_symlink() or (folder / directories.MANIFEST).exists() and folder.parent == root:
            continue  # committed as a whole: its manifest lists every file
        for leftover in folder.glob(f"{TEMPORARY}*"):
            remove(leftover, "store.leftover")


def _latest_text(root: Path) -> str:
    with suppress(OSError):
        return (root / "checkpoints" / "LATEST").read_text(encoding="utf-8").strip()
    return ""
