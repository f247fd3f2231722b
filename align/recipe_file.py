"""Reads a recipe: a YAML file and overrides in, a checked `Recipe` or every error at once out.

The order is: file -> overrides from the command line -> unknown keys -> `${dotted.key}` references -> values.
Nothing heavy is imported, so that a mistake is shown at once and before any model is touched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import PydanticUndefined

from align.errors import InputError
from align.recipe import Recipe
from align.recipe_errors import check_values, default_of, get_in, settle_keys, suggest
from align.yaml_marks import Document, KeyPath, NotReadable, Problem, read_text, read_yaml, resolve_plain

MAX_REFERENCE_DEPTH = 20
MAX_TEXT = 1 << 16  # characters of a text after its references are filled in

_REFERENCE = re.compile(r"\$\$\{|\$\{([^}]*)\}")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the file, with `key=value` overrides put in.

    Raises InputError with one line per error, in the order of the file: `path:line:column: key: what is wrong`."""
    source = _Source(str(path))
    try:
        document = read_yaml(read_text(Path(path)))
    except NotReadable as unreadable:
        raise InputError(source.line(unreadable.problem)) from None
    source.document = document
    if not isinstance(document.value, dict):
        what = "is empty" if document.value is None else "is not a mapping of keys to values"
        raise InputError(f"{path}: {what}; a recipe begins with `name: …`")
    data = _unshared(document.value)
    problems = list(document.problems)
    for text in overrides:
        problems += _override(data, text, source)
    unknown, renamed = settle_keys(data)
    source.renamed = renamed
    problems += unknown
    problems += _References(data).fill()
    recipe, wrong = check_values(data)
    problems += [p for p in wrong if p.path not in document.unread]
    if recipe is None or problems:
        raise InputError(source.report(problems))
    return recipe


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of the recipe, for editors and for other programs."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe, defaults written out, as YAML that `load_recipe` reads back to an equal recipe."""
    data = _escaped(recipe.model_dump(mode="json"))
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def diff_recipes(old: Recipe, new: Recipe) -> list[str]:
    """What differs, one line per key: `training.learning_rate: 1e-06 -> 1e-05`."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    keys = [*before, *(k for k in after if k not in before)]
    absent = "(not there)"
    return [
        f"{key}: {before.get(key, absent)} -> {after.get(key, absent)}"
        for key in keys
        if before.get(key, absent) != after.get(key, absent)
    ]


class _Source:
    """Where each value came from, for messages."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.document = Document()
        self.overridden: set[KeyPath] = set()
        self.renamed: dict[KeyPath, KeyPath] = {}

    def place(self, problem: Problem) -> tuple[int, int, int]:
        """(0 for the file or 1 for the command line, line, column); a key that is not there has its block's place."""
        if problem.mark is not None:
            return 0, problem.mark.line, problem.mark.column
        for length in range(len(problem.path), -1, -1):
            path = problem.path[:length]
            path = self.renamed.get(path, path)
            if path in self.overridden:
                return 1, 0, 0
            if path in self.document.marks:
                mark = self.document.marks[path]
                return 0, mark.line, mark.column
        return 0, 1, 1

    def line(self, problem: Problem) -> str:
        key = f"{_dotted(problem.path)}: " if problem.path else ""
        if not problem.path and problem.mark is None and not self.document.marks:
            return f"{self.file}: {problem.message}"  # the file as a whole
        on_command_line, line, column = self.place(problem)
        where = "command line" if on_command_line else f"{self.file}:{line}:{column}"
        return f"{where}: {key}{problem.message}"

    def report(self, problems: list[Problem]) -> str:
        ordered = sorted(problems, key=lambda p: (self.place(p), _dotted(p.path)))
        return "\n".join(dict.fromkeys(self.line(p) for p in ordered))


def _dotted(path: KeyPath) -> str:
    def one(part: str | int) -> str:
        text = str(part)
        return text if re.fullmatch(r"[\w.-]{1,60}", text, re.ASCII) else json.dumps(text[:60])

    return ".".join(one(part) for part in path)


def _unshared(value: Any) -> Any:
    """A copy in which an anchor and its aliases are separate values, so that an override changes one of them."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_unshared(inner) for inner in value]
    return value


# --- overrides ----------------------------------------------------------------------------------------------------


def _override(data: dict[str, Any], text: str, source: _Source) -> list[Problem]:
    """Puts one `dotted.key=value` into the data; blocks that are not there yet are made."""
    key, equals, written = text.partition("=")
    if not equals or not key.strip("."):
        return [_on_command_line((text,), "expects key=value, such as training.learning_rate=1e-5", source)]
    try:
        value = _override_value(written)
    except NotReadable as unreadable:
        return [_on_command_line((key,), unreadable.problem.message, source)]
    except ValueError as error:
        return [_on_command_line((key,), str(error), source)]
    node: Any = data
    path: KeyPath = ()
    parts = key.strip().split(".")
    while parts:
        part: str | int | None = parts[0]
        if isinstance(node, list):
            part, parts = _list_place(node, parts)
        else:
            parts = parts[1:]
        if part is None:
            return [_on_command_line((*path, parts[0]), _no_entry(node, parts[0]), source)]
        path = (*path, part)
        if not parts:
            node[part] = value
            source.overridden.add(path)
            for below in [p for p in source.document.marks if p[: len(path)] == path]:
                del source.document.marks[below]
        elif isinstance(get_in(node, (part,)), (dict, list)):
            node = node[part]
        elif get_in(node, (part,)) is None:
            node[part] = {}
            node = node[part]
            source.overridden.add(path)
        else:
            return [_on_command_line((*path, *parts), f"{_dotted(path)} is a value; it has no keys below it", source)]
    return []


def _override_value(text: str) -> Any:
    """`[1, 2]`, `{r: 8}` and quoted text are YAML; anything else is one plain value and needs no quoting."""
    if text[:1] not in ("[", "{", "'", '"'):
        return resolve_plain(text.strip())
    document = read_yaml(text)
    if document.problems:
        raise ValueError(document.problems[0].message)
    return _unshared(document.value)


def _list_place(entries: list[Any], parts: list[str]) -> tuple[int | None, list[str]]:
    """Which entry the front of `parts` names, by place or by its `name` (which may hold dots), and the rest."""
    if parts[0].isdecimal() and int(parts[0]) < len(entries):
        return int(parts[0]), parts[1:]
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        for place, entry in enumerate(entries):
            if isinstance(entry, dict) and entry.get("name") == name:
                return place, parts[length:]
    return None, parts


def _no_entry(entries: list[Any], name: str) -> str:
    names = [e["name"] for e in entries if isinstance(e, dict) and isinstance(e.get("name"), str)]
    guess = suggest(name, names)
    hint = f", did you mean {guess}?" if guess else f"; its names are {', '.join(names)}" if names else ""
    return f"no entry {name!r} among {len(entries)}, counted from 0{hint}"


def _on_command_line(path: KeyPath, message: str, source: _Source) -> Problem:
    source.overridden.add(path)
    return Problem(path, message)


# --- references ---------------------------------------------------------------------------------------------------


class _Unfilled(Exception):
    """A reference that leads to no value."""


class _References:
    """Fills `${dotted.key}` in every text with that key's value, default included; `$${` stands for a plain `${`.

    A text that is one reference and nothing else takes the value with its type."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.problems: list[Problem] = []

    def fill(self) -> list[Problem]:
        filled = self._walk(self.data, ())
        self.data.clear()
        self.data.update(filled)
        return self.problems

    def _walk(self, value: Any, path: KeyPath) -> Any:
        if isinstance(value, dict):
            return {key: self._walk(inner, (*path, key)) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._walk(inner, (*path, place)) for place, inner in enumerate(value)]
        if not isinstance(value, str):
            return value
        try:
            return self._text(value, (path,))
        except _Unfilled as unfilled:
            self.problems.append(Problem(path, str(unfilled)))
            return value

    def _text(self, text: str, trail: tuple[KeyPath, ...]) -> Any:
        """`trail` is the chain of keys that are being filled, this text's own last."""
        whole = _REFERENCE.fullmatch(text)
        if whole and whole[1] is not None:
            return self._value(whole[1], trail)

        def one(match: re.Match[str]) -> str:
            if match[1] is None:
                return "${"
            value = self._value(match[1], trail)
            return value if isinstance(value, str) else json.dumps(value)

        filled = _REFERENCE.sub(one, text)
        if len(filled) > MAX_TEXT and filled != text:
            raise _Unfilled(f"is longer than {MAX_TEXT} characters once its references are filled in")
        return filled

    def _value(self, key: str, trail: tuple[KeyPath, ...]) -> Any:
        path = self._path(key)
        if path in trail:
            chain = " -> ".join(_dotted(p) for p in (*trail[trail.index(path) :], path))
            raise _Unfilled(f"refers to itself: {chain}")
        if len(trail) > MAX_REFERENCE_DEPTH:
            raise _Unfilled(f"refers through more than {MAX_REFERENCE_DEPTH} other keys")
        value = get_in(self.data, path)
        if value is None:
            value = default_of(self.data, path)
        if value is PydanticUndefined:
            guess = suggest(key, _keys_of(self.data))
            hint = f", did you mean ${{{guess}}}?" if guess else "; only keys of this recipe can be named"
            raise _Unfilled(f"${{{key[:60]}}} is no key with a value{hint}")
        if value is None:
            raise _Unfilled(f"${{{key}}} is null")
        if not isinstance(value, (str, int, float)):
            raise _Unfilled(f"${{{key}}} is a block or a list, not a single value")
        return self._text(value, (*trail, path)) if isinstance(value, str) else value

    def _path(self, key: str) -> KeyPath:
        parts = key.strip().split(".")
        node: Any = self.data
        path: KeyPath = ()
        while parts:
            part: str | int | None = None
            if isinstance(node, list):
                part, parts = _list_place(node, parts)
            if part is None:
                part = parts.pop(0)
            path = (*path, part)
            node = get_in(node, (part,))
        return path


def _keys_of(data: Any) -> list[str]:
    return list(_flat(data))


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """{dotted key: value as JSON}, empty blocks and lists included as values."""
    if isinstance(value, dict) and value:
        parts = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list) and value:
        parts = [(str(place), inner) for place, inner in enumerate(value)]
    else:
        return {prefix: json.dumps(value, ensure_ascii=False)}
    return {k: v for key, inner in parts for k, v in _flat(inner, f"{prefix}.{key}" if prefix else key).items()}


def _escaped(value: Any) -> Any:
    """The data with every `${` in a text written so that it is read back as it is."""
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    return value.replace("${", "$${") if isinstance(value, str) else value


class _Dumper(yaml.SafeDumper):
    """Quotes every text that our reading of YAML would take for something else, such as '1e-5', or that holds
    characters which YAML takes for line ends."""

    def ignore_aliases(self, data: Any) -> bool:
        """Never writes an anchor: two equal blocks are two blocks."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        plain = isinstance(resolve_plain(text), str) and text.replace("\n", "").isprintable()
    except ValueError:
        plain = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _represent_text)
