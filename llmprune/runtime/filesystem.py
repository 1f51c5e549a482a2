"""What not every file system can: locks (Lustre, CIFS), modes (exFAT, FUSE), flushing of folders."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmprune.errors import InputError
from llmprune.runtime.foreign import read_text

UNSUPPORTED = frozenset({
    errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EPERM, errno.EACCES,
})  # fmt: skip
"""How file systems say that they cannot."""
HOLDER = "holder"
"""The file that names the process which works in a folder, where the file system has no locks."""
POLL, UNWRITTEN = 0.2, 5.0
"""Seconds between two looks at another process, and after which a file without a name in it is nobody's."""
_held: set[Path] = set()


@contextmanager
def where_supported() -> Iterator[None]:
    """Go on where the file system cannot do what is only better done."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk (fsync), as far as the file system can."""
    with where_supported():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def lock(descriptor: int, folder: Path, waiting: Callable[[], None] | None) -> None:
    """Lock an open file in a folder, which says that this process works there.

    Args:
        descriptor: of the file; the lock ends when it is closed.
        folder: of the file; `unlock` it in the end.
        waiting: called before another process is waited for; None to refuse instead.

    Raises:
        InputError: another process works there, or may.
    """
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                raise _busy(folder) from None
            waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _hold(folder / HOLDER, waiting)


def unlock(folder: Path) -> None:
    """Take away the name of this process, if that stands in for a lock."""
    if folder / HOLDER in _held:
        _held.discard(folder / HOLDER)
        (folder / HOLDER).unlink(missing_ok=True)


def _hold(holder: Path, waiting: Callable[[], None] | None) -> None:
    """Make the file that names this process, when no other that is alive is named there."""
    told = False
    while True:
        with suppress(FileExistsError):
            # The folder may be gone with the process that worked there; then the caller makes it anew.
            with suppress(FileNotFoundError):
                descriptor = os.open(holder, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
                with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                    stream.write(f"{os.getpid()} {socket.gethostname()}\n")
                _held.add(holder)
            return
        if not (named := _named(holder)):
            holder.unlink(missing_ok=True)
            continue
        number, host = named
        if waiting is None or (host and host != socket.gethostname()):
            raise _busy(holder.parent, f", process {number} on {host}, says {holder}") if host else _busy(holder.parent)
        if not told:
            waiting()
            told = True
        time.sleep(POLL)


def _named(holder: Path) -> tuple[int, str] | None:
    """The process that a file names, and its host; `(0, "")` while it is being written, None if it works no more."""
    try:
        number, host = read_text(holder).split()
        process = int(number)
    except (OSError, ValueError):
        return (0, "") if _is_new(holder) else None
    return None if host == socket.gethostname() and not _is_alive(process, holder) else (process, host)


def _is_new(file: Path) -> bool:
    with suppress(FileNotFoundError):
        return time.time() - file.stat().st_mtime < UNWRITTEN
    return False


def _is_alive(process: int, holder: Path) -> bool:
    if process == os.getpid():
        # Else it is that of an earlier process, which had our number.
        return holder in _held
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _busy(folder: Path, who: str = "") -> InputError:
    hint = "wait for it to end, or choose another --out"
    if who:
        hint += f"; if it works no more, which no lock can tell on this file system, remove {folder / HOLDER}"
    return InputError(f"another llmprune is writing to {folder}{who}", hint)
