"""Files and folders of the cache, each made once."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from llmprune.errors import InputError
from llmprune.progress import Progress
from llmprune.runtime.filesystem import sync
from llmprune.runtime.ownership import scratch_folder


def make_once(path: Path, is_there: Callable[[], bool], make: Callable[[Path], None], progress: Progress) -> Path:
    """An entry of the cache, made by one process while others wait for it, and only if it is not there.

    Args:
        path: of the entry.
        is_there: whether it is complete.
        make: makes it under another path, whose folder may be used meanwhile and is removed.
        progress: told when another process is waited for.

    Raises:
        InputError: the cache cannot be written.
    """
    making = path.with_name(f".{path.name}.making")
    for left in path.parent.glob(".*.making"):
        # Of an entry that may never be asked for again; one that another process fills is locked.
        if left != making:
            with suppress(InputError, OSError), scratch_folder(left):
                pass
    if is_there() and not os.path.lexists(making):
        return path
    try:
        with scratch_folder(making, lambda: progress.note(f"another llmprune is making {path}: waiting for it")):
            if not is_there():
                make(making / path.name)
                os.replace(making / path.name, path)
                sync(path.parent)
    except OSError as error:
        raise InputError(
            f"cannot write to the cache folder {path.parent}: {error}", "choose another --cache-dir"
        ) from error
    return path
