"""Rows from files and from the hub, each with the place it came from, so that a bad one can be named.

Nothing is guessed or skipped: a damaged file, a row of another shape or a repeated key is an InputError that says
where.  The only lines passed over are blank ones at JSONL and CSV line ends.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from align.errors import InputError

SHOWN_ERRORS = 20
"""Row errors printed in full; the rest are counted."""

ENDINGS = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")


class Row(NamedTuple):
    """One row and its place.  Example: Row("prompts.jsonl:12", {"prompt": "1+2=", "answer": "3"})"""

    where: str  # file and line (JSONL, CSV) or row counted from 1 (Parquet, hub)
    values: Mapping[str, Any]


class RowErrors:
    """Collects what is wrong with rows, so that all of it is told at once."""

    def __init__(self) -> None:
        self._messages: list[str] = []
        self.count = 0

    def add(self, message: str) -> None:
        """One more; only the first twenty keep their text."""
        self.count += 1
        if self.count <= SHOWN_ERRORS:
            self._messages.append(message)

    def check(self, advice: str = "") -> None:
        """Raise everything collected, if anything was."""
        if not self.count:
            return
        more = [f"… and {self.count - SHOWN_ERRORS} more rows"] if self.count > SHOWN_ERRORS else []
        raise InputError("\n".join([*self._messages, *more, *([advice] if advice else [])]))


def read_rows(
    source: str, *, columns: tuple[str, ...], key: str, limit: int | None = None, revision: str | None = None
) -> list[Row]:
    """All rows of a file or a hub dataset, at most `limit`.

    `columns` are those the caller will read; `key` is the recipe key that named the source, for messages.
    """
    if source.startswith("hub:"):
        rows = list(islice(_hub_rows(source, columns, key, revision), limit))
    else:
        rows = list(islice(_file_rows(existing_file(source, key), columns, key), limit))
    if not rows:
        raise InputError(f"{key}: {source} holds no rows; a prompt source needs at least one for each split")
    return rows


def iterate_rows(source: str, *, key: str) -> Iterator[Row]:
    """The rows of a file one after the other, with all their columns; a file without rows gives none."""
    yield from _file_rows(existing_file(source, key), (), key)


def text_of(row: Row, column: str, errors: RowErrors, *, integers: bool = False) -> str | None:
    """The text in a column, or None after the row's error was noted.

    With `integers` a whole number counts as its decimal text: reference answers often come that way.
    """
    if column not in row.values:
        errors.add(f"{row.where}: {_missing_column(column, list(row.values))}")
        return None
    value = row.values[column]
    if integers and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    problem = text_problem(value)
    if problem:
        errors.add(f"{row.where}: {column}: {problem}")
        return None
    return str(value)


def text_problem(value: object) -> str | None:
    """What keeps a value from being a usable text, in words."""
    if not isinstance(value, str):
        return f"expected text, found {_shown(value)}"
    if not value.strip():
        return "is empty"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"holds half of a surrogate pair at character {error.start + 1}, which is not valid Unicode"
    return None


def _shown(value: object) -> str:
    """A value as JSON shows it, cut to forty characters."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    shown = json.dumps(value, ensure_ascii=True, default=lambda v: type(v).__name__)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


def _missing_column(column: str, present: list[str]) -> str:
    close = get_close_matches(column, present, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(map(repr, present)) or 'none'}"
    return f"no column {column!r}; {hint}"


def existing_file(source: str, key: str) -> Path:
    """The path of a file that can be read as rows; InputError says why another cannot."""
    path = Path(source).expanduser()
    if path.is_dir():
        raise InputError(f"{key}: {source} is a directory; name a file that ends in {', '.join(ENDINGS)}")
    if not path.name.endswith(ENDINGS):
        raise InputError(f"{key}: {source}: cannot tell the format; name a file that ends in {', '.join(ENDINGS)}")
    if not path.exists():
        raise InputError(f"{key}: {source}: no such file (looked in {path.absolute().parent})")
    if path.stat().st_size == 0:
        raise InputError(f"{key}: {source} is empty")
    return path


def _file_rows(path: Path, columns: tuple[str, ...], key: str) -> Iterator[Row]:
    """Rows of one file by its ending, with every way a file can be damaged turned into one message."""
    try:
        if path.name.endswith(".parquet"):
            yield from _parquet_rows(path, columns, key)
            return
        opened: Any = gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb")
        with opened as file:
            if ".csv" in path.suffixes[-2:]:
                yield from _csv_rows(path, file, columns, key)
            else:
                yield from _jsonl_rows(path, file, key)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{key}: {path}: the compressed file is cut short or damaged ({error})") from None
    except OSError as error:
        raise InputError(f"{key}: {path}: cannot be read: {error.strerror or error}") from None


def _decoded(path: Path, file: IO[bytes] | Iterable[bytes], key: str) -> Iterator[tuple[int, str]]:
    """Numbered lines as text; a byte-order mark in front is allowed."""
    for number, raw in enumerate(file, 1):
        try:
            yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{key}: {path}:{number}: byte {error.start + 1} is not UTF-8; save the file as UTF-8"
            ) from None


def _jsonl_rows(path: Path, file: IO[bytes], key: str) -> Iterator[Row]:
    for number, line in _decoded(path, file, key):
        if not line.strip():
            continue
        try:
            values = json.loads(line, object_pairs_hook=_no_repeats)
        except json.JSONDecodeError as error:
            raise InputError(f"{key}: {path}:{number}:{error.colno}: not valid JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{key}: {path}:{number}: not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise InputError(f"{key}: {path}:{number}: expected a JSON object, found {_shown(values)}")
        yield Row(f"{path}:{number}", values)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r} stands there twice")
        found[name] = value
    return found


def _csv_rows(path: Path, file: IO[bytes], columns: tuple[str, ...], key: str) -> Iterator[Row]:
    reader = csv.reader((line for _, line in _decoded(path, file, key)), strict=True)
    header: list[str] | None = None
    begun = 1  # line on which the record starts; a quoted field may hold line ends
    try:
        for record in reader:
            where, begun = f"{path}:{begun}", reader.line_num + 1
            if not record:
                continue
            if header is None:
                header = record
                repeated = sorted({name for name in header if header.count(name) > 1})
                if repeated:
                    raise InputError(f"{key}: {where}: the header names {repeated[0]!r} twice")
                _need_columns(path, columns, header, key)
                continue
            if len(record) != len(header):
                raise InputError(f"{key}: {where}: has {len(record)} fields, the header names {len(header)}")
            yield Row(where, dict(zip(header, record, strict=True)))
    except csv.Error as error:
        raise InputError(f"{key}: {path}:{begun}: not valid CSV: {error}") from None


def _parquet_rows(path: Path, columns: tuple[str, ...], key: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _need_columns(path, columns, file.schema_arrow.names, key)
            number = 0
            for batch in file.iter_batches(columns=list(columns) or None):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}:{number}", values)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{key}: {path}: the Parquet file is cut short or damaged ({error})") from None


def _need_columns(path: Path, columns: tuple[str, ...], present: list[str], key: str) -> None:
    for column in columns:
        if column not in present:
            raise InputError(f"{key}: {path}: {_missing_column(column, present)}")


def _hub_rows(source: str, columns: tuple[str, ...], key: str, revision: str | None) -> Iterator[Row]:
    """Rows through `datasets.load_dataset`, which runs no code from the dataset's repository."""
    import datasets

    name, config, split = parse_hub(source)
    try:
        dataset = datasets.load_dataset(name, config, split=split, revision=revision)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{key}: {source}: the dataset could not be loaded: {reason}") from None
    _need_columns(Path(source), columns, dataset.column_names, key)
    for number, values in enumerate(dataset.select_columns(list(columns)), 1):
        yield Row(f"{source}:{number}", values)


def parse_hub(source: str) -> tuple[str, str | None, str]:
    """Dataset, configuration and split of `hub:<dataset>[/<config>][:<split>]`; the split is `train` by default.

    Example: parse_hub("hub:openai/gsm8k/main:test") == ("openai/gsm8k", "main", "test")
    """
    name, _, split = source.removeprefix("hub:").partition(":")
    if not name:
        raise InputError(f"prompts.source: {source!r} names no dataset; write hub:<dataset>[/<config>][:<split>]")
    parts = name.split("/")
    if len(parts) == 3 and all(parts) and not Path(name).exists():
        return f"{parts[0]}/{parts[1]}", parts[2], split or "train"
    return name, None, split or "train"
