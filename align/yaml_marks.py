"""YAML with positions, and nothing else that YAML can do.

`read_yaml` gives plain dicts, lists and scalars together with the line and column of every key, so that an error
found later still points into the file.  What makes YAML dangerous or surprising is refused or switched off:

* tags (`!!python/object`), merge keys, a second document, more than `MAX_ALIASES` aliases, an alias inside its own
  anchor, deep nesting, files over `MAX_BYTES`, encodings other than UTF-8;
* duplicate keys, which the YAML specification forbids and most parsers let through;
* the YAML 1.1 readings of plain words: here only `true`/`false` are booleans, `no`, `on` and `12:30` are text, and
  `1e-5` is a number (the core schema of YAML 1.2, https://yaml.org/spec/1.2.2/#103-core-schema).
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1 << 20
MAX_ALIASES = 100
MAX_DEPTH = 32
MAX_NODES = 100_000  # after every alias is written out
MAX_INTEGER_DIGITS = 4000  # Python refuses to read longer ones

KeyPath = tuple[str | int, ...]  # from the root to a value: keys, and places in lists

_INTEGER = re.compile(r"[-+]?[0-9]+")
_PREFIXED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufffe\uffff\ud800-\udfff]")
_WORDS: dict[str, Any] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


@dataclass(frozen=True, order=True)
class Mark:
    """A place in the file; both count from one."""

    line: int
    column: int


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and under which key; `mark` says where, if not where that key stands."""

    path: KeyPath
    message: str
    mark: Mark | None = None


@dataclass
class Document:
    """A file's value, where each key stands, what is wrong with it as YAML, and which keys have no value for that."""

    value: Any = None
    marks: dict[KeyPath, Mark] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unread: set[KeyPath] = field(default_factory=set)


class NotReadable(Exception):
    """The text is not YAML that we take; there is no value to go on with."""

    def __init__(self, mark: Mark | None, message: str) -> None:
        super().__init__(message)
        self.problem = Problem((), message, mark)


def resolve_plain(text: str) -> Any:
    """The value of an unquoted scalar by the YAML 1.2 core schema; raises ValueError for a number we cannot hold.

    Example: resolve_plain("1e-5") == 1e-05, resolve_plain("007") == 7, resolve_plain("no") == "no".
    """
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text) or _PREFIXED.fullmatch(text):
        if len(text) > MAX_INTEGER_DIGITS:
            raise ValueError(f"a whole number of {len(text)} digits is too long")
        return int(text, 0 if text[:2] in ("0o", "0x") else 10)
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"{text} is not a finite number")
    if _FLOAT.fullmatch(text):
        if not math.isfinite(float(text)):
            raise ValueError(f"{text} is too large a number")
        return float(text)
    return text


def read_text(path: Path) -> str:
    """The file as text, or NotReadable with the reason; never reads more than MAX_BYTES."""
    try:
        if not path.is_file():  # a pipe or a device would be waited for, or never end
            raise NotReadable(None, "is not a file" if path.exists() else f"no such file{_nearby(path)}")
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise NotReadable(None, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MAX_BYTES:
        raise NotReadable(None, f"is larger than {MAX_BYTES >> 20} MiB; this cannot be a recipe")
    return decode(data)


def decode(data: bytes) -> str:
    """UTF-8 text without a byte order mark; raises NotReadable naming line, column and what is wrong."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise NotReadable(Mark(1, 1), "is UTF-16; save it as UTF-8")
    if data[:4].count(b"\x00") >= 2:
        raise NotReadable(Mark(1, 1), "holds zero bytes, as UTF-16 or a binary file would; save it as UTF-8 text")
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        mark = _mark_at(data[: error.start].decode(errors="replace"))
        raise NotReadable(mark, f"byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8") from None
    bad = _FORBIDDEN.search(text)
    if bad:
        raise NotReadable(_mark_at(text[: bad.start()]), f"character U+{ord(bad[0]):04X} is not allowed; remove it")
    return text.removeprefix("\ufeff")


def read_yaml(text: str) -> Document:
    """The one mapping that the text holds.  Raises NotReadable where the text cannot be taken in at all; what is wrong
    with single keys (duplicates, tags) goes into `problems`, and reading goes on."""
    builder = _Builder()
    try:
        value = builder.build(yaml.parse(text, Loader=_LOADER))
    except yaml.MarkedYAMLError as error:
        raise NotReadable(*_syntax_error(error, text)) from None
    except yaml.YAMLError as error:
        raise NotReadable(None, f"is not YAML: {error}") from None
    builder.document.value = value
    return builder.document


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C parser reads the largest file in milliseconds


class _Builder:
    """Builds values from parser events.  Events come one by one, so limits bind before memory is spent."""

    def __init__(self) -> None:
        self.document = Document()
        self.anchors: dict[str, tuple[Any, int] | None] = {}  # None: begun, not finished
        self.aliases = 0
        self.nodes = 0

    def build(self, events: Iterator[Any]) -> Any:
        value: Any = None
        documents = 0
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise NotReadable(_mark(event), "a second document begins here; a recipe is one document")
            elif isinstance(event, yaml.NodeEvent):
                value = self._node(event, events, (), 0)
        return value

    def _node(self, event: Any, events: Iterator[Any], path: KeyPath, depth: int) -> Any:
        """The value that begins with `event`; takes the events up to its end."""
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        self._count(1, event)
        if depth > MAX_DEPTH:
            raise NotReadable(_mark(event), f"is nested deeper than {MAX_DEPTH} levels")
        before = self.nodes
        if event.anchor:
            self.anchors[event.anchor] = None
        if event.tag not in (None, "!"):
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._unread(event, path, f"tag {tag!r} is not allowed; write the plain value, in quotes where it is text")
        value: Any
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event, path)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self._sequence(events, path, depth)
        else:
            value = self._mapping(events, path, depth)
        if event.anchor:
            self.anchors[event.anchor] = (value, self.nodes - before + 1)
        return value

    def _alias(self, event: Any) -> Any:
        """The anchored value itself, not a copy: sharing is what keeps a bomb of aliases small until it is counted."""
        self.aliases += 1
        if self.aliases > MAX_ALIASES:
            raise NotReadable(_mark(event), f"more than {MAX_ALIASES} aliases")
        if event.anchor not in self.anchors:
            raise NotReadable(_mark(event), f"alias *{event.anchor} has no anchor before it; quote it if it is text")
        anchored = self.anchors[event.anchor]
        if anchored is None:
            raise NotReadable(_mark(event), f"alias *{event.anchor} stands inside its own anchor")
        self._count(anchored[1], event)
        return anchored[0]

    def _scalar(self, event: Any, path: KeyPath) -> Any:
        if "\x00" in event.value or any("\ud800" <= c <= "\udfff" for c in event.value):
            self._unread(event, path, "holds a zero character or half of a surrogate pair")
            return ""
        if not event.implicit[0]:  # quoted, or a block of text
            return event.value
        try:
            return resolve_plain(event.value)
        except ValueError as error:
            self._unread(event, path, str(error))
            return 0

    def _sequence(self, events: Iterator[Any], path: KeyPath, depth: int) -> list[Any]:
        items: list[Any] = []
        for event in events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            place = (*path, len(items))
            self.document.marks[place] = _mark(event)
            items.append(self._node(event, events, place, depth + 1))
        return items

    def _mapping(self, events: Iterator[Any], path: KeyPath, depth: int) -> dict[str, Any]:
        pairs: dict[str, Any] = {}
        for event in events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            key = self._key(event, events, path, depth)
            value_event = next(events)
            place = (*path, key)
            if key in pairs:
                first = self.document.marks[place].line
                self._problem(event, place, f"duplicate key, first given in line {first}; keep one")
                self._skipped(value_event, events, depth)
                continue
            self.document.marks[place] = _mark(event)
            value = self._node(value_event, events, place, depth + 1)
            if key == "<<" and event.implicit[0]:
                self._problem(event, place, "merge keys are not supported; write the keys out")
            else:
                pairs[key] = value
        return pairs

    def _skipped(self, event: Any, events: Iterator[Any], depth: int) -> None:
        """Reads past a value; its anchors still count, its positions and problems do not."""
        document, self.document = self.document, Document()
        self._node(event, events, (), depth + 1)
        self.document = document

    def _key(self, event: Any, events: Iterator[Any], path: KeyPath, depth: int) -> str:
        if isinstance(event, yaml.ScalarEvent):
            if event.tag not in (None, "!"):
                self._problem(event, (*path, event.value), "a tag on a key is not allowed")
            self._count(1, event)
            return event.value
        if isinstance(event, yaml.AliasEvent):
            raise NotReadable(_mark(event), "an alias cannot be a key")
        raise NotReadable(_mark(event), "a list or a block cannot be a key; quote it if it is text")

    def _count(self, nodes: int, event: Any) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            raise NotReadable(_mark(event), f"holds more than {MAX_NODES} values, aliases written out")

    def _unread(self, event: Any, path: KeyPath, message: str) -> None:
        self._problem(event, path, message)
        self.document.unread.add(path)

    def _problem(self, event: Any, path: KeyPath, message: str) -> None:
        self.document.problems.append(Problem(path, message, _mark(event)))


def _mark(event: Any) -> Mark:
    return Mark(event.start_mark.line + 1, event.start_mark.column + 1)


def _mark_at(before: str) -> Mark:
    return Mark(before.count("\n") + 1, len(before) - before.rfind("\n"))


def _syntax_error(error: yaml.MarkedYAMLError, text: str) -> tuple[Mark | None, str]:
    """Where the parser stopped, and what it says; a tab in the indentation is named as such."""
    where = error.problem_mark or error.context_mark
    if where is None:
        return None, f"is not YAML: {error.problem}"
    lines = text.split("\n")
    for number in (where.line, where.line - 1):
        line = lines[number] if 0 <= number < len(lines) else ""
        indent = line[: len(line) - len(line.lstrip(" \t"))]
        if "\t" in indent:
            return Mark(number + 1, indent.index("\t") + 1), "a tab indents this line; YAML takes spaces only"
    context = f" {error.context}" if error.context else ""
    return Mark(where.line + 1, where.column + 1), f"is not YAML: {error.problem}{context}"


def _nearby(path: Path) -> str:
    """A file of nearly the same name, for a name that was mistyped."""
    try:
        names = [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""
