"""How every command runs: flags are read, an error becomes two lines, and an exit code says the rest."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from llmprune.errors import PruneError

INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Errors in two lines, with a hint."""

    def error(self, message: str) -> NoReturn:
        hint = f"see {self.prog} --help"
        if match := re.search(r"argument (\S+): invalid choice: '(.*?)' \(choose from (.*)\)", message):
            flag, value, choices = match[1], match[2], re.findall(r"[\w-]+", match[3])
            message, hint = f"{flag} {value!r} is unknown", f"choose from {', '.join(choices)}"
            if close := difflib.get_close_matches(value, choices, 1):
                hint += f"; did you mean {close[0]}?"
        elif match := re.search(r"unrecognized arguments: (\S+)", message):
            flags = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(match[1], flags, 1)
            message = f"unknown argument {match[1]!r}"
            hint = f"did you mean {close[0]}?" if close else hint
        print_error(message, hint)
        raise SystemExit(2)


def run_command(parser: Parser, command: Callable[[argparse.Namespace], int], argv: Sequence[str] | None = None) -> int:
    """Parse the flags and run a command; returns the exit code.

    Args:
        parser: has a flag `--debug`.
        command: what to do with the parsed flags.
        argv: the flags; None for those of the process.
    """
    try:
        options = parser.parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    try:
        return guarded(lambda: command(options), options.debug)
    except KeyboardInterrupt:
        # It can arrive while the first handler is being entered or left.
        return print_interrupted()


def print_interrupted() -> int:
    """The one line of an interruption, and its exit code."""
    sys.stderr.write("\ninterrupted; the output folder is as it was\n")
    return INTERRUPTED


def guarded(work: Callable[[], int], debug: bool) -> int:
    """Run `work`; turn what goes wrong into two lines and an exit code."""
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return work()
    except KeyboardInterrupt:
        return print_interrupted()
    except PruneError as error:
        if debug:
            traceback.print_exc()
        print_error(error.message, error.hint)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, RecursionError) as error:
        if debug:
            traceback.print_exc()
        text = str(error).strip().splitlines()
        print_error(
            f"{type(error).__name__}: {text[0] if text else 'no message'}",
            "unexpected; run again with --debug and report it",
        )
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def print_error(message: str, hint: str) -> None:
    """The two lines of an error."""
    sys.stderr.write(f"error: {message}\n")
    if hint:
        sys.stderr.write(f"hint: {hint}\n")


def silence_libraries(debug: bool) -> None:
    """Other libraries' remarks would bury ours."""
    import warnings

    if debug:
        return
    warnings.simplefilter("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers.utils.logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
