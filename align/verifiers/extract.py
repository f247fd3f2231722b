"""Which part of a response is its answer.

Every way takes the last candidate, because a response that reasons ends with its answer.  All run in time linear in
the text, so a response that never ends costs no more than reading it.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator

# A run of digits with commas between; decided in `_number_in` whether the commas group thousands.  A minus is a sign
# only where nothing that could be subtracted from stands before it: "5-79" ends in 79, "= -79" in -79.
_RUN = re.compile(r"(?P<sign>(?<![\w).\]}])[-−+])?(?P<digits>\d+(?:,\d+)*(?:\.\d+)?|(?<![\w.])\.\d+)")
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def extract_answer(text: str, how: str, pattern: str | None = None) -> str | None:
    """The answer in `text`, or None where it holds none.

    last_number  the last number, in plain form: "so $1,234." gives "1234"
    boxed        what stands in the last closed `\\boxed{…}`, nested braces kept
    whole        all of it, without white space at the ends
    pattern      the first group of the last match of `pattern`
    """
    if how == "last_number":
        return last_number(text)
    if how == "boxed":
        return last_boxed(text)
    if how == "whole":
        return text.strip() or None
    if how == "pattern" and pattern is not None:
        return _last_match(text, pattern)
    raise ValueError(f"no way to extract an answer: {how!r}")


def last_number(text: str) -> str | None:
    """The last number in plain form: ASCII digits, no thousands separators, no plus sign, a digit before the point.

    Digits of any script count ("٣" is 3); an exponent or a fraction bar is no part of a number: "1/2" gives "2".
    Examples: "1,234.50" -> "1234.50"; "-.5" -> "-0.5"; "1,2,3" -> "3"; "7 ate 9." -> "9"
    """
    size = 256
    while True:  # from the end, twice as far each time: a long response is rarely read whole
        tail = text[-size:]
        last = _last(_RUN.finditer(tail))
        if size >= len(text):
            return None if last is None else _number_in(last)
        if last is not None and last.start() > 0 and tail[last.start() - 1] not in ",.":
            return _number_in(last)  # the cut is not inside it
        size *= 2


def _number_in(match: re.Match[str]) -> str:
    sign, digits = match["sign"], match["digits"]
    if "," in digits and _THOUSANDS.fullmatch(digits) is None:
        sign, digits = None, digits.rpartition(",")[2]  # a list such as "1,2,3": its last number
    plain = digits.replace(",", "")
    if not plain.isascii():
        plain = "".join(c if c == "." else str(int(c)) for c in plain)
    if plain.startswith("."):
        plain = "0" + plain
    return "-" + plain if sign in ("-", "−") else plain


def last_boxed(text: str) -> str | None:
    r"""What stands in the `\boxed{…}` that starts last among those that are closed; None for an empty one.

    Example: r"\boxed{1} so \boxed{\frac{1}{2}} and \boxed{3" -> r"\frac{1}{2}"
    """
    opened: list[int | None] = []  # where the inside starts, for boxes; None for other braces
    best: tuple[int, int] | None = None
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            start = opened.pop() if opened else None
            if start is not None and (best is None or start > best[0]):
                best = (start, match.start())
        elif token == "{":
            opened.append(None)
        elif token.startswith("\\boxed"):
            opened.append(match.end())
    return None if best is None else text[best[0] : best[1]].strip() or None


def _last_match(text: str, pattern: str) -> str | None:
    last = _last(re.compile(pattern, re.DOTALL).finditer(text))
    if last is None or last.group(1) is None:
        return None
    return last.group(1).strip() or None


def _last(matches: Iterator[re.Match[str]]) -> re.Match[str] | None:
    return next(iter(deque(matches, maxlen=1)), None)
