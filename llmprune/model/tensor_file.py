"""A safetensors file as bytes: header and tensors are copied as they stand, one at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmprune.errors import InputError
from llmprune.model.reader import read_header
from llmprune.runtime.foreign import open_regular, parse_json

COPY_AGAIN = "the file is damaged; copy it again, or make it again"
Part = tuple[str, tuple[int, ...], int]
"""Dtype, shape and size in bytes of a tensor to write."""


@dataclass(frozen=True, slots=True)
class Field:
    """The entry of a tensor in a header: dtype in safetensors' spelling, shape, range of bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.stop - self.start

    @property
    def bits(self) -> int:
        """Width of one element by the name of its dtype: `BF16`, `F8_E4M3`, `BOOL`."""
        found = re.search(r"\d+", self.dtype)
        return int(found[0]) if found else 8

    @property
    def itemsize(self) -> int:
        """Bytes of one element; 0 where it is no whole number of them."""
        count = prod(self.shape)
        return self.nbytes // count if count and self.nbytes % count == 0 else 0


def parse_fields(header: str) -> tuple[dict[str, str], dict[str, Field]]:
    """The metadata and the entries of a header, in the order of their bytes.

    Raises:
        ValueError: it is no header, or the tensors are not contiguous.
    """
    try:
        items = parse_json(header, unique=True)
        metadata = items.pop("__metadata__", None) or {}
        found = {name: Field(i["dtype"], tuple(i["shape"]), *i["data_offsets"]) for name, i in items.items()}
        fields = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"its header has the wrong form: {error!r}") from error
    end = 0
    for name, field in fields.items():
        if field.start != end or field.stop < end:
            raise ValueError(f"tensor {name!r} begins at byte {field.start}, the one before it ends at {end}")
        end = field.stop
    return metadata, fields


class TensorFile:
    """A safetensors file as bytes.

    Raises:
        InputError: it is not whole.
    """

    def __init__(self, path: Path) -> None:
        read_header(path)
        self.path = path
        with open_regular(path) as stream:
            length = int.from_bytes(stream.read(8), "little")
            self.header = stream.read(length)
        try:
            self.metadata, self.fields = parse_fields(self.header.decode())
        except ValueError as error:
            raise InputError(f"{path} is not a whole safetensors file: {error}", COPY_AGAIN) from error

    def read(self, name: str) -> Tensor:
        """The bytes of a tensor, uint8, in memory."""
        field = self.fields[name]
        data = np.fromfile(self.path, np.uint8, field.nbytes, offset=8 + len(self.header) + field.start)
        return torch.from_numpy(data)


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
    _, fields = parse_fields(header.decode())
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for name, tensor in tensors:
            stream.seek(8 + len(header) + fields[name].start)
            stream.write(tensor.contiguous().view(torch.uint8).numpy().data)


def join_files(sources: Iterable[Path], target: Path) -> None:
    """Write the tensors of several files as one, in the order of safetensors: wide elements first, then by name.

    So every tensor is aligned. One of them is in memory at a time.

    Raises:
        InputError: a file is not whole.
    """
    files = {name: file for file in map(TensorFile, sources) for name in file.fields}
    fields = {name: file.fields[name] for name, file in files.items()}
    order = sorted(fields, key=lambda name: (-fields[name].bits, name))
    parts = {name: (fields[name].dtype, fields[name].shape, fields[name].nbytes) for name in order}
    write_file(target, header_of({"format": "pt"}, parts), ((name, files[name].read(name)) for name in order))
