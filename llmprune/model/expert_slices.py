"""The matrices of experts, read from the checkpoint when a product needs them; a bounded number is in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmprune.runtime.mapped import MappedFile
from llmprune.runtime.memory import mmap_large_allocations

if TYPE_CHECKING:
    from llmprune.model.slices import CheckpointSlices

EXPERT_MEMORY = 2 * 2**30
"""Bytes of a block's experts that are in memory at a time, in the dtype in which they compute."""


class SliceCache:
    """The matrices that were used last.

    Args:
        limit: bytes that they may take together; one is kept whatever its size.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self._held: OrderedDict[object, Tensor] = OrderedDict()

    def get(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, or gave for this key before."""
        if key not in self._held:
            with mmap_large_allocations():
                made = make()
            self._held[key] = made
            self.nbytes += made.nbytes
            while self.nbytes > self.limit and len(self._held) > 1:
                self.nbytes -= self._held.popitem(last=False)[1].nbytes
        self._held.move_to_end(key)
        return self._held[key]

    def drop(self, key: object) -> None:
        """Forget what `make` gave for a key."""
        if key in self._held:
            self.nbytes -= self._held.pop(key).nbytes


class SlicedValues:
    """The values of a parameter that holds the matrices of experts, slice by slice.

    Args:
        slices: those of the checkpoint.
        cache: shared with other parameters.
        convert: to the dtype and device in which they compute.
        device: that device.

    Attributes:
        new: the parameter as it will be stored, in a file; None as long as nothing has been written.
        dense: whether the values of the checkpoint are used for slices that were written, too.
    """

    def __init__(
        self, slices: CheckpointSlices, cache: SliceCache, convert: Callable[[Tensor], Tensor], device: torch.device
    ) -> None:
        self.slices, self.device, self.dense = slices, device, False
        self._cache, self._convert = cache, convert
        self._file: MappedFile | None = None
        self._written: set[int] = set()

    @property
    def new(self) -> Tensor | None:
        """The parameter as it will be stored; of slices that were not written the values are arbitrary."""
        return None if self._file is None else self._file.tensor

    def slice(self, index: int) -> Tensor:
        """A slice as it computes now."""
        written = index in self._written and not self.dense
        return self._cache.get((id(self), index, written), lambda: self._read(index, written))

    def _read(self, index: int, written: bool) -> Tensor:
        if not written or self._file is None:
            return self._convert(self.slices.read(index))
        # What computes must not lie in the file.
        found = self._convert(self._file.tensor[index].clone())
        self._file.release()
        return found

    def open(self, dtype: torch.dtype, folder: Path | None) -> Tensor:
        """The parameter as it will be stored, in a file, to write slices into; tell `written` of them.

        Args:
            dtype: in which it will be stored.
            folder: of the file.
        """
        if self._file is None:
            self._file = MappedFile(self.slices.shape, dtype, folder)
        return self._file.tensor

    def written(self, index: int) -> None:
        """A slice of `new` has new values."""
        assert self._file is not None
        self._written.add(index)
        self._cache.drop((id(self), index, True))
        self._file.release()

    def complete(self, dtype: torch.dtype, folder: Path | None) -> Tensor:
        """The whole parameter as it will be stored; slices that were not written are those of the checkpoint."""
        new = self.open(dtype, folder)
        for index in sorted(set(range(len(new))) - self._written):
            new[index].copy_(self.slices.read(index))
            self.written(index)
        return new

    def part(self, size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Tensor:
        """A part of the parameter by its place there; matrices that it does not touch are not read."""
        length = self.slices.shape[1:].numel()
        last = offset + sum((many - 1) * step for many, step in zip(size, stride, strict=True))
        indices = range(offset // length, last // length + 1)
        if len(indices) == 1:
            return self.slice(indices[0]).as_strided(size, stride, offset - indices[0] * length)
        return torch.cat([self.slice(index).flatten() for index in indices]).as_strided(
            size, stride, offset - indices[0] * length
        )
