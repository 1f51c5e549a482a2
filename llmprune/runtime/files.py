"""Atomic files and folders: there whole or not at all, whenever the process or the machine stops."""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmprune.errors import InputError
from llmprune.runtime.filesystem import sync, where_supported
from llmprune.runtime.ownership import regular_files, scratch_folder

UMASK = os.umask(0)
os.umask(UMASK)


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
        with where_supported():
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
def appearing_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, hidden beside `path`; it gets that name if nothing is raised, else it is removed.

    A process that is killed behind the renaming leaves the hidden folder without the new one in it. Then the work is
    repeated, and the folder at `path` stays if it is the same.

    Args:
        path: missing, or an empty folder.

    Raises:
        InputError: something else is there.
    """
    hidden = path.with_name(f".{path.name}.new")
    new = hidden / path.name
    renamed = hidden.is_dir() and not new.exists()
    if is_occupied(path) and not renamed:
        raise _occupied(path)
    with scratch_folder(hidden):
        new.mkdir()
        yield new
        if not is_occupied(path):
            os.replace(new, path)
            sync(path.parent)
        elif not same_files(new, path):
            raise _occupied(path)


def is_occupied(path: Path) -> bool:
    """Whether something is there that a rename must not replace: all but an empty folder."""
    return os.path.lexists(path) and (path.is_symlink() or not path.is_dir() or any(path.iterdir()))


def _occupied(path: Path) -> InputError:
    return InputError(f"{path} exists already", "choose another --out, or remove it")


def same_files(one: Path, other: Path) -> bool:
    """Whether two folders hold regular files of the same names and bytes, and nothing else."""
    found = [regular_files(folder) for folder in (one, other)]
    names = [
        [path.relative_to(folder) for path in files] for folder, (files, _) in zip((one, other), found, strict=True)
    ]
    return (
        names[0] == names[1]
        and all(filecmp.cmp(one / name, other / name, shallow=False) for name in names[0])
        and not any(others for _, others in found)
    )


def sha256(path: Path) -> str:
    """The SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
