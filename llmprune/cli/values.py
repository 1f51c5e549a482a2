"""What may stand behind a flag: the types of the command line's values."""

from __future__ import annotations

import argparse
import math
import re


def whole(text: str, least: int, limit: int = 2**31) -> int:
    """A whole number of at least `least`, below `limit`."""
    if not text.isdecimal() or not text.isascii() or not least <= int(text) < limit:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return whole(text, 1)


def window(text: str) -> int:
    """A window needs two tokens: one to predict from, one to predict."""
    if positive(text) < 2:
        raise argparse.ArgumentTypeError(f"a window of {text} token leaves nothing to predict; use 2 or more")
    return int(text)


def pair(text: str) -> tuple[str, str]:
    """`KEY=VALUE`."""
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    return key, value


def epochs(text: str) -> int:
    """A whole number of at least 0."""
    return whole(text, 0)


def size(text: str) -> int:
    """A number of bytes: `512MiB`, `2GiB`, `1.5GB`, `0`."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]?)(i?)B?", text, re.ASCII | re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 512MiB or 2GiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


def share(text: str) -> float:
    """A finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def seed(text: str) -> int:
    """A whole number of at least 0."""
    return whole(text, 0, 2**63)
