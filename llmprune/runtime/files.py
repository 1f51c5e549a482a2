"""Atomic files and folders: there whole or not at all, whenever the process or the machine stops."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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

    Its mode is that of any new file (safetensors makes files for the owner alone).
    """
    temporary = path.with_suffix(".tmp")
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
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill, hidden beside `path`; it replaces `path` if nothing is raised, else it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as hidden:
        # A folder of its own has the mode of any new folder; the temporary one is for the owner alone.
        new = Path(hidden) / path.name
        new.mkdir()
        yield new
        replace_folder(new, path)


def replace_folder(new: Path, target: Path) -> None:
    """Rename the finished folder `new` to `target`, which it replaces."""
    if target.exists():
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
        os.replace(new, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(new, target)
    sync(target.parent)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
