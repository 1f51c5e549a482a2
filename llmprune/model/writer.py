"""Writer of safetensors folders larger than memory: shard by shard, then joined; every file is written atomically."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llmprune.errors import PruneError
from llmprune.model.reader import INDEX, SINGLE, TORCH_DTYPES
from llmprune.model.tensor_file import join_files, save_one
from llmprune.runtime.files import replacing, sha256, write_json
from llmprune.runtime.mapped import release_pages
from llmprune.runtime.ownership import delete

HELD_BYTES = 2 * 2**30
"""The most bytes of tensors that are held until they are written, unless one alone is larger."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A written shard: file name, names and bytes of its tensors, SHA-256 of the file."""

    file: str
    tensors: list[str]
    nbytes: int
    sha256: str


class ShardWriter:
    """Writes a Hugging Face folder shard by shard, each one atomically.

    Args:
        folder: an existing folder.
        limit: the most bytes of tensors in a shard that holds more than one.
        shards: those that were written before.
    """

    def __init__(self, folder: Path, limit: int, shards: Iterable[Shard] = ()) -> None:
        self.folder, self.limit = folder, limit
        self.shards = list(shards)
        self._written = {name for shard in self.shards for name in shard.tensors}

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(shard.nbytes for shard in self.shards)

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write tensors as one shard, or as several where they are too many to be held; a name only the first time."""
        limit = min(self.limit, HELD_BYTES)
        shard: dict[str, Tensor] = {}
        size = 0
        for name, tensor in tensors:
            if name in self._written:
                continue
            self._written.add(name)
            if shard and size + tensor.nbytes > limit:
                self._save(shard)
                shard, size = {}, 0
            shard[name] = tensor
            size += tensor.nbytes
        if shard:
            self._save(shard)

    def _save(self, shard: dict[str, Tensor]) -> None:
        nbytes = sum(tensor.nbytes for tensor in shard.values())
        file = f"shard-{len(self.shards) + 1:05d}.safetensors"
        self.shards.append(self._durable(file, list(shard), nbytes, partial(_save_tensors, shard)))

    def join(self) -> Iterator[list[str]]:
        """Join neighbouring shards as far as the limit allows, by copying their bytes; the same when repeated.

        Yields:
            the files that a joined shard replaces, once it is durable; they are left to the caller.
        """
        at = 0
        while at < len(self.shards):
            sizes = itertools.accumulate(shard.nbytes for shard in self.shards[at:])
            parts = self.shards[at : at + sum(size <= self.limit for size in sizes)]
            at += 1
            if len(parts) > 1:
                files = [part.file for part in parts]
                self.shards[at - 1 : at - 1 + len(parts)] = [self._joined(at, parts)]
                yield files

    def _joined(self, number: int, parts: list[Shard]) -> Shard:
        tensors = [name for part in parts for name in part.tensors]
        paths = [self.folder / part.file for part in parts]
        nbytes = sum(part.nbytes for part in parts)
        return self._durable(f"joined-{number:05d}.safetensors", tensors, nbytes, lambda new: join_files(paths, new))

    def _durable(self, file: str, tensors: list[str], nbytes: int, write: Callable[[Path], None]) -> Shard:
        """A shard that is durable under its name.

        Raises:
            PruneError: it cannot be written.
        """
        path = self.folder / file
        try:
            with replacing(path) as temporary:
                write(temporary)
            return Shard(file, tensors, nbytes, sha256(path))
        except (OSError, SafetensorError) as error:
            raise PruneError(
                f"cannot write {path}: {error}",
                "free disk space and run the same command again, or choose another --out",
            ) from error

    def final_names(self) -> list[str]:
        """The names of the shards in a complete folder."""
        total = len(self.shards)
        return [SINGLE] if total == 1 else [f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]

    def seal(self) -> None:
        """Give the shards their final names and write the index."""
        weight_map, total = {}, len(self.shards)
        for shard, final in zip(self.shards, self.final_names(), strict=True):
            os.replace(self.folder / shard.file, self.folder / final)
            weight_map.update(dict.fromkeys(shard.tensors, final))
        if total > 1:
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.folder / INDEX, index)

    def unseal(self) -> None:
        """Undo a `seal` that may have been interrupted; files that are no shards are removed."""
        for shard, final in zip(self.shards, self.final_names(), strict=True):
            if (self.folder / final).exists():
                os.replace(self.folder / final, self.folder / shard.file)
        for path in self.folder.iterdir():
            if path.name not in {shard.file for shard in self.shards}:
                delete(path)


def _save_tensors(shard: dict[str, Tensor], path: Path) -> None:
    ((name, tensor), *others) = shard.items()
    if not others and tensor.dtype in TORCH_DTYPES.values():
        save_one(name, tensor, path)
        return
    save_file(shard, path, metadata={"format": "pt"})
    for tensor in shard.values():
        release_pages(tensor)
