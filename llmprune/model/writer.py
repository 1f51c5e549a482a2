"""Shard-by-shard writer of safetensors folders larger than memory; every file is written atomically."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llmprune.errors import PruneError
from llmprune.model.reader import INDEX, SINGLE
from llmprune.runtime.files import replacing, sha256, write_json
from llmprune.runtime.ownership import delete

SHARD_BYTES = 2 * 2**30


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
        shards: those that were written before.
    """

    def __init__(self, folder: Path, shards: Iterable[Shard] = ()) -> None:
        self.folder = folder
        self.shards = list(shards)
        self._written = {name for shard in self.shards for name in shard.tensors}

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(shard.nbytes for shard in self.shards)

    def write(self, tensors: Iterable[tuple[str, Tensor]], limit: int = SHARD_BYTES) -> None:
        """Write tensors as one shard, or as several where they exceed `limit` bytes; a name only the first time."""
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
        path = self.folder / f"shard-{len(self.shards) + 1:05d}.safetensors"
        try:
            with replacing(path) as temporary:
                save_file(shard, temporary, metadata={"format": "pt"})
            nbytes = sum(tensor.nbytes for tensor in shard.values())
            self.shards.append(Shard(path.name, list(shard), nbytes, sha256(path)))
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
