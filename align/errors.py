"""The two kinds of failure that a user sees as one message and never as a traceback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class AlignError(Exception):
    """Something went wrong that the user can read, with an exit status."""

    exit_code = 1


class InputError(AlignError):
    """What the user gave is wrong: a recipe, a file, a model.  The message names it and says how to mend it."""

    exit_code = 2


class RunError(AlignError):
    """The run cannot go on: a full disk, a dead rank, weights that do not match.  Nothing committed is lost."""


class NotFiniteError(RunError):
    """A loss or a gradient that is not a number.  `report` has the step, which of the two, and every sample."""

    def __init__(self, message: str, report: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.report = report
