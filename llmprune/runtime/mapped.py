"""Tensors in unnamed files: the system writes their pages out and takes the memory back when it is asked to."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from llmprune.errors import PruneError


class MappedFile:
    """A tensor of arbitrary values in a file that has no name, and ends with it.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
        folder: on the disk of the file; None for the system's folder for such files.

    Attributes:
        tensor: shares its memory with the file.

    Raises:
        PruneError: the disk is full.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, folder: Path | None) -> None:
        size = math.prod(shape) * dtype.itemsize
        try:
            with TemporaryFile(dir=folder) as file:
                file.truncate(size)
                if hasattr(os, "posix_fallocate"):  # a page without disk space later would end the process
                    os.posix_fallocate(file.fileno(), 0, size)
                self._map = mmap.mmap(file.fileno(), size)
        except OSError as error:
            where = folder or "the folder for temporary files"
            raise PruneError(
                f"cannot write {size:,} bytes of pruned experts in {where}: {error}",
                "free disk space and run the same command again, or choose another --out",
            ) from error
        self.tensor: Tensor = torch.frombuffer(self._map, dtype=dtype).view(*shape)
        _FILES[self.tensor.untyped_storage().data_ptr()] = self

    def release(self) -> None:
        """Give back the memory; the values stay."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


_FILES: WeakValueDictionary[int, MappedFile] = WeakValueDictionary()


def release_pages(tensor: Tensor) -> None:
    """Give back the memory of the file that a tensor lies in, if it lies in one; its values stay."""
    if (file := _FILES.get(tensor.untyped_storage().data_ptr())) is not None:
        file.release()
