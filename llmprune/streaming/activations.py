"""Stores hidden states between blocks: in memory while they fit, else in files, from which batches are mapped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmprune.runtime.files import sha256
from llmprune.runtime.filesystem import sync

ALIGNMENT = 4096  # sums over a mapped tensor must come out as they do over an allocated one


@dataclass(frozen=True, slots=True)
class Piece:
    """The place of a batch in a file."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def cut(self, rows: int) -> tuple[Piece, Piece]:
        """The first rows, and the rest."""
        whole, *rest = self.shape
        offset = self.offset + rows * (self.nbytes // whole)
        return replace(self, shape=(rows, *rest)), Piece(offset, (whole - rows, *rest), self.dtype)


class Filed(dict[int, Piece]):
    """Tensors in a file, by number.

    Args:
        path: of the file; it is made when the first tensor comes.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def put(self, number: int, tensor: Tensor) -> None:
        """Write a tensor, in the place of the one of that number if there is one."""
        end = max((piece.offset + piece.nbytes for piece in self.values()), default=0)
        offset = self[number].offset if number in self else -(-end // ALIGNMENT) * ALIGNMENT
        with self.path.open("r+b" if self else "wb") as stream:
            stream.seek(offset)
            stream.write(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
        self[number] = Piece(offset, tuple(tensor.shape), tensor.dtype)

    def take(self, number: int) -> Tensor:
        """A tensor of its own mapping: it takes memory only while it is held, and changing it leaves the file alone."""
        piece = self[number]
        raw = np.memmap(self.path, np.uint8, "c", piece.offset, (piece.nbytes,))
        return torch.from_numpy(raw).view(piece.dtype).view(piece.shape)


class Held(dict[int, Tensor]):
    """Tensors in memory, by number."""

    def put(self, number: int, tensor: Tensor) -> None:
        """Keep a tensor."""
        self[number] = tensor

    def take(self, number: int) -> Tensor:
        """The tensor itself."""
        return self[number]


class Activations:
    """The hidden states of one stream, batch by batch: the inputs and the outputs of the current block.

    Args:
        name: of its files.
        folder: where they go; None if all is to stay in memory.
        limit: bytes of one generation (what enters a block) that may stay in memory.
        keep: whether what entered is needed after it has left.
    """

    def __init__(
        self, name: str = "hidden", folder: Path | None = None, limit: float = float("inf"), keep: bool = False
    ) -> None:
        self.name, self.folder, self.keep = name, folder, keep
        self.limit = float("inf") if folder is None else limit
        self.generation = 0
        self._entered: Held | Filed = Held()
        self._left: Held | Filed = Held()

    def append(self, tensor: Tensor) -> None:
        """Store the input of the first block for one more batch."""
        number = len(self._entered)
        self._entered.put(number, tensor)
        if isinstance(self._entered, Held) and sum(held.nbytes for held in self._entered.values()) > self.limit:
            self._entered, self._left = self._to_file(self._entered, 0), self._filed(1)

    def entered(self, number: int) -> Tensor:
        """Input of the current block."""
        return self._entered.take(number)

    def newest(self, number: int) -> Tensor:
        """Output of the current block, or its input if there is no output yet."""
        return (self._left if number in self._left else self._entered).take(number)

    def put(self, number: int, tensor: Tensor) -> None:
        """Store the output of the current block for one batch."""
        self._left.put(number, tensor)
        if isinstance(self._entered, Held) and not self.keep:
            self._entered.pop(number, None)

    def turn(self) -> None:
        """Go to the next block: the outputs become its inputs."""
        old, self._entered = self._entered, self._left
        self.generation += 1
        self._left = Held()
        if isinstance(old, Filed):
            old.path.unlink(missing_ok=True)
            self._left = self._filed(self.generation + 1)

    def save(self) -> dict[str, Any]:
        """Make the outputs of the current block durable, in a file of their own; returns what `load` needs."""
        left = self._left
        filed = self._to_file(left, self.generation + 1) if isinstance(left, Held) else left
        sync(filed.path)
        pieces = [[piece.offset, list(piece.shape), str(piece.dtype)[6:]] for _, piece in sorted(filed.items())]
        return {"file": filed.path.name, "sha256": sha256(filed.path), "pieces": pieces}

    def load(self, saved: dict[str, Any], generation: int, sizes: Sequence[int]) -> None:
        """Restore the inputs of a later block, in place of those of the first, from the outputs that `save` wrote.

        Args:
            saved: the return value of `save`.
            generation: number of the later block.
            sizes: sequences in every batch; one that was saved may make several.
        """
        filed = Filed(self._path(saved["file"]))
        left = iter(sizes)
        for offset, shape, dtype in saved["pieces"]:
            piece = Piece(offset, tuple(shape), getattr(torch, dtype))
            while piece.shape[0]:
                filed[len(filed)], piece = piece.cut(next(left))
        self.generation = generation
        if sum(piece.nbytes for piece in filed.values()) > self.limit:
            self._entered, self._left = filed, self._filed(generation + 1)
        else:
            self._entered, self._left = Held({n: filed.take(n).clone() for n in filed}), Held()

    def _to_file(self, held: Held, generation: int) -> Filed:
        filed = self._filed(generation)
        for number, tensor in sorted(held.items()):
            filed.put(number, tensor)
        return filed

    def _filed(self, generation: int) -> Filed:
        return Filed(self._path(f"{self.name}-{generation:05d}.bin"))

    def _path(self, file: str) -> Path:
        assert self.folder is not None
        return self.folder / file
