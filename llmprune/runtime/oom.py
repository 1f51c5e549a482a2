"""Retries an attempt with smaller batches when the device runs out of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from llmprune.errors import PruneError, first_line
from llmprune.progress import Progress
from llmprune.runtime.memory import trim_heap
from llmprune.runtime.process_group import SINGLE, ProcessGroup, RemoteOOMError

T = TypeVar("T")


def with_oom_retry(attempt: Callable[[int], T], windows: int, progress: Progress, group: ProcessGroup = SINGLE) -> T:
    """The result of an attempt with a number of windows per batch; after an out-of-memory error with half as many.

    Args:
        attempt: what to do; called again after it ran out of the device's memory.
        windows: at once, at first.
        progress: told when there are fewer.
        group: the processes that attempt it together.

    Raises:
        PruneError: one window alone is too much.
    """
    while True:
        try:
            return attempt(windows)
        except RemoteOOMError:
            reason = "it is, in another process"
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            reason = first_line(error)
            group.signal_oom()
        if windows == 1:
            raise PruneError(
                f"one window at a time is more than the device's memory holds: {reason}",
                "a shorter --seq-len, or --device cpu",
            )
        # Only here, behind the `except`, is what the attempt held free.
        windows = smaller_batch(windows)
        trim_heap()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        progress.warn(f"out of memory on the device: going on with {windows} of the text's windows at a time")


def smaller_batch(windows: int) -> int:
    """The largest divisor of a batch size that is at most half of it."""
    return max(part for part in range(1, windows // 2 + 1) if windows % part == 0)


def out_of_memory(error: Exception) -> bool:
    """Whether a device's memory ran out; not all backends have an exception of their own for it."""
    return isinstance(error, RuntimeError) and (
        isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
    )
