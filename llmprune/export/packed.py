"""Packed shards: safetensors files in which N:M weights are kept values and positions.

The format stands in docs/guides/packed-folders.md. A packed file knows the header of the plain one as it stood, and its
hash, so that the plain file comes back byte for byte. Tensors are handled as bytes, one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from llmprune.errors import InputError
from llmprune.export.positions import BITS, decode, encode, fits, nm_of, shapes
from llmprune.model.header import Field, parse_header
from llmprune.model.reader import TORCH_DTYPES, read_unusual
from llmprune.model.tensor_file import COPY_AGAIN, Part, TensorFile, header_of, write_file
from llmprune.pruning.pattern import SparsityPattern, parse_pattern
from llmprune.runtime.files import sha256
from llmprune.runtime.foreign import about, parse_json, reading

FORMAT = "llmprune-packed"
VERSION = "1"
VALUES, POSITIONS = ".values", ".positions"
MOST_GROWTH = 64
"""The largest number of weights for each stored value: what a small file claims to hold must not fill the memory."""
_ORDERS = {"out,in": False, "in,out": True}


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of a plain file that are packed, and the tensors that store them.

    Args:
        pattern: of the packed weights.
        plain: the header of the plain file.
        transposed: of every packed weight, whether it is stored as `(in, out)`.
    """

    pattern: SparsityPattern
    plain: dict[str, Field]
    transposed: dict[str, bool]

    def obstacle(self, name: str) -> str:
        """Why a tensor cannot be packed, whatever its values, or ''."""
        field = self.plain[name]
        if field.itemsize not in BITS or len(field.shape) != 2 or not field.nbytes:
            return f"{field.dtype} of shape {field.shape} has no whole bytes to store"
        n, m = nm_of(self.pattern)
        if m > MOST_GROWTH * (m - n):
            return f"{self.pattern.name} would unpack to more than {MOST_GROWTH} times the values"
        if taken := {name + VALUES, name + POSITIONS} & self.plain.keys():
            return f"the file has another tensor {taken.pop()!r}"
        return self.pattern.mismatch(*self.shape(name))

    def shape(self, name: str) -> tuple[int, int]:
        """The shape of a weight, `(out, in)`."""
        rows, width = self.plain[name].shape
        return (width, rows) if self.transposed[name] else (rows, width)

    def bits(self, name: str, data: Tensor) -> Tensor:
        """The bits of a weight as integers, `(out, in)`."""
        field = self.plain[name]
        bits = data.view(BITS[field.itemsize]).view(field.shape)
        return bits.T.contiguous() if self.transposed[name] else bits

    def parts(self, name: str) -> dict[str, Part]:
        """The tensors that store one of the plain file."""
        field = self.plain[name]
        if name not in self.transposed:
            return {name: (field.dtype, field.shape, field.nbytes)}
        values, positions = shapes(self.pattern, *self.shape(name))
        return {
            name + VALUES: (field.dtype, values, prod(values) * field.itemsize),
            name + POSITIONS: ("U8", positions, prod(positions)),
        }

    def all_parts(self) -> dict[str, Part]:
        """All tensors of the packed file; wide elements first, so that every one is aligned."""
        parts = {key: part for name in self.plain for key, part in self.parts(name).items()}
        return dict(sorted(parts.items(), key=lambda item: -(item[1][2] // max(prod(item[1][1]), 1))))

    def header(self, file: TensorFile) -> bytes:
        """The header of the packed file."""
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "pattern": self.pattern.name,
            "packed": json.dumps({name: "in,out" if flag else "out,in" for name, flag in self.transposed.items()}),
            "header": file.header.decode(),
            "sha256": sha256(file.path),
        }
        return header_of(metadata, self.all_parts())


def pack_file(
    source: Path, target: Path, pattern: SparsityPattern, transposed: Mapping[str, bool]
) -> tuple[Layout, dict[str, str]]:
    """Write the packed form of a safetensors file.

    Args:
        source: the plain file.
        target: the packed one.
        pattern: of the weights.
        transposed: of every weight to pack, whether it is stored as `(in, out)`.

    Returns:
        The layout of the packed file, and why the others of `transposed` are stored unpacked.
    """
    file = TensorFile(source)
    asked = Layout(pattern, file.fields, {name: flag for name, flag in transposed.items() if name in file.fields})
    plainly = {}
    for name in asked.transposed:
        reason = asked.obstacle(name)
        if not reason and not fits(asked.bits(name, file.read(name)), pattern):
            reason = f"its zeros do not fit {pattern.name}"
        if reason:
            plainly[name] = reason
    layout = Layout(pattern, file.fields, {n: flag for n, flag in asked.transposed.items() if n not in plainly})

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in layout.plain:
            data = file.read(name)
            if name in layout.transposed:
                yield from zip(layout.parts(name), encode(layout.bits(name, data), pattern), strict=True)
            else:
                yield name, data

    write_file(target, layout.header(file), tensors())
    return layout, plainly


class PackedFile:
    """A packed file, read one tensor at a time.

    Raises:
        InputError: it is damaged, or not packed.
    """

    def __init__(self, path: Path) -> None:
        self.file = TensorFile(path)
        metadata = self.file.metadata
        if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
            raise InputError(
                f"{path} has format {metadata.get('format')!r} version {metadata.get('version')!r}, "
                f"this llmprune reads {FORMAT!r} version {VERSION!r}",
                "use the version of llmprune that packed it",
            )
        with reading(f"{path} is not a whole packed file", COPY_AGAIN):
            self.header, self.sha256 = metadata["header"], metadata["sha256"]
            with about(path):
                pattern = parse_pattern(metadata["pattern"])
            transposed = {name: _ORDERS[order] for name, order in parse_json(metadata["packed"]).items()}
            _, plain = parse_header(self.header)
            if pattern.nm is None:
                raise ValueError(f"the pattern {pattern.name} is not N:M")
            self.layout = Layout(pattern, plain, transposed)
            self._check()

    def _check(self) -> None:
        """Check that the tensors of the file are those of its layout."""
        layout = self.layout
        for name in layout.transposed:
            if obstacle := layout.obstacle(name):
                raise ValueError(f"{name!r}: {obstacle}")
        found = {name: (f.dtype, f.shape, f.nbytes) for name, f in self.file.fields.items()}
        if found != (wanted := layout.all_parts()):
            name = min(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
            raise ValueError(f"tensor {name!r} is {found.get(name)}, but should be {wanted.get(name)}")

    def read(self, name: str) -> Tensor:
        """The bytes of a tensor of the plain file, unpacked, uint8.

        Raises:
            InputError: its positions are damaged.
        """
        if name not in self.layout.transposed:
            return self.file.read(name)
        values, positions = (self.file.read(part) for part in self.layout.parts(name))
        (_, shape, _), (_, packed_shape, _) = self.layout.parts(name).values()
        values = values.view(BITS[self.layout.plain[name].itemsize]).view(shape)
        try:
            bits = decode(values, positions.view(packed_shape), self.layout.pattern)
        except ValueError as error:
            raise InputError(f"tensor {name!r} of {self.file.path} holds {error}", COPY_AGAIN) from error
        return (bits.T if self.layout.transposed[name] else bits).contiguous().view(torch.uint8).flatten()

    def tensor(self, name: str) -> Tensor:
        """A tensor of the plain file.

        Raises:
            InputError: its positions are damaged.
        """
        field = self.layout.plain[name]
        if not field.itemsize:
            with reading(f"tensor {name!r} of {self.file.path} cannot be read", COPY_AGAIN):
                return read_unusual(self.file.path, name)
        return self.read(name).view(TORCH_DTYPES[field.dtype]).view(field.shape)

    def unpack(self, target: Path) -> None:
        """Write the plain file.

        Raises:
            InputError: its hash differs from that of the file that was packed.
        """
        write_file(target, self.header.encode(), ((name, self.read(name)) for name in self.layout.plain))
        if (found := sha256(target)) != self.sha256:
            raise InputError(
                f"{self.file.path} unpacks to sha256 {found[:12]}, but {self.sha256[:12]} was packed", COPY_AGAIN
            )
