"""Word lists from files: read once per process, never cut, and refused with the line where they are wrong.

Four shapes are told apart by what the file holds, gzipped or not:

    word<TAB>value            VADER, AFINN; further columns are ignored
    XML with <word form polarity>   pattern; the senses of a word are averaged
    one word per line         Hu and Liu, Dale-Chall; lines that start with `;` or `#` are comments
    word, then anything       cmudict (only where a dictionary is asked for); `word(2)` is `word`
"""

from __future__ import annotations

import gzip
import math
import re
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from align.errors import InputError
from align.verifiers.text import words

LARGEST_FILE = 256 * 2**20  # bytes after unpacking
_VARIANT = re.compile(r"\(\d+\)$")  # cmudict's second and further pronunciations
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0e-\x1f]")


class Valences(NamedTuple):
    """Value per word, and how many entries of the file no single word can match (phrases, smileys).

    Example: Valences({"good": 1.9, "bad": -2.5}, entries=4, unmatched=2)
    """

    values: dict[str, float]
    entries: int
    unmatched: int


class Vocabulary(NamedTuple):
    """The words of a dictionary, and how many of its entries are not single words."""

    words: frozenset[str]
    entries: int
    unmatched: int


def read_valences(path: str) -> Valences:
    """Words with values; a plain list of words gives each the value 1."""
    return _valences(str(Path(path).expanduser()), _stamp(path))


def read_vocabulary(path: str) -> Vocabulary:
    """The first field of every line."""
    return _vocabulary(str(Path(path).expanduser()), _stamp(path))


@lru_cache(maxsize=32)
def _valences(path: str, _stamp: tuple[int, int]) -> Valences:
    text = _read(path)
    if text.lstrip().startswith("<"):
        rows = list(_xml_rows(path, text))
    elif "\t" in text:
        rows = list(_table_rows(path, text))
    else:
        rows = [(word, 1.0) for word in _plain_lines(text)]
    sums: dict[str, tuple[float, int]] = {}
    unmatched = 0
    for entry, value in rows:
        word = _single_word(entry)
        if word is None:
            unmatched += 1
        else:
            total, count = sums.get(word, (0.0, 0))
            sums[word] = (total + value, count + 1)
    if not sums:
        raise InputError(f"{path}: none of its {len(rows)} entries is a single word")
    return Valences({word: total / count for word, (total, count) in sums.items()}, len(rows), unmatched)


@lru_cache(maxsize=32)
def _vocabulary(path: str, _stamp: tuple[int, int]) -> Vocabulary:
    entries = [line.split()[0] for line in _plain_lines(_read(path))]
    found = [_single_word(_VARIANT.sub("", entry)) for entry in entries]
    known = frozenset(word for word in found if word is not None)
    if not known:
        raise InputError(f"{path}: none of its {len(entries)} entries is a single word")
    return Vocabulary(known, len(entries), found.count(None))


def _single_word(entry: str) -> str | None:
    """The entry as `words` would find it in a text, or None where it would not find it whole."""
    bare = entry.strip().removesuffix(".")  # an abbreviation's point is no part of the word in a text either
    split = words(bare)
    return split[0] if len(split) == 1 and len(split[0]) == len(bare) else None


def _plain_lines(text: str) -> Iterator[str]:
    for line in text.splitlines():
        stripped = line.strip()
        if stripped and stripped[0] not in ";#":
            yield stripped


def _table_rows(path: str, text: str) -> Iterator[tuple[str, float]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        entry, tab, rest = line.partition("\t")
        try:
            value = float(rest.partition("\t")[0])
        except ValueError:
            value = math.nan
        if not tab or not math.isfinite(value):
            raise InputError(f"{path}:{number}: wants `word<TAB>number`, found {line[:60]!r}")
        yield entry, value


def _xml_rows(path: str, text: str) -> Iterator[tuple[str, float]]:
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise InputError(f"{path}: an XML list may not declare entities or a document type; take the declaration out")
    try:
        root = ElementTree.fromstring(text.encode())
    except ElementTree.ParseError as error:
        raise InputError(f"{path}: not well-formed XML: {error}") from None
    for number, element in enumerate(root.iter("word"), start=1):
        form, polarity = element.get("form"), element.get("polarity")
        try:
            value = float(polarity if polarity is not None else "")
        except ValueError:
            value = math.nan
        if form is None or not math.isfinite(value):
            raise InputError(f"{path}: <word> number {number} wants `form` and a number as `polarity`")
        yield form, value


def _stamp(path: str) -> tuple[int, int]:
    """Changes when the file does, so that a file that was mended is read again."""
    try:
        status = Path(path).expanduser().stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    return status.st_mtime_ns, status.st_size


def _read(path: str) -> str:
    """The file as text; UTF-8, or Windows-1252 (of which Latin-1 text is a part) where it is not UTF-8."""
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST_FILE + 1)
        if data[:2] == b"\x1f\x8b":
            with gzip.open(path, "rb") as unpacked:
                data = unpacked.read(LARGEST_FILE + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: damaged or cut-off gzip file: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(data) > LARGEST_FILE:
        raise InputError(f"{path}: more than {LARGEST_FILE // 2**20} MiB, which is no word list")
    if not data.strip():
        raise InputError(f"{path}: is empty")
    try:
        text = _decode(data)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is neither UTF-8 nor Windows-1252; save it as UTF-8") from None
    control = _FORBIDDEN.search(text)
    if control is not None:
        line = text.count("\n", 0, control.start()) + 1
        raise InputError(f"{path}:{line}: holds the control character {control.group()!r}; it is no text in UTF-8")
    return text


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252")
