"""What is published or shown names no place on this machine and no secret."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection
from pathlib import Path, PureWindowsPath
from typing import Any

START = r"(?:file:/+|~?/(?!/)|[A-Za-z]:[\\/])"
WHOLE = re.compile(rf"{START}[^,=;'\"\n]+")
"""A text that is a path and nothing else; it may hold blanks."""
PART = re.compile(rf"(?<![\w./\\]){START}[^\s,=;'\"]+")
"""A path within a text."""
HUB_ID = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*", re.ASCII)
"""A name on the Hub."""
ORIGINS = frozenset({
    "_name_or_path", "name_or_path", "_model_name_or_path", "base_model_name_or_path", "special_tokens_map_file",
    "tokenizer_file", "vocab_file", "merges_file",
})  # fmt: skip
"""Settings that say from where a model or its tokenizer was loaded."""
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
"""A token of the Hub."""
LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
"""User and password of an address."""


def base_name(path: str) -> str:
    """The last part of a path, absolute or not: `../models/tiny/` -> `tiny`."""
    name = PureWindowsPath(path).name
    # Where a path does not say the name of a folder, the folder does.
    return name if name not in {"", "..", "~"} else Path(path).expanduser().resolve().name


def without_paths(text: str) -> str:
    """A text with the last part of every absolute path in its place."""
    return base_name(text) if WHOLE.fullmatch(text) else PART.sub(lambda found: base_name(found[0]), text)


def without_origins(settings: Any) -> Any:
    """JSON values, in which the settings of `ORIGINS`, at any depth, name nothing but a base name or a Hub id."""
    if isinstance(settings, dict):
        return {key: (_named if key in ORIGINS else without_origins)(value) for key, value in settings.items()}
    return [without_origins(item) for item in settings] if isinstance(settings, list) else settings


def _named(value: Any) -> Any:
    # The folder that `..` means is none of the reader's business either.
    return PureWindowsPath(value).name.strip(".~") if isinstance(value, str) and not HUB_ID.fullmatch(value) else value


def redacted_command(command: str, flags: Collection[str]) -> str:
    """A command line with base names in place of paths; '' where it cannot be split into words.

    Args:
        command: as for a shell.
        flags: those whose values are paths, absolute or not.
    """
    try:
        words = shlex.split(command)
    except ValueError:
        return ""
    found: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        flag, equals, value = word.partition("=")
        if before in flags:
            found.append(base_name(word))
        elif flag in flags and equals:
            found.append(f"{flag}={base_name(value)}")
        else:
            found.append(without_paths(word))
    return shlex.join(found)


def without_secrets(text: str) -> str:
    """A text with `***` in place of tokens of the Hub, the user's own above all, and of logins in addresses."""
    from huggingface_hub import get_token

    if token := get_token():
        text = text.replace(token, "***")
    return LOGIN.sub("***@", TOKEN.sub("***", text))
