"""What may be deleted: a folder that carries our mark, with all that it holds, and nothing else.

Unfinished work lies in a hidden folder beside what it becomes. The lock file in such a folder begins with a mark that
says so. A folder of that name without the mark is somebody else's and is refused; so is a marked one that holds a link,
for whoever deletes or writes through a link reaches files elsewhere.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from llmprune.errors import InputError
from llmprune.runtime.filesystem import HOLDER, lock, unlock, where_supported

LOCK = "lock"
OWN = frozenset({LOCK, HOLDER})
"""The files that say whose a folder is."""
MARK = b"llmprune keeps unfinished work in this folder and deletes it with all that is in it\n"


def check_ours(folder: Path) -> None:
    """Refuse a folder that is not ours to fill and to delete; one that is missing or empty may become ours.

    Raises:
        InputError: it is a link or a file, has no mark, or holds a link.
    """
    try:
        reason = _foreign(folder)
    except FileNotFoundError:
        return  # another process has just removed it
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    if reason:
        raise InputError(
            f"{folder} {reason}",
            "llmprune needs a folder of that name for itself: move yours away, or choose another place",
        )


def _foreign(folder: Path) -> str:
    """Why a folder is not ours, or ''."""
    if folder.is_symlink():
        return "is a link"
    if not folder.exists():
        return ""
    if not folder.is_dir():
        return "is a file"
    # In this order, for another process may be removing it: the lock goes behind all that it is for.
    if not _is_marked(folder / LOCK) and (stranger := _stranger(folder)):
        return f"was not made by llmprune: it holds {stranger!r}"
    _, links = regular_files(folder)
    return f"holds {links[0].relative_to(folder).as_posix()!r}, which is a link or no regular file" if links else ""


def _stranger(folder: Path) -> str:
    """A name in a folder without the mark; '' where there is none, or a lock that its process had no time to mark."""
    names = sorted(set(os.listdir(folder)) - {HOLDER})
    lock = folder / LOCK
    return "" if not names or (names == [LOCK] and is_regular(lock) and not lock.stat().st_size) else names[0]


def _is_marked(lock: Path) -> bool:
    if not is_regular(lock):
        return False
    with lock.open("rb") as stream:
        return stream.read(len(MARK)) == MARK


def is_regular(path: Path) -> bool:
    """Whether a path is a file itself: no link to one, no folder, pipe or device."""
    with suppress(OSError):
        return stat.S_ISREG(path.lstat().st_mode)
    return False


def regular_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The regular files below a folder, and all else that is no folder: links (never followed), pipes, devices."""
    regular: list[Path] = []
    others: list[Path] = []
    for place, folders, files in os.walk(folder):
        found = [Path(place, name) for name in files]
        found += [path for name in folders if (path := Path(place, name)).is_symlink()]
        for path in found:
            (regular if is_regular(path) else others).append(path)
    return sorted(regular), sorted(others)


@contextmanager
def own_folder(folder: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """A folder made, marked and locked for this process; what an earlier one left in it is there.

    Args:
        folder: its parents are made too.
        waiting: called before another process is waited for; None to refuse instead.

    Raises:
        InputError: it is not ours, or another process works there.
        OSError: it cannot be written.
    """
    while True:
        check_ours(folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            continue  # the process that worked there has just removed it
        with os.fdopen(descriptor, "ab") as stream:
            if _acquire(descriptor, folder, waiting):
                try:
                    if os.fstat(descriptor).st_size == 0:
                        stream.write(MARK)
                        stream.flush()
                        with where_supported():
                            os.fsync(descriptor)
                    yield
                finally:
                    unlock(folder)
                return


def _acquire(descriptor: int, folder: Path, waiting: Callable[[], None] | None) -> bool:
    """Lock an open lock file; False if it is no longer the one in the folder."""
    lock(descriptor, folder, waiting)
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), (folder / LOCK).stat()):
            return True
    unlock(folder)
    return False


@contextmanager
def scratch_folder(folder: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """A folder of this process alone, empty but for its lock, and removed at the end; arguments as of `own_folder`."""
    with own_folder(folder, waiting):
        clear(folder)
        try:
            yield
        finally:
            remove(folder)


def clear(folder: Path, keep: Sequence[str] = ()) -> None:
    """Delete what a folder of ours holds, but for its lock and the names in `keep`."""
    for path in folder.iterdir():
        if path.name not in {*OWN, *keep}:
            delete(path)


def remove(folder: Path, last: Sequence[str] = ()) -> None:
    """Delete a folder of ours as far as possible; the names in `last` go behind the others, then lock and folder."""
    with suppress(OSError):
        clear(folder, keep=last)
        for name in (*last, LOCK, HOLDER):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def delete(path: Path) -> None:
    """Delete a file, a folder with all that is in it, or a link (not where it leads)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
