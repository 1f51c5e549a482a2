"""The header of a safetensors file, checked before anything of its sizes is made.

Format: eight bytes with the length of a JSON text, the text, the bytes of the tensors without gaps.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import BinaryIO

from llmprune.runtime.foreign import JSON_BYTES, parse_json

MOST_TENSORS = 2**18
"""The largest number of tensors in a file, and in a folder; models of 10^12 parameters have 2^17."""
ELEMENT_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6,
    "F4": 4,
}  # fmt: skip
"""Bits of an element by dtype."""


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
        """Width of one element."""
        return ELEMENT_BITS[self.dtype]

    @property
    def itemsize(self) -> int:
        """Bytes of one element; 0 where it is no whole number of them."""
        return self.bits // 8 if self.bits % 8 == 0 else 0

    def fault(self) -> str:
        """What cannot be, or ''."""
        numbers = (*self.shape, self.start, self.stop)
        if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            return f"has shape {str(list(self.shape))[:80]} at bytes {str([self.start, self.stop])[:80]}"
        if str(self.dtype) not in ELEMENT_BITS:
            return f"has the unknown dtype {str(self.dtype)[:80]!r}"
        if prod(self.shape) * ELEMENT_BITS[self.dtype] != 8 * self.nbytes:
            return f"has {self.nbytes:,} bytes for {self.dtype} of shape {list(self.shape)}"
        return ""


def parse_header(text: str | bytes) -> tuple[dict[str, str], dict[str, Field]]:
    """The metadata and the entries of a header, in the order of their bytes.

    Raises:
        ValueError: it is no header, a size cannot be, or the tensors are not contiguous.
    """
    items = parse_json(text, unique=True)
    try:
        metadata = items.pop("__metadata__", None) or {}
        if len(items) > MOST_TENSORS:
            raise ValueError(f"it names {len(items):,} tensors, the most are {MOST_TENSORS:,}")
        found = {name: Field(i["dtype"], tuple(i["shape"]), *i["data_offsets"]) for name, i in items.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"its header has the wrong form: {error!r}") from error
    if not (isinstance(metadata, Mapping) and all(isinstance(value, str) for value in metadata.values())):
        raise ValueError("its header has the wrong form: metadata that are no texts")
    for name, field in found.items():
        if fault := field.fault():
            raise ValueError(f"tensor {name!r} {fault}")
    fields = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = 0
    for name, field in fields.items():
        if field.start != end:
            raise ValueError(f"tensor {name!r} begins at byte {field.start}, the one before it ends at {end}")
        end = field.stop
    return dict(metadata), fields


def read_header(stream: BinaryIO) -> tuple[bytes, dict[str, str], dict[str, Field]]:
    """The header of an open file: as it stands, its metadata, and its entries; their bytes are what follows, no more.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no safetensors file, or not whole.
    """
    size = os.fstat(stream.fileno()).st_size
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or not 2 <= length <= min(size - 8, JSON_BYTES):
        raise ValueError(f"its header claims {length:,} bytes of {size:,}, the most are {JSON_BYTES:,}")
    text = stream.read(length)
    metadata, fields = parse_header(text)
    end = max((field.stop for field in fields.values()), default=0)
    if 8 + length + end != size:
        raise ValueError(f"it has {size} bytes, its header says {8 + length + end}")
    return text, metadata, fields
