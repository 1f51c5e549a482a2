"""Runs a command: parses its flags, prints an error in two lines, returns the exit code."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NoReturn, TextIO

from llmprune.errors import PruneError, printable
from llmprune.knobs import Knob, flag_of, nearest, spellings
from llmprune.runtime.redact import without_secrets

INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Errors in two lines, with a hint.

    Attributes:
        knobs: whose earlier names are taken, and whose names elsewhere are answered.
        answers: flags that are answered, and the hints.
        stray: the hint for a word where a flag is expected, given the word and the rest; None if words are taken.
        stopped: what is said of an interruption.
    """

    knobs: Sequence[Knob] = ()
    answers: Mapping[str, str] = MappingProxyType({})
    stray: Callable[[str, Sequence[str]], str] | None = None
    stopped = "interrupted"

    def present(self, arguments: Sequence[str]) -> list[str]:
        """The command line with all flags under their present names; ends the process at one that is unknown."""
        earlier = {flag_of(name): each.flag for each in self.knobs for name in each.earlier}
        found: list[str] = []
        takes_value = False
        for at, argument in enumerate(arguments):
            if argument == "--":
                return found + list(arguments[at:])
            flag, equals, value = argument.partition("=")
            rest = arguments[at + 1 :]
            if takes_value or not _is_flag(flag):
                if self.stray is not None and not takes_value:
                    self.refuse(
                        f"unknown argument {argument!r}" if at else f"{argument!r} is no command",
                        self.stray(argument, rest),
                    )
                takes_value = False
                found.append(argument)
                continue
            if flag in earlier:
                _warn(f"{flag} is now called {earlier[flag]}")
                flag = earlier[flag]
            if flag not in self._option_string_actions:
                self.refuse(f"unknown argument {flag!r}", self._meant(flag, value or next(iter(rest), "")))
            takes_value = self._option_string_actions[flag].nargs is None and not equals
            found.append(f"{flag}{equals}{value}")
        return found

    def _meant(self, flag: str, value: str) -> str:
        """The hint for an unknown flag, with the value that the user gave it."""
        hints = {
            **{name: _offer(each, implied or value) for name, (each, implied) in spellings(self.knobs).items()},
            **{name: f"did you mean {name}?" for name in self._option_string_actions},
            **self.answers,
        }
        return self.answers.get(flag) or nearest(flag, hints) or f"see {self.prog} --help"

    def error(self, message: str) -> NoReturn:
        hint = f"see {self.prog} --help"
        if match := re.search(r"argument (\S+): invalid choice: '(.*?)' \(choose from (.*)\)", message):
            flag, value, choices = match[1], match[2], re.findall(r"[\w-]+", match[3])
            message, hint = f"{flag} {value!r} is unknown", f"choose from {', '.join(choices)}"
            if close := difflib.get_close_matches(value, choices, 1):
                hint += f"; did you mean {close[0]}?"
        self.refuse(message.replace("unrecognized arguments:", "unknown argument"), hint)

    def refuse(self, message: str, hint: str) -> NoReturn:
        """Print an error, once for all processes of a run, and end the process."""
        if not is_worker():
            print_error(message, hint)
        raise SystemExit(2)


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a text line by line, on stdout if nothing else is said; nothing else prints.

    What a terminal would obey is escaped; who puts a foreign string into a text escapes its line ends before.
    """
    stream = stream or sys.stdout
    for line in text.split("\n"):
        stream.write(f"{printable(line)}\n")
    stream.flush()


def _is_flag(word: str) -> bool:
    """Whether argparse would take a word for a flag."""
    return word.startswith("-") and word != "-" and " " not in word and not re.fullmatch(r"-\d+|-\d*\.\d+", word)


def _offer(each: Knob, value: str) -> str:
    """The hint to use a knob's flag."""
    given = shlex.quote(value) if value and not _is_flag(value) else each.metavar
    return f"use {each.flag}" + ("" if each.is_switch else f" {given}")


def is_worker() -> bool:
    """Whether this is one of several processes, but not the first, which speaks for all."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and int(os.environ.get("RANK", "0")) > 0


def run_command(parser: Parser, command: Callable[[argparse.Namespace], int], argv: Sequence[str] | None = None) -> int:
    """Parse the flags and run a command; returns the exit code.

    Args:
        parser: has a flag `--debug`.
        command: what to do with the parsed flags.
        argv: the flags; None for those of the process.
    """
    try:
        options = parser.parse_args(parser.present(sys.argv[1:] if argv is None else argv))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    try:
        return guarded(lambda: command(options), options.debug, parser.stopped)
    except KeyboardInterrupt:
        # It can arrive while the first handler is being entered or left.
        return print_interrupted(parser.stopped)


def print_interrupted(text: str) -> int:
    """The one line of an interruption, and its exit code."""
    say(f"\n{text}", sys.stderr)
    return INTERRUPTED


def guarded(work: Callable[[], int], debug: bool, stopped: str = Parser.stopped) -> int:
    """The exit code of `work`; an exception is printed in two lines."""
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return work()
    except KeyboardInterrupt:
        return print_interrupted(stopped)
    except PruneError as error:
        if debug:
            print_traceback()
        if not error.silent:
            print_error(error.message, error.hint)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, RecursionError) as error:
        if debug:
            print_traceback()
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


def _warn(text: str) -> None:
    if not is_worker():
        say(f"warning: {printable(text)}", sys.stderr)


def print_error(message: str, hint: str) -> None:
    """The two lines of an error."""
    say(f"error: {printable(without_secrets(message))}", sys.stderr)
    if hint:
        say(f"hint: {printable(without_secrets(hint))}", sys.stderr)


def print_traceback() -> None:
    """The traceback of the exception at hand, without secrets that a server's answer may repeat."""
    say(without_secrets(traceback.format_exc()).rstrip(), sys.stderr)


def silence_libraries(debug: bool) -> None:
    """Other libraries' remarks would bury ours."""
    import warnings

    if debug:
        return
    warnings.simplefilter("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers.utils.logging as hf_logging

    hf_logging.set_verbosity(hf_logging.CRITICAL)  # errors show what is in files, unescaped
    hf_logging.disable_progress_bar()
