"""Directories that are there whole or not at all: checkpoints, models, the export.

All ranks write into a temporary directory; files are flushed and hashed, split over the ranks; rank 0 writes the
manifest and renames.  A directory under its final name therefore has a manifest that says what must be in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from align.distributed import Ranks
from align.errors import AlignError, RunError
from align.faults import reach
from align.storage.durable import (
    TEMPORARY,
    FileRecord,
    disk_error,
    hash_file,
    looks_full,
    make_directory,
    mismatch,
    os_errors,
    remove,
    seal,
    sync_directory,
    sync_file,
    unseal,
    write_file,
)

MANIFEST = "manifest.json"


@contextmanager
def commit(final: Path, ranks: Ranks) -> Iterator[Path]:
    """Yield a temporary directory in which every rank writes; at the end of the body it becomes `final`.

    Collective.  If any rank fails, all raise, and nothing appears under the final name.
    """
    temporary = final.with_name(TEMPORARY + final.name)
    try:
        with ranks.stage(f"prepare {final.name}"):
            if ranks.rank == 0:
                make_directory(final.parent)
                remove(temporary, "store.directory.clear")
                with os_errors(temporary):
                    reach("store.directory.before_mkdir")
                    temporary.mkdir()
        with ranks.stage(f"write {final.name}"), _library_errors(final):
            reach("store.directory.before_body")
            yield temporary
            reach("store.directory.after_body")
        with ranks.stage(f"commit {final.name}"):
            records = _flush(temporary, ranks)
            if ranks.rank == 0:
                _publish(temporary, final, records)
    except Exception:
        if ranks.rank == 0:
            with suppress(AlignError):
                remove(temporary, "store.directory.clear")
        raise


def _flush(directory: Path, ranks: Ranks) -> dict[str, FileRecord]:
    """Flush and hash every file, each rank its share; the records of all, on every rank."""
    names = ranks.broadcast(tree(directory), label=f"files of {directory.name}")
    mine = {}
    for index in ranks.share(len(names)):
        path = directory / names[index]
        with os_errors(path):
            reach("store.directory.before_fsync")
            sync_file(path)
            mine[names[index]] = hash_file(path)
    records: dict[str, FileRecord] = {}
    for part in ranks.gather(mine, label=f"hashes of {directory.name}"):
        records.update(part)
    return records


def _publish(temporary: Path, final: Path, records: dict[str, FileRecord]) -> None:
    """Write the manifest, make every name durable, and give the directory its final name."""
    files = {name: record._asdict() for name, record in sorted(records.items())}
    write_file(temporary / MANIFEST, seal({"files": files}), "store.directory.manifest")
    with os_errors(final):
        for directory in {(temporary / name).parent for name in records}:
            while directory != temporary:
                sync_directory(directory)
                directory = directory.parent
        sync_directory(temporary)
        if final.exists():
            raise ValueError(f"{final} is committed already")
        reach("store.directory.before_rename")
        os.rename(temporary, final)
        reach("store.directory.after_rename")
        sync_directory(final.parent)
        reach("store.directory.after_sync")


@contextmanager
def _library_errors(path: Path) -> Iterator[None]:
    """A full disk is reported by each library in its own words; say it in ours."""
    try:
        yield
    except AlignError:
        raise
    except OSError as error:
        raise disk_error(path, error) from error
    except Exception as error:
        if looks_full(path, error):
            raise disk_error(path, OSError(28, "No space left on device")) from error
        raise


def tree(directory: Path) -> list[str]:
    """Names of all files below `directory`, without its manifest, sorted.  Links are refused: they may lead outside."""
    names: list[str] = []
    for parent, folders, files in os.walk(directory):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink():
                raise RunError(f"{path}: is a symbolic link; a run directory holds real files only")
        names.extend(Path(parent, name).relative_to(directory).as_posix() for name in files)
    return sorted(set(names) - {MANIFEST})


def problems(directory: Path, ranks: Ranks, *, from_disk: bool = False) -> list[str]:
    """What is wrong with a committed directory: each damaged, missing or extra file.

    Collective where `ranks` has many; each hashes its share.  Any rank alone may pass Ranks().
    """
    try:
        recorded = {name: FileRecord(**entry) for name, entry in unseal(directory / MANIFEST)["files"].items()}
        extra = sorted(set(tree(directory)) - set(recorded))
    except (RunError, OSError, TypeError, KeyError, AttributeError) as error:
        found = [
            str(error) if isinstance(error, RunError) else f"{directory / MANIFEST}: missing or unreadable: {error}"
        ]
        return _merge(found, ranks, directory)
    names = sorted(recorded)
    found = [f"{directory / name}: not in the manifest" for name in extra]
    for index in ranks.share(len(names)):
        problem = mismatch(directory / names[index], recorded[names[index]], from_disk)
        found.extend([problem] if problem else [])
    return _merge(found, ranks, directory)


def _merge(found: Sequence[str], ranks: Ranks, directory: Path) -> list[str]:
    parts = ranks.gather(list(found), label=f"verify {directory.name}")
    return sorted({problem for part in parts for problem in part})


def total_bytes(directory: Path) -> int:
    """Bytes that a committed directory holds, by its manifest; 0 where that cannot be read."""
    try:
        return sum(entry["bytes"] for entry in unseal(directory / MANIFEST)["files"].values())
    except (RunError, OSError):
        return 0
