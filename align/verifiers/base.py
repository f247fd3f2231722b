"""What a verifier is: a name, a kind and one method from responses to numbers.

A verifier never guesses.  Where it has nothing to say it abstains with the reason; where it breaks, whoever called it
turns the error into none with a reason (`judge`).  Neither is ever the number 0.
"""

from __future__ import annotations

import math
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self

from align.records import content_id

REASON_LENGTH = 200  # characters


@dataclass(frozen=True, slots=True)
class Item:
    """One response with what a verifier may know of it.

    Example: Item("9c…", "3f…", "123+456=", "579", answer="579", response_tokens=4, finish_reason="stop")
    """

    sample_id: str
    prompt_id: str
    prompt: str
    response: str
    answer: str | None  # the prompt's reference answer
    response_tokens: int
    finish_reason: str  # "stop" or "length"
    columns: tuple[tuple[str, str], ...] = ()  # (name, text) of the prompt's columns that verifiers asked for
    turns: tuple[tuple[str, str], ...] = ()  # (role, text) that a chat template made `prompt` of; empty without one

    @property
    def question(self) -> str:
        """The prompt as it was asked, without the marks of the policy's chat template; several turns by their roles."""
        if len(self.turns) < 2:
            return self.turns[0][1] if self.turns else self.prompt
        return "\n\n".join(f"{role}: {text}" for role, text in self.turns)

    def conversation(self) -> list[tuple[str, str]]:
        """(role, text) of every turn, the response last, for a model with a chat template of its own."""
        return [*(self.turns or (("user", self.prompt),)), ("assistant", self.response)]

    def column(self, name: str) -> str:
        """The prompt's text in a column; abstains where it has none."""
        for key, text in self.columns:
            if key == name and text.strip():
                return text
        raise Abstain(f"the prompt has no text in column {name}")


class Abstain(Exception):
    """A verifier has nothing to say of an item; the message is the reason.  Raised, or returned in a batch."""


class Outcome(NamedTuple):
    """A verifier's word on one item: the number, or None and the reason."""

    value: float | None
    reason: str | None
    seconds: float = 0.0


class Verifier(ABC):
    """One way to judge responses.

    Example of a user's own:

        class Polite(PerItem):
            kind = "binary"

            def value(self, item: Item) -> float:
                return float("please" in item.response)
    """

    kind: ClassVar[Literal["binary", "score"]]
    """binary: 0.0 or 1.0.  score: any finite number, larger is better."""
    whole_prompts: ClassVar[bool] = False
    """Whether a verdict depends on the prompt's other responses; then no batch ever divides a prompt."""

    def __init__(self, name: str) -> None:
        self.name = name

    @classmethod
    def from_spec(cls, spec: Any) -> Self:
        """The verifier that a block of the recipe describes (a class of `align.verifiers.spec`); reads its files."""
        return cls(spec.name)

    @abstractmethod
    def verify(self, batch: Sequence[Item]) -> list[float | Abstain]:
        """One number or `Abstain` per item, in order.  The batch holds all responses of each of its prompts."""


class ModelVerifier(Verifier):
    """A verifier that holds an engine or connections until it is closed."""

    @abstractmethod
    def close(self) -> None:
        """Free what it holds."""

    def account(self) -> dict[str, float]:
        """What it has cost so far and what was odd, as counts by name; empty where nothing is counted."""
        return {}


class PerItem(Verifier):
    """A verifier that looks at one response at a time."""

    @abstractmethod
    def value(self, item: Item) -> float:
        """The verdict; raises `Abstain` with the reason where there is none."""

    def verify(self, batch: Sequence[Item]) -> list[float | Abstain]:
        """`value` of each item."""
        verdicts: list[float | Abstain] = []
        for item in batch:
            try:
                verdicts.append(self.value(item))
            except Abstain as abstain:
                verdicts.append(abstain)
        return verdicts


def ask(verifier: Verifier, batch: Sequence[Item]) -> list[float | str]:
    """A number per item, or the reason why there is none; the verifier's own errors pass through."""
    verdicts = verifier.verify(batch)
    if len(verdicts) != len(batch):
        return [f"returned {len(verdicts)} verdicts for {len(batch)} responses"] * len(batch)
    return [_checked(v, verifier.kind) for v in verdicts]


def judge(verifier: Verifier, batch: Sequence[Item]) -> list[float | str]:
    """As `ask`, but the verifier's errors end here, as the reason of every item of the batch."""
    try:
        return ask(verifier, batch)
    except Abstain as abstain:
        return [clean(str(abstain)) or "abstained"] * len(batch)
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        return [describe_error(error)] * len(batch)


def _checked(verdict: object, kind: str) -> float | str:
    """The verdict as a float that keeps the kind's promise, or the reason why it is none."""
    if type(verdict) is float and (verdict == 0.0 or verdict == 1.0):
        return verdict  # the common case
    if isinstance(verdict, Abstain):
        return clean(str(verdict)) or "abstained"
    if isinstance(verdict, str) or not hasattr(verdict, "__float__"):
        return f"returned {type(verdict).__name__}, not a number"
    value = float(verdict)
    if not math.isfinite(value):
        return f"returned {value}"
    if kind == "binary" and value not in (0.0, 1.0):
        return f"returned {value:g}, not 0 or 1"
    return value


def describe_error(error: BaseException) -> str:
    """Example: "raised ValueError: no such key"."""
    try:
        message = str(error)
    except Exception:  # an exception whose own text cannot be had still has a type
        message = ""
    return clean(f"raised {type(error).__name__}{': ' if message else ''}{message}")


def clean(text: str) -> str:
    """One printable line of at most `REASON_LENGTH` characters: reasons reach terminals and reports.

    White space becomes single blanks; control, format and lone surrogate characters become "?".
    """
    head = " ".join(text[: 4 * REASON_LENGTH].split())
    safe = "".join("?" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn") else c for c in head)
    return safe if len(safe) <= REASON_LENGTH else safe[: REASON_LENGTH - 1] + "…"


def unit_hash(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts only: a coin that falls the same way in every process."""
    return int(content_id(*parts), 16) / 2.0**64
