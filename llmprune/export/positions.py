"""Lossless encoding of N:M weights as kept values and their positions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from llmprune.pruning.pattern import SparsityPattern

CHUNK = 2**22
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtype by bytes of an element: only a weight without a bit set is zero, so -0.0 is a value."""


def position_bits(pattern: SparsityPattern) -> int:
    """Bits of a position in a group, `⌈log2 M⌉`."""
    return (nm_of(pattern)[1] - 1).bit_length()


def shapes(pattern: SparsityPattern, rows: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of the values and of the positions (bytes; every row begins a new one) of a weight `(rows, width)`."""
    n, m = nm_of(pattern)
    kept = width // m * (m - n)
    return (rows, kept), (rows, -(-kept * position_bits(pattern) // 8))


def fits(bits: Tensor, pattern: SparsityPattern) -> bool:
    """Whether every group of a weight has at least N entries without a bit set.

    Args:
        bits: the weight's bits as integers, `(out, in)`.
        pattern: it must divide `in`.
    """
    return all(pattern.check(rows).violations == 0 for (rows,) in _in_chunks(bits))


def encode(bits: Tensor, pattern: SparsityPattern) -> tuple[Tensor, Tensor]:
    """The M − N kept values of every group, and their positions in it.

    Values are in the order of the row. Positions are numbers of `position_bits` bits each, in the order of the values,
    lowest bit first, packed into the bytes of a row, lowest bit first; a row's last byte is filled up with zeros.

    Args:
        bits: a weight that `fits`, `(out, in)`, integers.
        pattern: N of every M are dropped; where a group has more zeros than N, the first ones are.

    Returns:
        Values, of the dtype of `bits`, and positions, uint8, in `shapes`.
    """
    values_shape, positions_shape = shapes(pattern, *bits.shape)
    values, positions = bits.new_empty(values_shape), torch.empty(positions_shape, dtype=torch.uint8)
    place = torch.arange(bits.shape[1]).remainder(nm_of(pattern)[1])
    for rows, part, packed in _in_chunks(bits, values, positions):
        kept = pattern.project((rows != 0).float())
        part.copy_(rows[kept].view_as(part))
        packed.copy_(_to_bytes(place.expand_as(rows)[kept].view_as(part), pattern))
    return values, positions


def decode(values: Tensor, positions: Tensor, pattern: SparsityPattern) -> Tensor:
    """The inverse of `encode`: the weight, `(out, in)`, of the dtype of `values`.

    Raises:
        ValueError: the positions of a group do not increase, or exceed it.
    """
    n, m = nm_of(pattern)
    keep = m - n
    rows, kept = values.shape
    bits = torch.zeros(rows, kept // keep * m, dtype=values.dtype)
    first = torch.arange(kept).div(keep, rounding_mode="floor") * m
    for out, part, packed in _in_chunks(bits, values, positions):
        place = _from_bytes(packed, kept, pattern)
        grouped = place.view(len(place), -1, keep)
        if bool((place >= m).any()) or bool((grouped.diff(dim=-1) <= 0).any()):
            raise ValueError(f"positions that are not possible in {pattern.name}")
        out.scatter_(1, place + first, part)
    return bits


def nm_of(pattern: SparsityPattern) -> tuple[int, int]:
    """N and M of a pattern that can be packed."""
    assert pattern.nm is not None
    return pattern.nm


def _to_bytes(place: Tensor, pattern: SparsityPattern) -> Tensor:
    """Positions `(rows, kept)` as bytes."""
    bits = (place[..., None] >> torch.arange(position_bits(pattern))) & 1
    return torch.from_numpy(np.packbits(bits.flatten(1).to(torch.uint8).numpy(), axis=1, bitorder="little"))


def _from_bytes(packed: Tensor, kept: int, pattern: SparsityPattern) -> Tensor:
    """The inverse of `_to_bytes`, int64."""
    width = position_bits(pattern)
    bits = np.unpackbits(packed.numpy(), axis=1, count=kept * width, bitorder="little")
    return (torch.from_numpy(bits).view(len(packed), kept, width).long() << torch.arange(width)).sum(-1)


def _in_chunks(bits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A few rows of every tensor at a time; `bits` is the widest."""
    rows = max(1, CHUNK // max(bits.shape[1], 1))
    return zip(*(torch.split(tensor, rows) for tensor in (bits, *others)), strict=True)
