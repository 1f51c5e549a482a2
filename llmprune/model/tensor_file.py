"""A safetensors file as bytes: header and tensors are copied as they stand, one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmprune.errors import InputError
from llmprune.model.header import parse_header, read_header
from llmprune.model.reader import TORCH_DTYPES
from llmprune.runtime.foreign import open_regular, reading
from llmprune.runtime.mapped import release_pages

COPY_AGAIN = "the file is damaged; copy it again, or make it again"
PIECE = 64 * 2**20
"""Bytes that are copied at a time."""
Part = tuple[str, tuple[int, ...], int]
"""Dtype, shape and size in bytes of a tensor to write."""


class TensorFile:
    """A safetensors file as bytes.

    Raises:
        InputError: it is not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(f"{path} is not a whole safetensors file", COPY_AGAIN), open_regular(path) as stream:
            self.header, self.metadata, self.fields = read_header(stream)

    def read(self, name: str) -> Tensor:
        """The bytes of a tensor, uint8, in memory."""
        field = self.fields[name]
        data = np.fromfile(self.path, np.uint8, field.nbytes, offset=8 + len(self.header) + field.start)
        return torch.from_numpy(data)

    def pieces(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor, a few at a time."""
        field, at = self.fields[name], 0
        with open_regular(self.path) as stream:
            stream.seek(8 + len(self.header) + field.start)
            while at < field.nbytes:
                piece = stream.read(min(PIECE, field.nbytes - at))
                if not piece:
                    raise InputError(f"{self.path} has become shorter", COPY_AGAIN)
                at += len(piece)
                yield piece


def header_of(metadata: Mapping[str, str], parts: Mapping[str, Part]) -> bytes:
    """The header of a file whose tensors lie one behind the other, filled up to whole eights of bytes."""
    made: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, (dtype, shape, nbytes) in parts.items():
        made[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(made, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def write_file(path: Path, header: bytes, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a safetensors file tensor by tensor, in any order."""
    _, fields = parse_header(header)
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for name, tensor in tensors:
            stream.seek(8 + len(header) + fields[name].start)
            data = tensor.contiguous().flatten().view(torch.uint8)
            for start in range(0, len(data), PIECE):
                stream.write(data[start : start + PIECE].numpy().data)
                release_pages(data)


def join_files(sources: Iterable[Path], target: Path) -> None:
    """Write the tensors of several files as one, in the order of safetensors: wide elements first, then by name.

    So every tensor is aligned.

    Raises:
        InputError: a file is not whole.
    """
    files = {name: file for file in map(TensorFile, sources) for name in file.fields}
    fields = {name: file.fields[name] for name, file in files.items()}
    order = sorted(fields, key=lambda name: (-fields[name].bits, name))
    parts = {name: (fields[name].dtype, fields[name].shape, fields[name].nbytes) for name in order}
    header = header_of({"format": "pt"}, parts)
    with target.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            stream.writelines(files[name].pieces(name))


def save_one(name: str, tensor: Tensor, target: Path) -> None:
    """Write a file of one tensor, as safetensors writes it; a tensor in a mapped file is never in memory as a whole."""
    dtype = next(word for word, known in TORCH_DTYPES.items() if known == tensor.dtype)
    header = header_of({"format": "pt"}, {name: (dtype, tuple(tensor.shape), tensor.nbytes)})
    write_file(target, header, [(name, tensor)])
