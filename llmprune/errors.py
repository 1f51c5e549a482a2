"""Errors a user can act on: what is wrong, and what to do about it."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its `repr` where that is empty."""
    return (str(error).strip().splitlines() or [repr(error)])[0]


class PruneError(Exception):
    """A run cannot go on; `exit_code` is what the process returns.

    Args:
        message: what is wrong, with the two things that disagree.
        hint: what the user can do about it.
    """

    exit_code = 1
    silent = False
    """Whether another process has printed the error already."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InputError(PruneError):
    """What the user asked for cannot be done; found before anything was written."""

    exit_code = 2


class NumericalError(PruneError):
    """A computation has no trustworthy result (NaN, Inf, a matrix that stays singular)."""


class CheckError(PruneError):
    """A written folder does not hold the pattern it claims."""
