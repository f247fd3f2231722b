"""The checks behind `kind: instructions`: each a small function of a text and its settings.

A check is an object with its name under `check`; counts take `minimum`, `maximum` or both.  Definitions follow IFEval
(2311.07911) where it has the check; words and sentences are counted by `align.verifiers.text`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from align.verifiers.text import count_sentences

_WORD = re.compile(r"\w+")
_PARAGRAPH = re.compile(r"\n[^\S\n]*\n\s*")
_BULLET = re.compile(r"^[^\S\n]*(?:[-+•]|\*(?!\*))[^\S\n]+\S", re.MULTILINE)
_NUMBERED = re.compile(r"^[^\S\n]*\d{1,3}[.)][^\S\n]+\S", re.MULTILINE)
_HIGHLIGHT = re.compile(r"\*\*[^*\n]+\*\*|\*[^*\n]+\*")
_PLACEHOLDER = re.compile(r"\[[^\[\]\n]+\]")
_TITLE = re.compile(r"<<[^<>\n]+>>")
_HEADING = re.compile(r"^#{1,6}[^\S\n]+\S", re.MULTILINE)
_FENCE = re.compile(r"\A```(?:json)?[^\S\n]*\n(.*)\n[^\S\n]*```\Z", re.DOTALL | re.IGNORECASE)

Settings = Mapping[str, Any]


class Check(NamedTuple):
    """A check's function of (text, settings, prompt) and the settings it must have and may have, with their types."""

    holds: Callable[[str, Settings, str], bool]
    needs: Mapping[str, type | tuple[type, ...]]
    takes: Mapping[str, type | tuple[type, ...]]


def passes(check: Settings, text: str, prompt: str = "") -> bool:
    """Whether the text follows one check, which `check_fault` has found sound."""
    return CHECKS[check["check"]].holds(text, check, prompt)


def check_fault(check: object) -> str | None:
    """What is wrong with a check, in words; None where it can be used."""
    if not isinstance(check, dict) or not isinstance(check.get("check"), str):
        return "a check is an object with its name under `check`"
    name = check["check"]
    if name not in CHECKS:
        return f"there is no check {name[:40]!r}; there are {', '.join(CHECKS)}"
    known = {**CHECKS[name].needs, **CHECKS[name].takes}
    for key, value in check.items():
        if key == "check":
            continue
        if key not in known:
            return f"{name} has no setting {str(key)[:40]!r}; it has {', '.join(known) or 'none'}"
        if not isinstance(value, known[key]) or (isinstance(value, bool) and known[key] is int):
            return f"{name}.{key}: is not of the right type"
        if isinstance(value, int) and not isinstance(value, bool) and value < 0:
            return f"{name}.{key}: is below 0"
        if isinstance(value, list) and not (value and all(isinstance(v, str) and v.strip() for v in value)):
            return f"{name}.{key}: wants a list of texts"
        if isinstance(value, str) and not value.strip():
            return f"{name}.{key}: is empty"
    missing = [key for key in CHECKS[name].needs if key not in check]
    if missing:
        return f"{name} needs {missing[0]}"
    if CHECKS[name].takes.keys() >= {"minimum", "maximum"} and not {"minimum", "maximum"} & check.keys():
        return f"{name} needs minimum, maximum or both"
    return None


def _within(count: int, settings: Settings) -> bool:
    return settings.get("minimum", 0) <= count <= settings.get("maximum", count)


def _counted(
    count: Callable[[str, Settings], int], needs: Mapping[str, type | tuple[type, ...]] | None = None
) -> Check:
    """A check that a number lies within bounds."""
    return Check(lambda text, s, _: _within(count(text, s), s), needs or {}, {"minimum": int, "maximum": int})


def _plain(holds: Callable[[str], bool]) -> Check:
    """A check without settings."""
    return Check(lambda text, _, __: holds(text), {}, {})


def _occurrences(text: str, keyword: str) -> int:
    """Whole words, whatever the case: "cat" is not in "concatenate"."""
    return len(re.findall(rf"(?<!\w){re.escape(keyword)}(?!\w)", text, re.IGNORECASE))


def paragraphs(text: str) -> list[str]:
    """Stretches between empty lines that hold anything but rules (`***`, `---`)."""
    return [part for part in _PARAGRAPH.split(text.strip()) if part.strip(" *-_\n\t")]


def is_json(text: str) -> bool:
    """Whether all of it is one JSON object or list, with or without a code fence around it; NaN is no JSON."""
    fenced = _FENCE.match(text.strip())
    try:
        found = json.loads(fenced[1] if fenced else text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict | list)


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _letters(text: str) -> str:
    return "".join(c for c in text if c.isalpha())


def _capital_words(text: str) -> int:
    """Words of two letters or more in capitals only."""
    return sum(len(word) > 1 and word.isupper() for word in _WORD.findall(text))


def _begins(text: str, settings: Settings, _: str) -> bool:
    return text.strip().casefold().startswith(settings["text"].strip().casefold())


def _ends(text: str, settings: Settings, _: str) -> bool:
    return text.strip().strip("\"'").casefold().endswith(settings["text"].strip().casefold())


def _repeats_prompt(text: str, _: Settings, prompt: str) -> bool:
    """The prompt's words come first, as they are."""
    return bool(prompt.strip()) and text.strip().casefold().startswith(prompt.strip().casefold())


def _paragraph_begins(text: str, settings: Settings, _: str) -> bool:
    """Paragraph `number` (from 1) begins with `text`."""
    found, number = paragraphs(text), settings["number"]
    return 1 <= number <= len(found) and _begins(found[number - 1], settings, "")


CHECKS: dict[str, Check] = {
    "words": _counted(lambda text, _: len(_WORD.findall(text))),
    "sentences": _counted(lambda text, _: count_sentences(text)),
    "paragraphs": _counted(lambda text, _: len(paragraphs(text))),
    "lines": _counted(lambda text, _: sum(bool(line.strip()) for line in text.splitlines())),
    "characters": _counted(lambda text, _: len(text.strip())),
    "bullets": _counted(lambda text, _: len(_BULLET.findall(text))),
    "numbered": _counted(lambda text, _: len(_NUMBERED.findall(text))),
    "headings": _counted(lambda text, _: len(_HEADING.findall(text))),
    "highlights": _counted(lambda text, _: len(_HIGHLIGHT.findall(text))),
    "placeholders": _counted(lambda text, _: len(_PLACEHOLDER.findall(text))),
    "capital_words": _counted(lambda text, _: _capital_words(text)),
    "keyword": _counted(lambda text, s: _occurrences(text, s["word"]), {"word": str}),
    "letter": _counted(lambda text, s: text.casefold().count(s["letter"].casefold()), {"letter": str}),
    "includes": Check(lambda text, s, _: all(_occurrences(text, word) for word in s["words"]), {"words": list}, {}),
    "excludes": Check(lambda text, s, _: not any(_occurrences(text, word) for word in s["words"]), {"words": list}, {}),
    "begins_with": Check(_begins, {"text": str}, {}),
    "ends_with": Check(_ends, {"text": str}, {}),
    "paragraph_begins": Check(_paragraph_begins, {"number": int, "text": str}, {}),
    "repeats_prompt": Check(_repeats_prompt, {}, {}),
    "uppercase": _plain(lambda text: bool(_letters(text)) and text == text.upper()),
    "lowercase": _plain(lambda text: bool(_letters(text)) and text == text.lower()),
    "json": _plain(is_json),
    "title": _plain(lambda text: _TITLE.search(text) is not None),
    "quoted": _plain(lambda text: len(text.strip()) > 1 and text.strip()[0] == '"' == text.strip()[-1]),
    "no_commas": _plain(lambda text: not re.search("[,\u060c\u3001\uff0c]", text)),
    "two_answers": _plain(lambda text: _two_different(text)),
}
"""Every check by its name."""


def _two_different(text: str) -> bool:
    """Two different answers with six asterisks between them."""
    parts = [part.strip() for part in text.split("******")]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]
