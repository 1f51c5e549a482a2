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

from torch import Tensor

from llmprune.errors import InputError
from llmprune.export.packed_forms import FORMS, Form
from llmprune.export.positions import decode, encode, fits, nm_of, shapes
from llmprune.model.header import Field, parse_header
from llmprune.model.reader import TORCH_DTYPES, read_unusual
from llmprune.model.tensor_file import COPY_AGAIN, Part, TensorFile, header_of, write_file
from llmprune.pruning.pattern import SparsityPattern, parse_pattern
from llmprune.runtime.files import sha256
from llmprune.runtime.foreign import about, parse_json, reading

FORMAT = "llmprune-packed"
VERSIONS = ("1", "2")
"""Those that are read; a file has the lowest that knows all of its forms."""
VALUES, POSITIONS = ".values", ".positions"
MOST_GROWTH = 64
"""The largest number of weights for each stored value: what a small file claims to hold must not fill the memory."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of a plain file that are packed, and the tensors that store them.

    Args:
        pattern: of the packed weights.
        plain: the header of the plain file.
        forms: of every packed weight, by the name of its tensor.
    """

    pattern: SparsityPattern
    plain: dict[str, Field]
    forms: dict[str, Form]

    def obstacle(self, name: str) -> str:
        """Why a tensor cannot be packed, whatever its values, or ''."""
        if obstacle := self.forms[name].obstacle(self.plain[name]):
            return obstacle
        n, m = nm_of(self.pattern)
        if m > MOST_GROWTH * (m - n):
            return f"{self.pattern.name} would unpack to more than {MOST_GROWTH} times the values"
        if taken := {name + VALUES, name + POSITIONS} & self.plain.keys():
            return f"the file has another tensor {taken.pop()!r}"
        return self.pattern.mismatch(*self.shape(name))

    def shape(self, name: str) -> tuple[int, int]:
        """The shape of a weight, `(out, in)`."""
        return self.forms[name].shape(self.plain[name])

    def encode(self, name: str, data: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors that store a packed weight, of the bytes of that of the plain file."""
        form = self.forms[name]
        values, positions = encode(form.integers(self.plain[name], data), self.pattern)
        yield from zip(self.parts(name), (form.stored(values), positions), strict=True)

    def decode(self, name: str, values: Tensor, positions: Tensor) -> Tensor:
        """The inverse of `encode`, bytes of bytes.

        Raises:
            ValueError: the positions are damaged.
        """
        form = self.forms[name]
        (_, kept), places = shapes(self.pattern, *self.shape(name))
        found = form.values(self.plain[name], values, kept)
        return form.data(decode(found, positions.view(places), self.pattern))

    def parts(self, name: str) -> dict[str, Part]:
        """The tensors that store one of the plain file."""
        field = self.plain[name]
        if name not in self.forms:
            return {name: (field.dtype, field.shape, field.nbytes)}
        (rows, kept), positions = shapes(self.pattern, *self.shape(name))
        return {
            name + VALUES: self.forms[name].part(field, rows, kept),
            name + POSITIONS: ("U8", positions, prod(positions)),
        }

    def sizes(self, name: str) -> tuple[int, int]:
        """Bytes of a tensor, in the plain file and in the packed one."""
        return self.plain[name].nbytes, sum(nbytes for *_, nbytes in self.parts(name).values())

    def all_parts(self) -> dict[str, Part]:
        """All tensors of the packed file; wide elements first, so that every one is aligned."""
        parts = {key: part for name in self.plain for key, part in self.parts(name).items()}
        return dict(sorted(parts.items(), key=lambda item: -(item[1][2] // max(prod(item[1][1]), 1))))

    def header(self, file: TensorFile) -> bytes:
        """The header of the packed file."""
        metadata = {
            "format": FORMAT,
            "version": str(max((form.version for form in self.forms.values()), default=1)),
            "pattern": self.pattern.name,
            "packed": json.dumps({name: form.name for name, form in self.forms.items()}),
            "header": file.header.decode(),
            "sha256": sha256(file.path),
        }
        return header_of(metadata, self.all_parts())


def pack_file(
    source: Path, target: Path, pattern: SparsityPattern, forms: Mapping[str, Form]
) -> tuple[Layout, dict[str, str]]:
    """Write the packed form of a safetensors file.

    Args:
        source: the plain file.
        target: the packed one.
        pattern: of the weights.
        forms: of every weight to pack, by the name of its tensor; the file may lack some.

    Returns:
        The layout of the packed file, and why the others of `forms` are stored unpacked.
    """
    file = TensorFile(source)
    asked = Layout(pattern, file.fields, {name: form for name, form in forms.items() if name in file.fields})
    plainly = {}
    for name, form in asked.forms.items():
        reason = asked.obstacle(name)
        if not reason and not fits(form.integers(file.fields[name], file.read(name)), pattern):
            reason = f"its zeros do not fit {pattern.name}"
        if reason:
            plainly[name] = reason
    layout = Layout(pattern, file.fields, {n: form for n, form in asked.forms.items() if n not in plainly})

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in layout.plain:
            data = file.read(name)
            if name in layout.forms:
                yield from layout.encode(name, data)
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
        if metadata.get("format") != FORMAT or metadata.get("version") not in VERSIONS:
            raise InputError(
                f"{path} has format {metadata.get('format')!r} version {metadata.get('version')!r}, "
                f"this llmprune reads {FORMAT!r} versions {' and '.join(VERSIONS)}",
                "use the version of llmprune that packed it",
            )
        with reading(f"{path} is not a whole packed file", COPY_AGAIN):
            self.header, self.sha256 = metadata["header"], metadata["sha256"]
            with about(path):
                pattern = parse_pattern(metadata["pattern"])
            forms = {name: FORMS[form] for name, form in parse_json(metadata["packed"]).items()}
            _, plain = parse_header(self.header)
            if pattern.nm is None:
                raise ValueError(f"the pattern {pattern.name} is not N:M")
            self.layout = Layout(pattern, plain, forms)
            self._check()

    def _check(self) -> None:
        """Check that the tensors of the file are those of its layout."""
        layout = self.layout
        for name in layout.forms:
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
        if name not in self.layout.forms:
            return self.file.read(name)
        try:
            return self.layout.decode(name, *(self.file.read(part) for part in self.layout.parts(name)))
        except ValueError as error:
            raise InputError(f"tensor {name!r} of {self.file.path} holds {error}", COPY_AGAIN) from error

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
