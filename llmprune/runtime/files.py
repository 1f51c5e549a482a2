"""Atomic files and folders: there whole or not at all, whenever the process or the machine stops."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llmprune.errors import InputError
from llmprune.runtime.ownership import scratch_folder

UMASK = os.umask(0)
os.umask(UMASK)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write to, beside `path`; it is made durable and replaces `path` if nothing is raised.

    Its mode is that of any new file (safetensors makes files for the owner alone). Nobody else gives a file its name,
    so what was left there is ours; it is removed first, for it might be a link.
    """
    temporary = path.with_name(f".{path.name}.llmprune-tmp")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        temporary.chmod(0o666 & ~UMASK)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with replacing(path) as temporary:
        write_text(temporary, text)


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8; bytes of a file name that are none stand escaped, in JSON as JSON escapes them."""
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def appearing_folder(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[Path]:
    """A new folder to fill, hidden beside `path`; it gets that name if nothing is raised, else it is removed.

    Args:
        path: missing, or an empty folder.
        waiting: see `ownership.own_folder`.

    Raises:
        InputError: something else is there.
    """
    with scratch_folder(hidden_beside(path), waiting):
        if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
            raise InputError(f"{path} exists already", "choose another name, or move it away")
        new = hidden_beside(path) / path.name
        new.mkdir()
        yield new
        os.replace(new, path)
        sync(path.parent)


def hidden_beside(path: Path) -> Path:
    """The folder in which a folder grows until it is complete."""
    return path.with_name(f".{path.name}.new")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
