"""The two kinds of failure that a user sees as one message and never as a traceback."""

from __future__ import annotations


class AlignError(Exception):
    """Something went wrong that the user can read, with an exit status."""

    exit_code = 1


class InputError(AlignError):
    """What the user gave is wrong: a recipe, a file, a model.  The message names it and says how to mend it."""

    exit_code = 2


class RunError(AlignError):
    """The run cannot go on: a full disk, a dead rank, weights that do not match.  Nothing committed is lost."""
