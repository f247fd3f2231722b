"""A plain CSV of votes as arrays: `item,group,gold,<verifier…>`, with every fault named at once.

A file whose every cell is plain is read in columns (quick.py); any other cell by cell here, with the line of each row.

A vote is 1, 0, or blank where the verifier abstained.  A column whose name ends in `~` holds real-valued scores.
Families are not read from names: a judge asked in both orders errs in opposite ways, and as two voices it does better
than as one source (recipes/LOG.md).

Legend: N items, M verifiers.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from align.ensemble.table import VerdictTable
from align.errors import InputError
from align.prompt_sources import RowErrors
from align.verifying.quick import ABSTAINED, Cell, Plain, read_plain

CHUNK_ROWS = 50_000
"""Rows held as Python text at once."""
NEEDED = ("item", "group", "gold")
SCORE_MARK = "~"
ADVICE = (
    "a vote is 1, 0, or blank where the verifier abstained; a column of scores has a name that ends in ~; for more "
    "than two classes give one row for each item and class, its vote 1 where the verifier named that class"
)
_CODES = {"0": 0, "1": 1, "": ABSTAINED}


@dataclass(frozen=True)
class Votes:
    """What a file of votes says.

    Example: Votes("v.csv", "ab…", items=pa.chunked_array([["a", "b"]]), groups=np.array([0, 0]),
    gold=np.array([1.0, nan]), values=np.array([[1.0], [nan]]), names=("judge",), kinds=("binary",),
    group_names=pa.chunked_array([["q", "q"]]))
    """

    source: str
    sha256: str  # of the file as it lies there
    items: pa.ChunkedArray  # [N] text, each once
    group_names: pa.ChunkedArray  # [N] text, blank where the file names none
    groups: np.ndarray  # [N] int32; an item whose group is blank is a group of its own
    gold: np.ndarray  # [N] float32: 1, 0, NaN where not known
    values: np.ndarray  # [N, M] float64, NaN where abstained
    names: tuple[str, ...]  # [M] without the mark of a score
    kinds: tuple[str, ...]  # [M] "binary" or "score"

    def table(self) -> VerdictTable:
        """The votes as the ensemble takes them; nothing of `gold` goes in."""
        return VerdictTable(self.values, self.names, self.kinds, ("",) * len(self.names), self.groups)


def read_votes(path: Path) -> Votes:
    """The whole file; InputError names every fault with its line and column, twenty in full and the rest counted."""
    if path.is_dir():
        raise InputError(f"{path} is a directory; give a CSV file, which may be gzipped")
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            packed = file.read(2) == b"\x1f\x8b"
        return _read(path, packed, digest)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _read(path: Path, packed: bool, digest: str) -> Votes:
    errors = RowErrors()
    with _opened(path, packed) as file:
        header = _Reader(path, file, errors).header()
        errors.check()
        columns = _Columns(path, header, errors)
        errors.check()
        plain = read_plain(file, columns.cells(), header.index("item"))
    if plain is not None and columns.take_plain(plain):
        return columns.votes(digest)
    columns = _Columns(path, header, errors)
    with _opened(path, packed) as file:
        reader = _Reader(path, file, errors)
        reader.header()
        for lines, rows in reader.chunks(len(header)):
            columns.take(lines, rows)
    if not errors.count and not columns.lines:
        errors.add(f"{path}: the header stands alone; give at least one row")
    columns.check_items()
    errors.check(ADVICE)
    return columns.votes(digest)


def _opened(path: Path, packed: bool) -> IO[bytes]:
    return gzip.open(path, "rb") if packed else open(path, "rb")  # type: ignore[return-value]


class _Reader:
    """Records of a CSV file with the lines they begin on."""

    def __init__(self, path: Path, file: IO[bytes], errors: RowErrors) -> None:
        self._path, self._file, self._errors = path, file, errors
        self._reader = csv.reader(self._text(), strict=True)
        self._begun = 1  # a quoted field may hold line ends, so a record is not always a line

    def _text(self) -> Iterator[str]:
        """Lines as text; a byte-order mark in front is passed over."""
        for number, raw in enumerate(self._file, 1):
            if number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                self._errors.add(f"{self._path}:1: the file is UTF-16; save it as UTF-8")
                return
            coding = "utf-8-sig" if number == 1 else "utf-8"
            try:
                yield raw.decode(coding)
            except UnicodeDecodeError as error:
                self._errors.add(f"{self._path}:{number}: byte {error.start + 1} is not UTF-8; save the file as UTF-8")
                yield raw.decode(coding, "replace")

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """Records that are not blank; whatever breaks the file off is noted and ends them."""
        try:
            for record in self._reader:
                line, self._begun = self._begun, self._reader.line_num + 1
                if record:
                    yield line, record
        except csv.Error as error:
            self._errors.add(f"{self._path}:{self._begun}: not valid CSV: {error}")
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            self._errors.add(f"{self._path}: the compressed file is cut short or damaged ({error})")

    def header(self) -> list[str]:
        """The names in the first record, blanks around them taken off."""
        _, record = next(self._records(), (1, []))
        if not record and not self._errors.count:
            self._errors.add(f"{self._path}: is empty; its first line must name the columns {', '.join(NEEDED)}, …")
        if len(record) == 1 and (mark := next((m for m in (";", "\t", "|") if m in record[0]), None)):
            self._errors.add(f"{self._path}:1: the columns are separated by {mark!r}; separate them by commas")
        return [name.strip() for name in record]

    def chunks(self, width: int) -> Iterator[tuple[list[int], list[list[str]]]]:
        """(lines, records) of at most `CHUNK_ROWS` each; a record of another width is noted and left out."""
        lines: list[int] = []
        rows: list[list[str]] = []
        for line, record in self._records():
            if len(record) != width:
                self._errors.add(
                    f"{self._path}:{line}: has {len(record)} fields, the header names {width}; "
                    "quote a text that holds a comma, and keep the commas of blank votes"
                )
                continue
            lines.append(line)
            rows.append(record)
            if len(rows) == CHUNK_ROWS:
                yield lines, rows
                lines, rows = [], []
        if rows:
            yield lines, rows


@dataclass
class _Columns:
    """The columns so far, small: text as Arrow arrays, votes as one byte each."""

    path: Path
    header: list[str]
    errors: RowErrors
    lines: list[np.ndarray] = field(default_factory=list)
    text: dict[str, list[pa.Array]] = field(default_factory=lambda: {"item": [], "group": []})
    gold: list[np.ndarray] = field(default_factory=list)
    votes_of: dict[int, list[np.ndarray]] = field(default_factory=dict)  # by column of the file

    def __post_init__(self) -> None:
        where = f"{self.path}:1"
        for name in NEEDED:
            if name not in self.header:
                others = {other.lower(): other for other in self.header if other not in NEEDED}
                close = get_close_matches(name, others, n=1)
                hint = f"did you mean it by {others[close[0]]!r}?" if close else "add it (gold may be blank)"
                self.errors.add(f"{where}: no column {name!r}; {hint}")
        for name, count in Counter(self.header).items():
            if count > 1:
                self.errors.add(f"{where}: {count} columns are named {name!r}; give each a name of its own")
        blank = [k for k, name in enumerate(self.header, 1) if not name.removesuffix(SCORE_MARK)]
        if blank:
            self.errors.add(f"{where}: column {blank[0]} has no name; name it, or remove it")
        self.votes_of = {k: [] for k, name in enumerate(self.header) if name not in NEEDED}
        if not self.votes_of:
            self.errors.add(f"{where}: no verifier; add a column for each behind {', '.join(NEEDED)}")

    def cells(self) -> list[Cell]:
        """What each column of the file holds."""
        kinds: list[Cell] = []
        for k, name in enumerate(self.header):
            score = k in self.votes_of and name.endswith(SCORE_MARK)
            kinds.append("text" if name in self.text else "score" if score else "vote")
        return kinds

    def take_plain(self, plain: Plain) -> bool:
        """All rows at once; False where no verifier says anything."""
        self.text = {name: plain.text[self.header.index(name)].chunks for name in self.text}
        self.gold = [plain.numbers[self.header.index("gold")]]
        self.votes_of = {k: [plain.numbers[k]] for k in self.votes_of}
        return self._heard()

    def take(self, lines: list[int], rows: list[list[str]]) -> None:
        """One chunk of records, all of the header's width."""
        columns = list(zip(*rows, strict=True))
        self.lines.append(np.array(lines, dtype=np.int32))
        for name, parts in self.text.items():
            column = columns[self.header.index(name)]
            parts.append(pa.array(column, type=pa.large_string()))
            if name == "item" and "" in column:
                for line, cell in zip(lines, column, strict=True):
                    if not cell:
                        self.errors.add(f"{self.path}:{line}: item: is blank; every row needs a name of its own")
        gold = self._parse(_vote, "gold", columns[self.header.index("gold")], lines)
        self.gold.append(gold.astype(np.int8))
        for k, parts in self.votes_of.items():
            name = self.header[k]
            score = name.endswith(SCORE_MARK)
            found = self._parse(_score if score else _vote, name, columns[k], lines)
            parts.append(found if score else found.astype(np.int8))

    def _parse(self, read: Callable[[str], float], name: str, column: Sequence[str], lines: list[int]) -> np.ndarray:
        """The column as numbers; the quick way where every cell is plain, else cell by cell with the faults noted."""
        try:
            if read is _vote:
                return np.fromiter(map(_CODES.__getitem__, column), dtype=np.int8, count=len(column))
            values = np.fromiter((float(c) if c else math.nan for c in column), dtype=float, count=len(column))
            blank = np.fromiter((not c for c in column), dtype=bool, count=len(column))
            if np.isfinite(values).sum() + blank.sum() == len(column) and "_" not in "".join(column):
                return values
        except (KeyError, ValueError):
            pass
        found = np.full(len(column), ABSTAINED if read is _vote else math.nan)
        for row, cell in enumerate(column):
            try:
                found[row] = read(cell.strip())
            except ValueError as error:
                self.errors.add(f"{self.path}:{lines[row]}: {name}: {error}")
        return found

    def check_items(self) -> None:
        """Items that occur twice, with both lines, and a file in which nobody says anything."""
        if not self.lines:
            return
        codes = pa.chunked_array(self.text["item"]).dictionary_encode()
        index = np.concatenate([chunk.indices.to_numpy() for chunk in codes.chunks])
        if len(index) and len(codes.chunk(0).dictionary) < len(index):
            lines = np.concatenate(self.lines)
            _, first, inverse = np.unique(index, return_index=True, return_inverse=True)
            items = pa.chunked_array(self.text["item"])
            for row in np.flatnonzero(first[inverse] != np.arange(len(index))):
                name = items[int(row)].as_py()
                if name:  # a blank one is a fault of its own
                    self.errors.add(
                        f"{self.path}:{lines[row]}: item: {_shown(name)} stands on line {lines[first[inverse[row]]]} "
                        "already; give each row a name of its own"
                    )
        if not self._heard() and not self.errors.count:
            self.errors.add(f"{self.path}: every vote is blank; at least one verifier must say something")

    def _heard(self) -> bool:
        return any(
            (part != ABSTAINED).any() if part.dtype == np.int8 else (~np.isnan(part)).any()
            for parts in self.votes_of.values()
            for part in parts
        )

    def votes(self, digest: str) -> Votes:
        """The arrays, put together column by column so that little is held twice."""
        names = [self.header[k] for k in self.votes_of]
        gold = np.concatenate(self.gold)
        values = np.empty((len(gold), len(names)), order="F")
        for j, k in enumerate(list(self.votes_of)):
            np.concatenate(self.votes_of.pop(k), out=values[:, j])
            if not names[j].endswith(SCORE_MARK):
                column = values[:, j]
                column[column == ABSTAINED] = math.nan
        group_names = pa.chunked_array(self.text["group"])
        return Votes(
            source=str(self.path),
            sha256=digest,
            items=pa.chunked_array(self.text["item"]),
            group_names=group_names,
            groups=group_codes(group_names),
            gold=np.where(gold == ABSTAINED, np.float32(math.nan), gold.astype(np.float32)),
            values=values,
            names=plain_names(names),
            kinds=tuple("score" if name.endswith(SCORE_MARK) else "binary" for name in names),
        )


def group_codes(names: pa.ChunkedArray) -> np.ndarray:
    """[N] int32: a number for each name; every blank one a number of its own.

    Example: ["q", "", "q", ""] gives [0, 2, 0, 3]: "q" is 0, the blank would be 1
    """
    encoded = names.dictionary_encode()
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks]).astype(np.int32)
    blank = pc.equal(names, "").to_numpy()
    codes[blank] = len(encoded.chunk(0).dictionary) + np.arange(int(blank.sum()), dtype=np.int32)
    return codes


def plain_names(header: Sequence[str]) -> tuple[str, ...]:
    """The names without the mark of a score, which stays where a vote has the plain name.

    Example: plain_names(("length", "length~", "rm~")) == ("length", "length~", "rm")
    """
    return tuple(n if n.removesuffix(SCORE_MARK) in header else n.removesuffix(SCORE_MARK) for n in header)


def _vote(cell: str) -> float:
    """A vote; 1.0 and 0.0 are what a table with blanks makes of 1 and 0."""
    if cell in _CODES:
        return _CODES[cell]
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if value not in (0.0, 1.0) or "_" in cell:
        raise ValueError(f"{_shown(cell)} is not 1 or 0")
    return value


def _score(cell: str) -> float:
    """A score, NaN where blank."""
    if not cell:
        return math.nan
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or "_" in cell:
        raise ValueError(f"{_shown(cell)} is not a finite number; leave it blank where there is none")
    return value


def _shown(text: str) -> str:
    """A cell for a message: at most forty characters of it."""
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
