"""What is wrong with a recipe's values, in plain words and under the user's own keys.

Two passes over the plain data, neither of which knows about files: `settle_keys` finds unknown keys and guesses what
was meant, `check_values` lets pydantic validate and says what it found.  A guessed key is put in the place of the
mistyped one, so that one typing error is reported once and the checks behind it still run.
"""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from align.recipe import Recipe
from align.yaml_marks import KeyPath, Problem, resolve_plain

_BOUNDS = {
    "greater_than": ("gt", "must be more than"),
    "greater_than_equal": ("ge", "must be at least"),
    "less_than": ("lt", "must be less than"),
    "less_than_equal": ("le", "must be at most"),
}
_NAME_PATTERN = "^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
_PLAIN_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a block of keys"}


def alternatives(annotation: Any) -> list[Any]:
    """The members of a union, without the wrappers: `Annotated[A | B, …] | None` gives [A, B, NoneType]."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return alternatives(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [a for member in get_args(annotation) for a in alternatives(member)]
    return [annotation]


def block_for(annotation: Any, value: Any) -> type[BaseModel] | None:
    """The block class that `value` is to fill; of several, the one whose `kind` it names."""
    blocks = [a for a in alternatives(annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
    if len(blocks) <= 1:
        return blocks[0] if blocks else None
    kind = value.get("kind") if isinstance(value, dict) else None
    return next((b for b in blocks if kind in get_args(b.model_fields["kind"].annotation)), None)


def child_annotation(annotation: Any, value: Any, part: str | int) -> Any:
    """What stands under one more key (or list place) by the schema; None where the schema knows nothing of it."""
    if isinstance(part, int):
        for choice in alternatives(annotation):
            if get_origin(choice) is tuple:
                args = get_args(choice)
                if args[-1] is Ellipsis:
                    return args[0]
                return args[part] if part < len(args) else None
        return None
    block = block_for(annotation, value)
    return block.model_fields[part].annotation if block and part in block.model_fields else None


def default_of(data: Any, path: KeyPath) -> Any:
    """The schema's default under `path`; PydanticUndefined where there is no such key, or it has none."""
    annotation: Any = Recipe
    value = data
    for part in path[:-1]:
        annotation = child_annotation(annotation, value, part)
        value = get_in(value, (part,))
    block = block_for(annotation, value)
    name = path[-1]
    if block is None or not isinstance(name, str) or name not in block.model_fields:
        return PydanticUndefined
    return block.model_fields[name].get_default()


def get_in(data: Any, path: Iterable[str | int]) -> Any:
    """The value under `path`, or None."""
    for part in path:
        if isinstance(data, dict) and isinstance(part, str):
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            return None
    return data


def suggest(word: str, options: Iterable[str]) -> str | None:
    """The option that `word` is most likely a slip for."""
    options = list(options)
    plain = word.strip().lower().replace("-", "_").replace(" ", "_")
    if plain in options:
        return plain
    close = difflib.get_close_matches(plain, options, n=1, cutoff=0.6)
    return close[0] if close else None


# --- unknown keys -------------------------------------------------------------------------------------------------


def settle_keys(data: Any) -> tuple[list[Problem], dict[KeyPath, KeyPath]]:
    """Problems for every unknown key; in `data` each is renamed to the key that was meant, or removed.

    Also returns, for each renamed key, {path in data now: path as the user wrote it}."""
    problems: list[Problem] = []
    renamed: dict[KeyPath, KeyPath] = {}

    def walk(annotation: Any, value: Any, path: KeyPath) -> None:
        block = block_for(annotation, value)
        if block is not None and isinstance(value, dict):
            for key in [k for k in value if k not in block.model_fields]:
                guess = suggest(key, block.model_fields)
                problems.append(Problem((*path, key), _unknown(key, guess, block, path)))
                content = value.pop(key)
                if guess is not None and guess not in value:
                    value[guess] = content
                    renamed[(*path, guess)] = (*path, key)
        for part, below in _children(value):
            walk(child_annotation(annotation, value, part), below, (*path, part))

    walk(Recipe, data, ())
    return problems, renamed


def _children(value: Any) -> Iterator[tuple[str | int, Any]]:
    if isinstance(value, dict):
        yield from list(value.items())
    elif isinstance(value, list):
        yield from enumerate(value)


def _unknown(key: str, guess: str | None, block: type[BaseModel], path: KeyPath) -> str:
    elsewhere = [dotted for dotted in _all_keys() if dotted == key or dotted.endswith(f".{key}")]
    if elsewhere and (guess is None or difflib.SequenceMatcher(None, key, guess).ratio() < 0.8):
        return f"unknown key, did you mean {' or '.join(elsewhere[:3])}?"
    if guess is not None:
        return f"unknown key, did you mean {guess}?"
    return f"unknown key; the keys here are {', '.join(block.model_fields)}"


def _all_keys() -> list[str]:
    """Every dotted key outside lists and unions, e.g. `training.loss.beta`."""
    found: list[str] = []

    def walk(block: type[BaseModel], prefix: str) -> None:
        for name, info in block.model_fields.items():
            found.append(prefix + name)
            inner = block_for(info.annotation, None)
            if inner is not None:
                walk(inner, f"{prefix}{name}.")

    walk(Recipe, "")
    return found


# --- values -------------------------------------------------------------------------------------------------------


def check_values(data: Any) -> tuple[Recipe | None, list[Problem]]:
    """The recipe, or what stands in its way.

    Validation is strict (a quoted "3" is not a number, `true` is not 1) and goes through JSON, where pydantic takes
    a list for a tuple and a whole number for a float even so."""
    found = _boolean_choices(Recipe, data, ())
    try:
        recipe = Recipe.model_validate_json(json.dumps(data), strict=True)
        return (None if found else recipe), found
    except ValidationError as error:
        found += [p for details in error.errors(include_url=False) for p in _explain(details, data)]
    first: dict[KeyPath, Problem] = {}  # a union reports once per member; the first says it
    for problem in found:
        first.setdefault(problem.path if problem.path else (problem.message,), problem)
    return None, list(first.values())


def _boolean_choices(annotation: Any, value: Any, path: KeyPath) -> list[Problem]:
    """`true` where one of some numbers is wanted: to pydantic it equals 1, even when it is strict."""
    if isinstance(value, bool) and any(get_origin(a) is Literal for a in alternatives(annotation)):
        return [_wrong_choice(path, value, annotation)]
    return [
        problem
        for part, below in _children(value)
        for problem in _boolean_choices(child_annotation(annotation, value, part), below, (*path, part))
    ]


def _explain(details: ErrorDetails, data: Any) -> list[Problem]:
    path, annotation, block = _place(details["loc"], data)
    value = get_in(data, path)
    kind, context = details["type"], details.get("ctx", {})
    if kind == "missing":
        text = block.model_fields[str(path[-1])].description if block else None
        return [Problem(path, "is missing" + (f"; {_first_sentence(text)}" if text else ""))]
    if kind == "value_error":
        return _from_validator(str(context["error"]), path, annotation, value)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return [_wrong_kind(path, value, annotation)]
    if kind in _BOUNDS:
        name, phrase = _BOUNDS[kind]
        bound = context[name]
        return [Problem(path, f"{phrase} {int(bound) if bound == int(bound) else bound}, not {_show(value)}")]
    if kind == "literal_error":
        return [_wrong_choice(path, value, annotation)]
    if kind == "string_pattern_mismatch" and context["pattern"] == _NAME_PATTERN:
        rule = "1 to 64 letters, digits, `_`, `.` and `-`, the first a letter or digit"
        return [Problem(path, f"{_show(value)} is not a name; a name has {rule}")]
    if kind == "too_short":  # also reported for a list whose entries are all wrong; those speak for themselves
        return [] if value else [Problem(path, f"is empty; it needs at least {context['min_length']} entry")]
    if kind == "extra_forbidden":
        return [Problem(path, "unknown key")]
    if kind.endswith(("_type", "_parsing", "_from_float")):
        return [Problem(path, _wrong_type(value, annotation))]
    return [Problem(path, details["msg"][:1].lower() + details["msg"][1:])]


def _place(loc: tuple[int | str, ...], data: Any) -> tuple[KeyPath, Any, type[BaseModel] | None]:
    """The user's path for pydantic's location, with the schema's type there and the block that holds the last key.

    A location also names the members of unions it went through (`format` in verifiers.2.format.pattern, or `str`);
    those are no keys and are left out."""
    path: KeyPath = ()
    annotation: Any = Recipe
    value = data
    block: type[BaseModel] | None = Recipe
    for part in loc:
        here = block_for(annotation, value)
        child = child_annotation(annotation, value, part)
        entered_union = len([a for a in alternatives(annotation) if isinstance(a, type)]) > 1
        if here is not None and entered_union and isinstance(value, dict) and part == value.get("kind"):
            annotation = here  # the tag: from here on the union is this one class
        elif child is not None:
            path, annotation, value, block = (*path, part), child, get_in(value, (part,)), here
    return path, annotation, block


def _from_validator(message: str, path: KeyPath, annotation: Any, value: Any) -> list[Problem]:
    """A validator's lines, each put under the key that it begins with (`offload: …`, `cold_start.source: …`)."""
    problems = []
    for line in message.split("\n"):
        begins = re.match(r"`?([A-Za-z_][\w.]*)`?: (.*)", line, re.DOTALL)
        below = tuple(int(p) if p.isdigit() else p for p in begins[1].split(".")) if begins else ()
        known: Any = annotation
        inner = value
        for part in below:
            known, inner = child_annotation(known, inner, part), get_in(inner, (part,))
        if begins and known is not None:
            problems.append(Problem((*path, *below), begins[2]))
        else:
            problems.append(Problem(path, line))
    return problems


def _wrong_kind(path: KeyPath, value: Any, annotation: Any) -> Problem:
    kinds = [
        k
        for a in alternatives(annotation)
        if a is not types.NoneType
        for k in get_args(a.model_fields["kind"].annotation)
    ]
    listing = f"the kinds are {', '.join(kinds)}"
    given = value.get("kind") if isinstance(value, dict) else None
    if given is None:
        return Problem((*path, "kind"), f"is missing; {listing}")
    guess = suggest(given, kinds) if isinstance(given, str) else None
    return Problem((*path, "kind"), f"{_show(given)} is not a kind{_did_you_mean(guess)}; {listing}")


def _wrong_choice(path: KeyPath, value: Any, annotation: Any) -> Problem:
    choices = [c for a in alternatives(annotation) if get_origin(a) is Literal for c in get_args(a)]
    guess = suggest(value, [c for c in choices if isinstance(c, str)]) if isinstance(value, str) else None
    listing = ", ".join(str(c) for c in choices)
    expected = f"one of {listing}" if len(choices) > 1 else f"{listing}, the only choice"
    return Problem(path, f"expects {expected}, not {_show(value)}{_did_you_mean(guess)}")


def _wrong_type(value: Any, annotation: Any) -> str:
    choices = alternatives(annotation)
    message = f"expects {describe(annotation)}, not {_show(value)}"
    if value is None and any(isinstance(c, type) and issubclass(c, BaseModel) for c in choices):
        return f"{message}; remove the key, or write the block's keys below it"
    if isinstance(value, float) and int in choices and value == int(value):
        return f"{message}; write {int(value)}"
    if isinstance(value, (int, float)) and str in choices:
        return f"{message}; put it in quotes"
    if isinstance(value, str) and (int in choices or float in choices) and _is_number(value):
        return f"{message}; remove the quotes"
    return message


def describe(annotation: Any) -> str:
    """What the schema expects, in words: `a whole number or null`."""
    return " or ".join(dict.fromkeys(_describe_one(choice) for choice in alternatives(annotation)))


def _describe_one(choice: Any) -> str:
    if choice is types.NoneType:
        return "null"
    if get_origin(choice) is Literal:
        return "one of " + ", ".join(str(c) for c in get_args(choice))
    if get_origin(choice) is tuple:
        args = [a for a in get_args(choice) if a is not Ellipsis]
        return f"a list, each entry {describe(args[0])}" if len(args) == 1 else f"a list of {len(args)} entries"
    if isinstance(choice, type) and issubclass(choice, BaseModel):
        return "a block of keys"
    return _PLAIN_TYPES.get(get_origin(choice) or choice, "a value")


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "a block of keys"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return repr(value) if len(value) <= 60 else repr(value[:57]) + "…"
    return json.dumps(value)[:60]


def _is_number(text: str) -> bool:
    try:
        return isinstance(resolve_plain(text.strip()), (int, float))
    except ValueError:
        return False


def _did_you_mean(guess: str | None) -> str:
    return f", did you mean {guess}?" if guess else ""


def _first_sentence(text: str) -> str:
    """A field's documentation up to its first full stop, small at the front, on one line."""
    sentence = " ".join(text.split()).split(". ")[0].rstrip(".")
    return sentence if sentence[:2].isupper() else sentence[:1].lower() + sentence[1:]
