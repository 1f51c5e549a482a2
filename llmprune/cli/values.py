"""Kinds of values as argparse types, for the flags of commands that are no fields of `Job`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from llmprune.errors import InputError
from llmprune.knobs import COUNT, SEED, SIZE, WINDOW, Kind


def typed(kind: Kind) -> Callable[[str], Any]:
    """An argparse type that reads values of a kind."""

    def read(text: str) -> Any:
        try:
            return kind.read(text)
        except InputError as error:
            raise argparse.ArgumentTypeError(f"{text!r} {error.message}") from None

    return read


positive, window, seed, size = typed(COUNT), typed(WINDOW), typed(SEED), typed(SIZE)
