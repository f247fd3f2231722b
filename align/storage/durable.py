"""Files that survive kill -9 and power loss: written aside, flushed, renamed, and flushed again.

The only module that opens a run's files for writing.  An error of the operating system becomes a RunError that names
the path, what the write needed and what the disk has left.  Sizes are bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from align.errors import RunError
from align.faults import reach

TEMPORARY = ".tmp-"  # every unfinished file or directory begins with this; a new owner of the run removes them
_CHUNK = 1 << 20


class FileRecord(NamedTuple):
    """What a ledger remembers of a file."""

    bytes: int
    sha256: str


def free_bytes(path: Path) -> int:
    """Bytes that this user can still write where `path` is or will be."""
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    status = os.statvfs(existing)
    return status.f_bavail * status.f_frsize


def need_bytes(path: Path, count: int) -> None:
    """Refuse a write of `count` bytes that cannot fit, before it starts."""
    free = free_bytes(path)
    if count > free:
        raise RunError(
            f"{path}: needs {count:,} bytes and {free:,} are free. Free some space and start the run again; "
            "nothing committed is lost."
        )


@contextmanager
def os_errors(path: Path, count: int = 0) -> Iterator[None]:
    """Turn an OSError of the body into a RunError about `path`, which was to take `count` bytes."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, error, count) from error


def disk_error(path: Path, error: OSError, count: int = 0) -> RunError:
    """The message for a failed read or write of `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        needed = f"needs {count:,} bytes" if count else "needs more space"
        return RunError(
            f"{path}: {error.strerror}: {needed} and {free_bytes(path):,} are free. "
            "Free some space and start the run again; nothing committed is lost."
        )
    try:
        space = f"; needs {count:,} bytes, {free_bytes(path):,} are free" if count else ""
    except OSError:  # the disk that failed may not answer either
        space = ""
    return RunError(f"{path}: {error.strerror or error}{space}")


def looks_full(path: Path, error: BaseException) -> bool:
    """Whether a library's own error (safetensors, torch) says in its way that the disk is full."""
    text = str(error)
    number = getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text or free_bytes(path) < _CHUNK


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Make a file's contents durable, whoever wrote them."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_directory(path: Path) -> None:
    """Create a directory (parents too) whose name survives a crash."""
    if path.is_dir():
        return
    with os_errors(path):
        make_directory(path.parent)
        reach("durable.mkdir.before")
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


def write_file(path: Path, data: bytes, point: str) -> FileRecord:
    """Put `data` at `path`: it is there whole or not at all.  `point` prefixes the names of the fault points."""
    rank = os.environ.get("RANK", "0")
    temporary = path.with_name(f"{TEMPORARY}{rank}-{path.name}")
    need_bytes(path.parent, len(data))
    try:
        with os_errors(path, len(data)):
            _write_new(temporary, data, point)
            reach(f"{point}.before_rename")
            os.rename(temporary, path)
            reach(f"{point}.after_rename")
            sync_directory(path.parent)
            reach(f"{point}.after_sync")
    except RunError:
        temporary.unlink(missing_ok=True)
        raise
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def _write_new(path: Path, data: bytes, point: str) -> None:
    """Write and flush a file that nobody else sees yet."""
    reach(f"{point}.before_open")
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
    with os.fdopen(handle, "wb", buffering=0) as file:
        reach(f"{point}.before_write")
        view = memoryview(data)
        _write_all(file.fileno(), view[: len(data) // 2])
        reach(f"{point}.mid_write")
        _write_all(file.fileno(), view[len(data) // 2 :])
        reach(f"{point}.before_fsync")
        os.fsync(file.fileno())


def _write_all(handle: int, view: memoryview) -> None:
    """os.write takes at most 2 GiB and may take less than it was given."""
    while view:
        view = view[os.write(handle, view) :]


def hash_file(path: Path, from_disk: bool = False) -> FileRecord:
    """Size and SHA-256 of a file.  `from_disk` asks the kernel to forget its copy first, so that the disk is read."""
    digest = hashlib.sha256()
    size = 0
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(handle, "rb", buffering=0) as file:
        if from_disk and hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size, digest.hexdigest())


def mismatch(path: Path, expected: FileRecord, from_disk: bool = False) -> str | None:
    """How the file differs from its record, or None where it does not."""
    try:
        actual = hash_file(path, from_disk)
    except FileNotFoundError:
        return f"{path}: missing; expected {expected.bytes} bytes, sha256 {expected.sha256}"
    except OSError as error:
        return f"{path}: {error.strerror}; expected {expected.bytes} bytes, sha256 {expected.sha256}"
    if actual == expected:
        return None
    return (
        f"{path}: damaged: expected {expected.bytes} bytes, sha256 {expected.sha256}; "
        f"found {actual.bytes} bytes, sha256 {actual.sha256}"
    )


def remove(path: Path, point: str) -> None:
    """Delete a file or directory so that a half-deleted one is never mistaken for a whole one."""
    if not path.is_symlink() and not path.exists():
        return
    with os_errors(path):
        doomed = path
        if not path.name.startswith(TEMPORARY):
            doomed = path.with_name(f"{TEMPORARY}gone-{path.name}")
            if doomed.exists():
                remove(doomed, point)
            reach(f"{point}.before_rename")
            os.rename(path, doomed)
            sync_directory(path.parent)
        reach(f"{point}.before_delete")
        if doomed.is_dir() and not doomed.is_symlink():
            shutil.rmtree(doomed)
        else:
            doomed.unlink()


def to_json(value: Any, indent: int | None = 1) -> bytes:
    """UTF-8 JSON with sorted keys.  NumPy scalars become numbers; JSON has no NaN or infinity, so those become null."""
    return (json.dumps(_plain(value), indent=indent, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, bool) or value is None or isinstance(value, (int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item"):
        return _plain(value.item())
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def seal(body: Mapping[str, Any]) -> bytes:
    """JSON of a ledger, with a hash over the rest of it: an edited or damaged ledger is noticed."""
    return to_json({**body, "seal": _seal_of(body)})


def unseal(path: Path) -> dict[str, Any]:
    """Read a ledger written by `seal`; RunError where it is damaged.  FileNotFoundError where it is not there."""
    data = path.read_bytes()
    try:
        document = json.loads(data)
        found = document.pop("seal")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise RunError(f"{path}: damaged: not a ledger of this run ({error})") from None
    if found != (expected := _seal_of(document)):
        raise RunError(f"{path}: damaged or edited: its seal says sha256 {found}, its contents have {expected}")
    if data != seal(document):
        raise RunError(f"{path}: damaged or edited: its contents are right, its layout is not as it was written")
    return document


def _seal_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(to_json(body, indent=None)).hexdigest()


def write_document(path: Path, value: Mapping[str, Any], point: str = "store.json") -> FileRecord:
    """Put a plain JSON document at `path`, whole or not at all."""
    return write_file(path, to_json(value), point)


def read_document(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file."""
    try:
        with os_errors(path):
            data = path.read_bytes()
    except RunError:
        if not path.exists():
            return None
        raise
    try:
        value = json.loads(data)
    except ValueError as error:
        raise RunError(f"{path}: damaged: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise RunError(f"{path}: damaged: not a JSON object")
    return value
