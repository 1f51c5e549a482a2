"""Controls the heap of glibc, so that freed weights and temporaries return to the system at once.

glibc keeps freed tensors of up to 32 MB in its heap, where longer-lived ones come to lie between them, and the heap
grows from block to block. Weights and the solves' temporaries are therefore mapped one by one and go back to the
system when they are freed; activations, which are made and freed at every step of a forward, stay in the heap, where
that is cheap.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MAPPED, HEAP, KEPT = 2**21, 2**25, 2**29


def _glibc(function: str) -> Any:
    return getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None


@contextmanager
def mmap_large_allocations() -> Iterator[None]:
    """Within, tensors of more than `MAPPED` bytes are mapped one by one; does nothing where glibc is not used."""
    mallopt = _glibc("mallopt")
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, MAPPED)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, HEAP)
        mallopt(M_TRIM_THRESHOLD, KEPT)


def trim_heap() -> None:
    """Return unused heap pages to the system."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    # What getrusage says may be that of the process which started this one.
    return _status("VmHWM") or _most_ever()


def resident_memory() -> int:
    """Resident size of this process, in bytes; where the system does not tell, the largest so far."""
    return _status("VmRSS") or _most_ever()


def _status(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), 0)


def _most_ever() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
