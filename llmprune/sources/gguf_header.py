"""The header of a GGUF file, checked against the size of the file before a library reads it.

Libraries believe the counts in the header: an array of 2^40 elements makes them append until the memory is full.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little endian.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

from llmprune.runtime.foreign import open_regular

MOST_ITEMS = 2**22
"""The largest number of array elements and of tensors that is read; vocabularies have 2^18 tokens."""
SCALINGS = {"scaling.type": (None, "none"), "scaling.factor": (None, 0, 1), "scale_linear": (None, 0, 1)}
"""Settings of rotary frequencies, and the values that change nothing."""
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_BLOCK = re.compile(r"blk\.(\d{1,9})\.")


@dataclass(slots=True)
class GgufHeader:
    """What the header says.

    Args:
        values: the metadata, without arrays.
        shapes: of the tensors by name, innermost dimension first.
        kinds: their types, as numbers of `gguf.GGMLQuantizationType`.
        starts: where in the file their data begins.
    """

    values: dict[str, int | float | bool | str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    starts: dict[str, int] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """Number of weights in all tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def architecture(self) -> str:
        """Its name, or ''."""
        return str(self.values.get("general.architecture", ""))

    def unread_scaling(self) -> str:
        """What scales the rotary frequencies in a way that transformers does not read from GGUF, or ''."""
        if self.architecture == "gpt-oss":
            return ""
        settings = {key: self.values.get(f"{self.architecture}.rope.{key}") for key in SCALINGS}
        found = [f"{key} {value}" for key, value in settings.items() if value not in SCALINGS[key]]
        tensors = [name for name in self.shapes if name.startswith(("rope_freqs.", "rope_factors_"))]
        return next(iter([*found, *tensors]), "")

    def contradiction(self) -> str:
        """The first size that disagrees with what is there, or ''; nothing of that size must be made."""
        prefix = f"{self.architecture}."
        for key, value in self.values.items():
            name = key.removeprefix(prefix)
            counted = name.endswith(("_count", "_count_kv", "_length", "_size")) and not name.endswith("context_length")
            if name != key and counted:
                most = len(self.shapes) if name == "block_count" else self.weights
                if not isinstance(value, int) or not 0 <= value <= most:
                    return f"{key} is {value}, but {len(self.shapes)} tensors hold {self.weights:,} weights"
        blocks = self.values.get(f"{prefix}block_count", 0)
        last = max((int(match[1]) for name in self.shapes if (match := _BLOCK.match(name))), default=-1)
        return f"{prefix}block_count is {blocks}, but there is a block {last}" if last >= int(blocks) else ""


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of a GGUF file.

    Raises:
        OSError: it cannot be read, or is no regular file.
        ValueError: it is no GGUF file, cut short, or its counts cannot be.
    """
    with open_regular(path) as stream:
        if not os.fstat(stream.fileno()).st_size:
            raise ValueError("it is empty")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(data).header()


class _Cursor:
    """Reads values one after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.items = data, 0, 0

    def header(self) -> GgufHeader:
        """The whole header."""
        if self.skip(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version, tensors, pairs = self.number("I"), self.number("Q"), self.number("Q")
        if version not in (2, 3):
            raise ValueError(f"it has version {version}, not 2 or 3")
        found = GgufHeader()
        for _ in range(self.count(pairs, "values")):
            key = self.text()
            if key in found.values:
                raise ValueError(f"it names {key!r} twice")
            value = self.value(self.number("I"))
            if value is not None:
                found.values[key] = value
        ends = [self._tensor(found) for _ in range(self.count(tensors, "tensors"))]
        alignment = found.values.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
            raise ValueError(f"its alignment is {alignment}")
        begin = -(-self.at // alignment) * alignment
        found.starts = {name: begin + offset for name, offset in found.starts.items()}
        needed = begin + max(ends, default=0)
        if needed > len(self.data):
            raise ValueError(f"it has {len(self.data):,} bytes, its header says {needed:,}")
        return found

    def _tensor(self, found: GgufHeader) -> int:
        """Note a tensor; where its data ends, counted from the end of the header."""
        from gguf.constants import GGML_QUANT_SIZES

        name, dimensions = self.text(), self.number("I")
        if name in found.shapes:
            raise ValueError(f"it names tensor {name!r} twice")
        if dimensions > 8:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        kind, offset = self.number("I"), self.number("Q")
        if kind not in GGML_QUANT_SIZES:
            raise ValueError(f"tensor {name!r} has the unknown type {kind}")
        block, size = GGML_QUANT_SIZES[kind]
        found.shapes[name], found.kinds[name], found.starts[name] = shape, kind, offset
        return offset + math.prod(shape) // int(block) * int(size)

    def value(self, kind: int) -> int | float | bool | str | None:
        """A value of the metadata; None for an array, which is passed over."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"it has a value of the unknown type {kind}")
        inner, length = self.number("I"), self.count(self.number("Q"), "array elements")
        if inner in _SCALARS:
            self.skip(length * struct.calcsize(f"<{_SCALARS[inner]}"))
        elif inner == _STRING:
            for _ in range(length):
                self.skip(self.number("Q"))
        else:
            raise ValueError(f"it has an array of the type {inner}")
        return None

    def count(self, number: int, what: str) -> int:
        """A number of things to come, of which there are not too many in the file."""
        self.items += number
        if self.items > MOST_ITEMS:
            raise ValueError(f"it announces {number:,} {what}, more than {MOST_ITEMS:,}")
        return number

    def text(self) -> str:
        """A string."""
        return self.skip(self.number("Q")).decode("utf-8", "backslashreplace")

    def number(self, code: str) -> int:
        """A number of a type of `struct`."""
        size = struct.calcsize(f"<{code}")
        found: int = struct.unpack(f"<{code}", self.skip(size))[0]
        return found

    def skip(self, size: int) -> bytes:
        """The next bytes."""
        if size > len(self.data) - self.at:
            raise ValueError(f"it ends after {len(self.data):,} bytes, in its header")
        self.at += size
        return self.data[self.at - size : self.at]
