"""The quick way through a file of votes: read in columns, as long as every cell is plain.

Whatever is not plain (a vote spelled `+1`, a stray quote, a row that is cut short, an item that occurs twice) is left
to the reader of votes.py, which takes what can be taken and names what cannot with its line.  So the two never differ
in what they make of a file.

Legend: N items.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

ABSTAINED = -1
YES, NO = ["1", "1.0"], ["0", "0.0"]
"""What a vote is spelled like; a table with blanks makes 1.0 of 1."""
_TYPES = {"text": pa.large_string(), "vote": pa.bool_(), "score": pa.float64()}
_QUOTE, _RETURN, _LINE_END, _COMMA = b'"\r\n,'
Cell = Literal["text", "vote", "score"]


class _NotPlainError(Exception):
    """The file has to be read with care."""


@dataclass(frozen=True)
class Plain:
    """The rows of a file whose every cell is plain.

    Example: Plain({0: pa.chunked_array([["a", "b"]])}, {2: np.array([1, -1], dtype=np.int8)})
    """

    text: dict[int, pa.ChunkedArray]  # by column of the file: [N] text
    numbers: dict[int, np.ndarray]  # [N] int8 votes, -1 where blank; or [N] float64 scores, NaN where blank


def read_plain(file: IO[bytes], cells: Sequence[Cell], names: int) -> Plain | None:
    """The rows that follow in `file`, which stands behind its header; None where they have to be read with care.

    `cells` says what each column holds; those of column `names` must be there and differ.
    """
    keys = [str(k) for k in range(len(cells))]
    try:
        table = csv.read_csv(
            pa.PythonFile(_Checked(file), mode="r"),
            read_options=csv.ReadOptions(column_names=keys),
            parse_options=csv.ParseOptions(newlines_in_values=True),
            convert_options=csv.ConvertOptions(
                column_types={key: _TYPES[cell] for key, cell in zip(keys, cells, strict=True)},
                null_values=[""], true_values=YES, false_values=NO,
            ),
        )  # fmt: skip
    except (pa.ArrowException, _NotPlainError, OSError, EOFError, zlib.error):
        return None  # the careful reader meets the same and says where
    if not len(table) or _blank_or_twice(table.column(names)):
        return None
    text = {k: table.column(k) for k, cell in enumerate(cells) if cell == "text"}
    numbers = {}
    for k, cell in enumerate(cells):
        if cell == "vote":
            numbers[k] = pc.fill_null(pc.cast(table.column(k), pa.int8()), ABSTAINED).to_numpy()
        elif cell == "score":
            if not pc.all(pc.is_finite(table.column(k))).as_py() and table.column(k).null_count < len(table):
                return None
            numbers[k] = table.column(k).to_numpy()
    return Plain(text, numbers)


def _blank_or_twice(items: pa.ChunkedArray) -> bool:
    return bool(pc.min(pc.binary_length(items)).as_py() == 0 or pc.count_distinct(items).as_py() < len(items))


class _Checked(io.RawIOBase):
    """A file that refuses quotes and line ends about which two readers of CSV might differ.

    A quote opens a field at its very start and closes it at its very end, else it is doubled; a carriage return stands
    before a line end.  Quotes open and close in turn, so the first, third, … must come behind a comma, a line end or
    the quote that it doubles, and the others before one; none is left open.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._seen = b"\n"  # the last byte or two, whose neighbours were not there yet
        self._quotes = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """The next bytes; _NotPlainError where they are not to be trusted."""
        data = self._file.read(size)
        text = self._seen + (data or b"\n")
        if b'"' in text or b"\r" in text:
            self._check(np.frombuffer(text, dtype=np.uint8))
        if not data and self._quotes % 2:
            raise _NotPlainError
        self._seen = text[-2:]
        return data

    def _check(self, text: np.ndarray) -> None:
        returns = np.flatnonzero(text[1:-1] == _RETURN) + 1
        if (text[returns + 1] != _LINE_END).any():
            raise _NotPlainError
        quotes = np.flatnonzero(text[1:-1] == _QUOTE) + 1
        opens = (self._quotes + np.arange(len(quotes))) % 2 == 0
        self._quotes += len(quotes)
        before, behind = text[quotes[opens] - 1], text[quotes[~opens] + 1]
        if not (np.isin(before, [_COMMA, _LINE_END, _QUOTE]).all()
                and np.isin(behind, [_COMMA, _LINE_END, _RETURN, _QUOTE]).all()):  # fmt: skip
            raise _NotPlainError
