"""Grids: the values that a weight may have, as a pattern is the supports that it may have.

`int4`, `int8` and `fp8` (E4M3) are symmetric and hold zero exactly, so that a pruned weight stays zero. A weight is
`w = s q`: q is one of few values, and s is a positive scale that a whole row (`channel`) or every `g` consecutive
inputs of a row (`g128`, `g64`, `g32`) share.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from llmprune.errors import InputError

Kind = Literal["int", "float"]
BITS: dict[str, tuple[Kind, int]] = {"int4": ("int", 4), "int8": ("int", 8), "fp8": ("float", 8)}
GROUPS = (128, 64, 32)
"""Group sizes of int4, the first of which that divides every width is taken."""
HINT = "use int4, int4:g64, int4:channel, int8, int8:g128 or fp8"


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that the weights of a layer may have.

    Args:
        kind: of q: integers, or float8 E4M3.
        bits: of q.
        group: number of consecutive inputs of a row that share a scale; 0 for the whole row, None for one that is
            still to be chosen, see `fitted`.
        scale_dtype: of the scales as they are stored.
    """

    kind: Kind
    bits: int
    group: int | None = 0
    scale_dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """Canonical spelling, as `parse_grid` reads it."""
        short = next(name for name, form in BITS.items() if form == (self.kind, self.bits))
        if self.group is None or (self.group == 0 and self.bits == 8):
            return short
        return f"{short}:g{self.group}" if self.group else f"{short}:channel"

    @property
    def lowest(self) -> float:
        """The smallest q."""
        return -self.highest - 1 if self.kind == "int" else -self.highest

    @property
    def highest(self) -> float:
        """The largest q."""
        return 2.0 ** (self.bits - 1) - 1 if self.kind == "int" else torch.finfo(torch.float8_e4m3fn).max

    @property
    def lowest_scale(self) -> float:
        """The smallest scale: with integers, float16's numbers below the normal ones are exact enough, too."""
        info = torch.finfo(self.scale_dtype)
        exact = self.kind == "int" and self.scale_dtype == torch.float16
        return info.smallest_normal * info.eps if exact else info.smallest_normal

    def describe(self) -> str:
        """One phrase that leaves no doubt which values a weight may have."""
        values = f"{self.bits}-bit integers" if self.kind == "int" else "float8 (E4M3)"
        scale = f"every {self.group} consecutive inputs of a row" if self.group else "every row"
        return f"{self.name}, symmetric {values}, a scale for {scale}"

    def speed_note(self) -> str:
        """What it does to file size and speed."""
        return (
            f"{self.name} weights take {self.bits} bits each and their scales on disk; vLLM computes with them, "
            "transformers makes floating point of them when it loads them (pip install compressed-tensors)"
        )

    def groups(self, width: int) -> int:
        """The number of scales in a row of so many inputs."""
        return width // self.group if self.group else 1

    def mismatch(self, width: int) -> str:
        """Why a row of so many inputs cannot have this grid, or '' if it can."""
        return f"{width} inputs are not divisible by {self.group}" if self.group and width % self.group else ""

    def fitted(self, widths: Iterable[int], scale_dtype: torch.dtype) -> Grid:
        """The grid for layers of these widths: of a size to be chosen, the largest usual one that divides all of them.

        Args:
            widths: numbers of inputs.
            scale_dtype: of the scales as they will be stored.
        """
        group, each = self.group, set(widths)
        if group is None:
            group = next((size for size in GROUPS if not any(width % size for width in each)), 0)
        return replace(self, group=group, scale_dtype=scale_dtype)

    def nearest(self, values: Tensor) -> Tensor:
        """The nearest q of every value, in the same dtype; ties to even."""
        if self.kind == "int":
            return values.round().clamp_(self.lowest, self.highest)
        return values.clamp(self.lowest, self.highest).to(torch.float8_e4m3fn).to(values.dtype)


def parse_grid(text: str) -> Grid:
    """The grid that `int4`, `int8`, `fp8`, `int4:g64` or `int4:channel` stands for.

    Raises:
        InputError: for anything else, with a hint.
    """
    match = re.fullmatch(r"(int4|int8|fp8)(?::(?:g(\d{1,6})|(channel)))?", text.strip().lower(), re.ASCII)
    if not match:
        raise InputError(f"unknown grid {text!r}", HINT)
    kind, bits = BITS[match[1]]
    if match[2] and (kind == "float" or int(match[2]) not in GROUPS):
        wrong = "fp8 has a scale for every row" if kind == "float" else f"no format stores groups of {match[2]}"
        raise InputError(f"{text!r} cannot be stored: {wrong}", HINT)
    if match[2]:
        return Grid(kind, bits, int(match[2]))
    return Grid(kind, bits, None if bits == 4 and not match[3] else 0)


def spread_scale(scale: Tensor, width: int) -> Tensor:
    """The scale of every weight of rows of so many inputs, `(out, in)`, from `(out, groups)`."""
    return scale.repeat_interleave(width // scale.shape[1], dim=1)
