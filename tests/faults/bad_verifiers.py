"""A verifier process whose verifiers do what the response tells them to: hang, crash, eat memory, lie.

Started by test_verifier_host.py in place of `python -m align.verifiers.child`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from align.errors import RunError
from align.verifiers.base import Abstain, Item, PerItem, Verifier
from align.verifiers.child import serve


def _hang() -> float:
    while True:
        pass


def _recurse() -> float:
    return _recurse()


def _raise(error: BaseException) -> float:
    raise error


def _sleep(seconds: float) -> float:
    time.sleep(seconds)
    return 0.5


def _crash() -> float:
    os.kill(os.getpid(), signal.SIGSEGV)
    return 0.0


def _print() -> float:
    print("\x1b[31mnoise" * 10_000)
    os.write(1, b"\xff\xff\xff\xff" * 1000)
    sys.stderr.write("more noise")
    return 0.5


ACTIONS: dict[str, Callable[[], Any]] = {
    "hang": _hang,
    "exit": lambda: os._exit(3),
    "crash": _crash,
    "hog": lambda: float(len(bytearray(8 * 2**30))),
    "recurse": _recurse,
    "raise": lambda: _raise(ValueError("bad \x1b[31m\nvalue " + "x" * 500)),
    "system exit": lambda: _raise(SystemExit(0)),
    "run error": lambda: _raise(RunError("not for a verifier to say")),
    "abstain": lambda: _raise(Abstain("cannot say")),
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "text": lambda: "1.0",
    "none": lambda: None,
    "half": lambda: 0.5,
    "true": lambda: True,
    "nap": lambda: _sleep(0.2),
    "oversleep": lambda: _sleep(0.9),
    "print": _print,
    "torch": lambda: float("torch" in sys.modules),
    "pid": lambda: float(os.getpid()),
    "token": lambda: float("HF_TOKEN" in os.environ),
}


class Obedient(PerItem):
    """Does what the response says, else gives the response's length."""

    kind = "score"

    def value(self, item: Item) -> float:
        """Whatever comes of it."""
        return ACTIONS.get(item.response, lambda: float(len(item.response)))()


class Voter(Obedient):
    """The same, but it promises 0 or 1."""

    kind = "binary"


class Together(Obedient):
    """The same, on whole prompts: one bad response is the whole prompt's."""

    kind = "score"
    whole_prompts = True


class Short(Verifier):
    """Forgets the last response."""

    kind = "score"
    whole_prompts = True

    def verify(self, batch: Sequence[Item]) -> list[float | Abstain]:
        """One too few."""
        return [1.0] * (len(batch) - 1)


KINDS: dict[str, type[Verifier]] = {"obedient": Obedient, "voter": Voter, "together": Together, "short": Short}

if __name__ == "__main__":
    serve(lambda block: KINDS[block["kind"]](block["name"]))
