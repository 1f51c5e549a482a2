"""Forms in which tensors store floating-point weights in fewer bits, and what they mean; each is made when it is read.

FP8: `w = q s`, an element in float8 times the scale of its block; the last blocks of a matrix may be smaller. MXFP4
(OCP Microscaling Formats 1.0): 32 values of e2m1 share the scale `2^(e - 127)`; so do the experts of DeepSeek-V4, whose
other matrices are FP8. Integers of compressed-tensors: `w = q s`, with a scale for every group of inputs of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from llmprune.model.compressed_tensors import unpack
from llmprune.model.quantization import Block
from llmprune.model.reader import SafetensorsFolder

PART = 2**20
"""Elements that are in float32 at the same time."""
GROUP = 32
"""Values of MXFP4 that share a scale."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of four bits."""


class Group(Protocol):
    """Tensors on disk that are one tensor of floating point."""

    @property
    def names(self) -> tuple[str, ...]:
        """Theirs."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what they mean."""
        ...

    def read(self, raw: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """What they mean."""
        ...

    def rows(self, raw: SafetensorsFolder, start: int, stop: int) -> tuple[Group, Mapping[str, Tensor]] | None:
        """A part of them along the first dimension, of which each is a whole matrix, and its tensors; None if not."""
        ...


@dataclass(frozen=True, slots=True)
class Scaled:
    """Matrices in float8, or of two values of four bits a byte, and a scale for every block of them.

    Args:
        values, scales: names on disk.
        shape: of what they mean, `(..., out, in)`.
        block: its rows and columns.
    """

    values: str
    scales: str
    shape: tuple[int, ...]
    block: Block

    @property
    def names(self) -> tuple[str, ...]:
        """On disk."""
        return self.values, self.scales

    @property
    def _grid(self) -> tuple[int, ...]:
        """Rows and columns of the scales of one matrix."""
        return tuple(-(-size // part) for size, part in zip(self.shape[-2:], self.block, strict=True))

    def rows(self, raw: SafetensorsFolder, start: int, stop: int) -> tuple[Group, Mapping[str, Tensor]] | None:
        """Some of its matrices."""
        if len(self.shape) != 3:
            return None
        shared = prod(raw.entries[self.scales].shape) == prod(self._grid)
        scales = raw[self.scales] if shared else raw.rows(self.scales, start, stop)
        part = replace(self, shape=(stop - start, *self.shape[1:]))
        return part, {self.values: raw.rows(self.values, start, stop), self.scales: scales}

    def read(self, raw: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """`q s`, computed in float32."""
        grid = self._grid
        scales = _floats(raw[self.scales])
        single = (1,) * (len(self.shape) - 2)
        scales = scales.view(*(single if scales.numel() == prod(grid) else self.shape[:-2]), *grid)
        scales = scales.expand(*self.shape[:-2], *grid).reshape(-1, *grid)
        made = torch.empty(self.shape, dtype=dtype)
        matrices = (tensor.view(-1, *tensor.shape[-2:]) for tensor in (raw[self.values], made))
        for values, result, scale in zip(*matrices, scales, strict=True):
            _multiply(values, scale, self.block, result)
        return made


def _floats(scales: Tensor) -> Tensor:
    """Scales in float32."""
    if scales.dtype == torch.uint8:
        return torch.exp2(scales.float() - 127)
    return scales.float()


def _numbers(values: Tensor) -> Tensor:
    """Values in float32; of a byte those of the low bits come first."""
    if values.dtype not in (torch.int8, torch.uint8):
        return values.float()
    bits = values.view(torch.uint8)
    return torch.tensor(E2M1)[torch.stack((bits & 15, bits >> 4), -1).int()].flatten(-2)


def _multiply(values: Tensor, scales: Tensor, block: Block, result: Tensor) -> None:
    """Write the product of a matrix and its scales, some rows at a time.

    Args:
        values: float8, `(out, in)`, or bytes, `(out, in / 2)`.
        scales: float32, `(ceil(out / block[0]), ceil(in / block[1]))`.
        block: rows and columns that share a scale.
        result: `(out, in)`.
    """
    rows, width = result.shape
    step = max(PART // max(width, 1), 1)
    for at in range(0, rows, step):
        end = min(at + step, rows)
        factors = scales[torch.arange(at, end) // block[0]]
        if scales.shape[1] > 1:
            factors = factors.repeat_interleave(block[1], dim=1)[:, :width]
        result[at:end] = _numbers(values[at:end]) * factors


@dataclass(frozen=True, slots=True)
class Packed:
    """The weights of experts in MXFP4, stored with the inputs last and used with the outputs last.

    Args:
        blocks: name of two values a byte, the first in the low bits, `(experts, out, in / 32, 16)`.
        scales: name of the exponents, `(experts, out, in / 32)`.
        shape: `(experts, in, out)`.
    """

    blocks: str
    scales: str
    shape: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """On disk."""
        return self.blocks, self.scales

    def rows(self, raw: SafetensorsFolder, start: int, stop: int) -> tuple[Group, Mapping[str, Tensor]] | None:
        """Some of the experts."""
        part = replace(self, shape=(stop - start, *self.shape[1:]))
        return part, {name: raw.rows(name, start, stop) for name in self.names}

    def read(self, raw: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The values times their scales, computed in float32, expert by expert."""
        _, inputs, outputs = self.shape
        made = torch.empty(self.shape, dtype=dtype)
        step = max(PART // max(inputs, 1), 1)
        for packed, exponents, result in zip(raw[self.blocks], raw[self.scales], made, strict=True):
            for at in range(0, outputs, step):
                values = _numbers(packed[at : at + step])
                values *= _floats(exponents[at : at + step])[..., None]
                result[:, at : at + step] = values.view(-1, inputs).T
        return made


@dataclass(frozen=True, slots=True)
class Words:
    """A matrix of integers in 32-bit words, and a scale for every group of inputs of a row.

    Args:
        words: name of the words, int32, `(out, in · bits / 32)`.
        scales: name of the scales, `(out, groups)`.
        beside: name of the matrix's shape, which the words say as well.
        shape: `(out, in)`.
        bits: of an integer.
    """

    words: str
    scales: str
    beside: str
    shape: tuple[int, ...]
    bits: int

    @property
    def names(self) -> tuple[str, ...]:
        """On disk."""
        return self.words, self.scales, self.beside

    def rows(self, raw: SafetensorsFolder, start: int, stop: int) -> tuple[Group, Mapping[str, Tensor]] | None:
        """None: a matrix is read as a whole."""
        return None

    def read(self, raw: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """`q s`, computed in float32."""
        scales = raw[self.scales].float()
        codes = unpack(raw[self.words], self.bits).view(len(scales), scales.shape[1], -1)
        return (codes * scales[..., None]).view(self.shape).to(dtype)
