"""The gate through which files that others made are opened: regular, of bounded size, and inside their folder.

What is wrong with a file is an `OSError` or a `ValueError` here; `reading` makes it, and whatever a library raises over
such a file, an `InputError` that names the file.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

from llmprune.errors import InputError, PruneError, first_line

JSON_BYTES = 32 * 2**20
"""The largest JSON text that is parsed: as Python objects it takes up to 25 times as much memory."""
CONFIG_BYTES = 2**20
"""The largest config: it is copied many times while a model is built."""
TEXT_BYTES = 256 * 2**20
"""The largest file that a library may be given to parse, such as a tokenizer."""
CHAT_TEMPLATES = "additional_chat_templates"
"""The only folder inside a model folder that is read."""
READ = {
    "config.json": CONFIG_BYTES, "*config.json": JSON_BYTES, "*.index.json": JSON_BYTES, "*.safetensors": 2**63,
    **dict.fromkeys(
        ("*.json", "*.model", "*.jinja", "*.py", "*.tiktoken", "*.vocab", "*.spm", "*.bpe", "vocab.txt", "merges.txt",
         "spiece.*", "README.md"),
        TEXT_BYTES,
    ),
}  # fmt: skip
"""The files of a model folder that are read, and their largest size; all others are at most copied."""
_KINDS = {
    stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}  # fmt: skip


def open_regular(path: Path, most: int | None = None) -> BinaryIO:
    """A regular file, open for reading; nothing else is opened, because a pipe may block and a device may never end.

    Args:
        path: links are followed.
        most: the largest size in bytes; None for any.

    Raises:
        OSError: it is missing, no regular file, or too large.
    """
    check_regular(path.stat(), most)
    # What stands there may be another file by now; a pipe opens at once this way.
    stream = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
    try:
        check_regular(os.fstat(stream.fileno()), most)
    except OSError:
        stream.close()
        raise
    return stream


def check_regular(status: os.stat_result, most: int | None = None) -> None:
    """Refuse what is no regular file, or too large.

    Raises:
        OSError: with the reason.
    """
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"it is {_KINDS.get(stat.S_IFMT(status.st_mode), 'something else')}, not a regular file")
    if most is not None and status.st_size > most:
        raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes, more than {most:,}")


def read_text(path: Path, most: int = JSON_BYTES) -> str:
    """The text of a UTF-8 file.

    Raises:
        OSError: it is missing, no regular file, or too large.
        ValueError: it is not UTF-8.
    """
    with open_regular(path, most) as stream:
        raw = stream.read(most + 1)
    if len(raw) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes")
    return raw.decode("utf-8")


def read_json(path: Path, unique: bool = False) -> dict[str, Any]:
    """The object in a JSON file; see `parse_json`.

    Raises:
        OSError: it is missing, no regular file, or too large.
        ValueError: it is no JSON, nested too deeply, or no object.
    """
    found = parse_json(read_text(path), unique)
    if not isinstance(found, dict):
        raise ValueError("it holds no object")
    return found


def parse_json(text: str | bytes, unique: bool = False) -> Any:
    """A JSON text as Python values.

    Args:
        text: UTF-8 where it is bytes.
        unique: whether to refuse an object that names something twice: readers differ in which value they take.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique if unique else None)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it names {name!r} twice")
        found[name] = value
    return found


def check_folder(folder: Path) -> None:
    """Check every file of a model folder that may be read, by us or by a library, before any is.

    Raises:
        InputError: a pipe, a device, a link that leaves the folder, or a file too large to parse.
    """
    with reading(f"{folder} cannot be read", "name a folder of files that you may read"):
        listed = sorted(folder.iterdir())
        listed += sorted((folder / CHAT_TEMPLATES).iterdir()) if (folder / CHAT_TEMPLATES).is_dir() else []
    for path in listed:
        most = next((most for glob, most in READ.items() if fnmatchcase(path.name, glob)), None)
        if most is None:
            continue
        check_inside(path, folder)
        with reading(f"{path} cannot be read", "replace it by a regular file, or take it out of the folder"):
            check_regular(path.stat(), most)


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a link that leads out of its folder; those of the Hugging Face cache lead to its own blobs.

    Raises:
        InputError: naming where it leads.
    """
    with reading(f"{str(path)[:300]!r} is no usable path", "check the names in the folder, and in its index"):
        home, real = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    homes = {home, home.parents[1] / "blobs"} if home.parent.name == "snapshots" else {home}
    if not homes & {real, *real.parents}:
        raise InputError(
            f"{path} is a link that leaves its folder, to {real}", f"copy what it should hold: cp -rL {folder} NEW"
        )


def user_path(text: str | Path) -> Path:
    """The path that a user wrote, with `~` expanded; whether anything is there is another question.

    Raises:
        InputError: it cannot be used: a name too long or not UTF-8, a null byte, an unknown user.
    """
    with reading(f"{str(text)[:80]!r} is no usable path", "check its spelling"):
        try:
            path = Path(text).expanduser()
        except RuntimeError as error:
            raise ValueError("there is no such user") from error
        try:
            str(path).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError("it is not UTF-8, which some libraries cannot open") from error
        if "\0" in str(path):
            raise ValueError("it holds a null byte")
        path.exists()
        return path


@contextmanager
def reading(what: str, hint: str) -> Iterator[None]:
    """Make whatever is raised over a file that others made an `InputError`; its message is `what` and the reason.

    An error of ours stays as it is; `about` names the file in one that does not.
    """
    try:
        yield
    except PruneError:
        raise
    except BaseException as error:
        # Libraries written in Rust end so where they do not expect what they find.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{what}: {reason(error)}", hint) from error


@contextmanager
def muted() -> Iterator[None]:
    """Nothing reaches stdout and stderr of the process meanwhile: libraries in Rust print there what is in a file."""
    kept: dict[int, int] = {}
    for number in (1, 2):
        with suppress(OSError):  # it is closed already
            kept[number] = os.dup(number)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in kept:
            os.dup2(nowhere, number)
        yield
    finally:
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Put the name of a file before the message of an `InputError` over what is in it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error.message}", error.hint) from error


def reason(error: BaseException) -> str:
    """What an exception says of a file, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"it lacks {str(error)[:80]}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return first_line(error)[:200] if str(error).strip() else type(error).__name__
