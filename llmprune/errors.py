"""Errors with a message for the user and a hint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def printable(text: object) -> str:
    """`text` in one line; what could pass for something else (terminal sequences, line ends, marks that turn the
    direction of text, lone surrogates) is escaped as in `repr`.

    Names and messages that come from files, servers and other libraries are shown in this form, here and nowhere raw.
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in str(text)
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its `repr` where that is empty."""
    return (str(error).strip().splitlines() or [repr(error)])[0]


class PruneError(Exception):
    """The base of all errors of a run; `exit_code` is that of the process.

    Args:
        message: what is wrong, with the two things that disagree; made printable.
        hint: what the user can do about it.
    """

    exit_code = 1
    silent = False
    """Whether another process prints the error."""

    def __init__(self, message: str, hint: str = "") -> None:
        self.message, self.hint = printable(message), printable(hint)
        super().__init__(self.message)


class InputError(PruneError):
    """The request cannot be met; raised before anything is written."""

    exit_code = 2


class UnreadableError(InputError):
    """A file of the model cannot be read; in the middle of a run it could be before, and may be again."""


class NumericalError(PruneError):
    """A computation has no trustworthy result (NaN, Inf, a matrix that stays singular)."""


class CheckError(PruneError):
    """A written folder does not hold the pattern it claims."""


class Interrupted(PruneError):
    """The user stopped what was complete already, or can be repeated."""

    exit_code = 130


@contextmanager
def complete(out: object) -> Iterator[None]:
    """Say of an interruption within that the output `out` is complete."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(f"interrupted, but {out} is complete", "the same command ends at once") from stop
