"""How a weight lies in a plain file, and how its kept values are stored in a packed one.

A form turns the bytes of a tensor into a matrix of integers `(out, in)` in which 0 stands for a zero weight, and back.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from llmprune.export.positions import BITS
from llmprune.model import compressed_tensors
from llmprune.model.header import Field
from llmprune.model.tensor_file import Part


class Form(Protocol):
    """One way in which weights are stored."""

    @property
    def name(self) -> str:
        """As the metadata of a packed file spell it."""
        ...

    @property
    def version(self) -> int:
        """Of the packed format that has it first."""
        ...

    def obstacle(self, field: Field) -> str:
        """Why a tensor is not in this form, or ''."""
        ...

    def shape(self, field: Field) -> tuple[int, int]:
        """The shape of the weight, `(out, in)`."""
        ...

    def integers(self, field: Field, data: Tensor) -> Tensor:
        """The weight as integers, `(out, in)`, of the bytes of the tensor."""
        ...

    def data(self, integers: Tensor) -> Tensor:
        """The bytes of the tensor, uint8: the inverse of `integers`."""
        ...

    def part(self, field: Field, rows: int, kept: int) -> Part:
        """The tensor that stores the kept values, so many of each row."""
        ...

    def stored(self, values: Tensor) -> Tensor:
        """The kept values `(out, kept)` as they are stored."""
        ...

    def values(self, field: Field, data: Tensor, kept: int) -> Tensor:
        """The kept values, of the bytes of what is `stored`."""
        ...


@dataclass(frozen=True, slots=True)
class Elements:
    """An element of whole bytes for each weight; it is zero only without a bit set, so -0.0 is a value.

    Args:
        transposed: whether the weight is stored as `(in, out)`.
    """

    transposed: bool = False
    version = 1

    @property
    def name(self) -> str:
        """The order of the dimensions."""
        return "in,out" if self.transposed else "out,in"

    def obstacle(self, field: Field) -> str:
        """Why the elements are not matrices of whole bytes."""
        if field.itemsize in BITS and len(field.shape) == 2 and field.nbytes:
            return ""
        return f"{field.dtype} of shape {field.shape} has no whole bytes to store"

    def shape(self, field: Field) -> tuple[int, int]:
        """`(out, in)`."""
        rows, width = field.shape
        return (width, rows) if self.transposed else (rows, width)

    def integers(self, field: Field, data: Tensor) -> Tensor:
        """The bits of every element."""
        bits = data.view(BITS[field.itemsize]).view(field.shape)
        return bits.T.contiguous() if self.transposed else bits

    def data(self, integers: Tensor) -> Tensor:
        """The elements in their order in the file."""
        return (integers.T if self.transposed else integers).contiguous().view(torch.uint8).flatten()

    def part(self, field: Field, rows: int, kept: int) -> Part:
        """The kept elements, in the dtype of the weight."""
        return field.dtype, (rows, kept), rows * kept * field.itemsize

    def stored(self, values: Tensor) -> Tensor:
        """As they are."""
        return values

    def values(self, field: Field, data: Tensor, kept: int) -> Tensor:
        """As they are."""
        return data.view(BITS[field.itemsize]).view(-1, kept)


@dataclass(frozen=True, slots=True)
class Codes:
    """Integers in 32-bit words, as compressed-tensors packs them; their scales are a tensor of their own.

    Args:
        bits: of an integer, 4 or 8.
    """

    bits: int
    version = 2

    @property
    def name(self) -> str:
        """`int4` or `int8`."""
        return f"int{self.bits}"

    def obstacle(self, field: Field) -> str:
        """Why there are no matrices of words."""
        if field.dtype == "I32" and len(field.shape) == 2 and field.nbytes:
            return ""
        return f"{field.dtype} of shape {field.shape} has no words of {self.name}"

    def shape(self, field: Field) -> tuple[int, int]:
        """`(out, in)`."""
        rows, words = field.shape
        return rows, words * compressed_tensors.WORD // self.bits

    def integers(self, field: Field, data: Tensor) -> Tensor:
        """The codes, int8."""
        return compressed_tensors.unpack(data.view(torch.int32).view(field.shape), self.bits)

    def data(self, integers: Tensor) -> Tensor:
        """The words."""
        return compressed_tensors.pack(integers, self.bits).view(torch.uint8).flatten()

    def part(self, field: Field, rows: int, kept: int) -> Part:
        """The kept codes in two's complement, in whole bytes a row."""
        shape = rows, -(-kept * self.bits // 8)
        return "U8", shape, prod(shape)

    def stored(self, values: Tensor) -> Tensor:
        """Codes `(out, kept)`, int8, as bytes: of two in a byte the first lies in the low bits."""
        codes = values.view(torch.uint8)
        if self.bits == 8:
            return codes
        even = torch.nn.functional.pad(codes & 15, (0, codes.shape[1] % 2))
        return even[:, 0::2] | (even[:, 1::2] << 4)

    def values(self, field: Field, data: Tensor, kept: int) -> Tensor:
        """The codes `(out, kept)`, int8."""
        if self.bits == 8:
            return data.view(torch.int8).view(-1, kept)
        pairs = torch.stack((data & 15, data >> 4), dim=-1).view(field.shape[0], -1)[:, :kept]
        return ((pairs ^ 8).view(torch.int8) - 8).contiguous()


FORMS: dict[str, Form] = {form.name: form for form in (Elements(), Elements(transposed=True), Codes(4), Codes(8))}
"""By name."""
