"""Sparsity patterns: which weights of a matrix may stay.

`N:M` means that of every M consecutive inputs of a row, N weights are pruned (the convention of SparseGPT, Wanda and
LLM Compressor; a part of the literature counts the kept ones).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from llmprune.errors import InputError

Scope = Literal["row", "layer"]

FEW_ROWS = 32
_HINT = "use N:M with 0 < N < M (2:4 prunes 2 of every 4), a share such as 50% or 0.5, channels:25% or heads:33%"


@dataclass(frozen=True, slots=True)
class PatternCheck:
    """What `SparsityPattern.check` found in one weight.

    Args:
        weights: number of weights looked at.
        zeros: how many of them are exactly zero.
        required: how many the pattern asks for.
        violations: zeros that are missing, summed over the groups (N:M), rows or the layer that have too few.
    """

    weights: int
    zeros: int
    required: int
    violations: int

    @property
    def extra_zeros(self) -> int:
        """Zeros beyond what the pattern asks for: kept weights that happen to be zero."""
        return self.zeros - self.required + self.violations


class SparsityPattern(ABC):
    """A set of allowed supports for a weight of shape `(out, in)`; `project` picks the best of them for a score."""

    __slots__ = ()

    @property
    @abstractmethod
    def name(self) -> str:
        """Canonical spelling, as `parse_pattern` reads it."""

    @property
    @abstractmethod
    def sparsity(self) -> Fraction:
        """The exact share of weights that is pruned."""

    @abstractmethod
    def describe(self) -> str:
        """One phrase that leaves no doubt which weights go."""

    def speed_note(self) -> str:
        """What this pattern does to file size and speed, said honestly."""
        return (
            f"{self.name} leaves file size and speed unchanged in stock runtimes; "
            "it pays where a runtime or a compressor knows about zeros"
        )

    @abstractmethod
    def divides(self, rows: int, width: int) -> str:
        """Why a weight of shape `(rows, width)` cannot have this pattern, or '' if it can."""

    @property
    @abstractmethod
    def rows_independent(self) -> bool:
        """Whether the mask of a row does not depend on the other rows."""

    @abstractmethod
    def groups(self, score: Tensor) -> tuple[Tensor, int]:
        """`score (out, in)` viewed as `(..., group)` with the number of weights to prune in each group."""

    @abstractmethod
    def steps(self, count: int) -> list[SparsityPattern]:
        """Patterns of rising sparsity that end in this one, at most `count`."""

    def project(self, score: Tensor) -> Tensor:
        """Keep mask `(out, in)`, True = kept: in every group the lowest scores go, ties by lower index first.

        Args:
            score: `(out, in)`, any float dtype, no NaN. `-inf` marks weights that must go first.
        """
        grouped, count = self.groups(score)
        return ~lowest(grouped, count).reshape(score.shape)

    def check(self, weight: Tensor) -> PatternCheck:
        """Count the zeros of `weight (out, in)` against this pattern."""
        grouped, count = self.groups(weight)
        zeros = (grouped == 0).sum(-1)
        return PatternCheck(
            weights=weight.numel(),
            zeros=int(zeros.sum()),
            required=count * zeros.numel(),
            violations=int((count - zeros).clamp(min=0).sum()),
        )


@dataclass(frozen=True, slots=True)
class NM(SparsityPattern):
    """Of every `m` consecutive inputs of a row, `n` weights are pruned."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise InputError(f"pattern {self.n}:{self.m} prunes {self.n} of every {self.m} weights", _HINT)

    @property
    def name(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> Fraction:
        return Fraction(self.n, self.m)

    def describe(self) -> str:
        return f"{self.name}, prunes {self.n} of every {self.m} weights, {percent(self.sparsity)}"

    def speed_note(self) -> str:
        if (self.n, self.m) != (2, 4):
            return SparsityPattern.speed_note(self)
        return (
            "2:4 leaves file size and CPU speed unchanged; NVIDIA GPUs since Ampere run it faster "
            "(torch.sparse.to_sparse_semi_structured)"
        )

    def steps(self, count: int) -> list[SparsityPattern]:
        rising = sorted({-(-self.n * step // count) for step in range(1, count + 1)})
        return [NM(n, self.m) for n in rising]

    def divides(self, rows: int, width: int) -> str:
        return "" if width % self.m == 0 else f"{width} inputs are not divisible by {self.m}"

    @property
    def rows_independent(self) -> bool:
        return True

    def groups(self, score: Tensor) -> tuple[Tensor, int]:
        return score.reshape(score.shape[0], -1, self.m), self.n


@dataclass(frozen=True, slots=True)
class Unstructured(SparsityPattern):
    """An exact share of the weights of every row (`scope="row"`) or of the layer (`scope="layer"`) is pruned.

    The count is `ratio * size` rounded to the nearest integer, halves up.
    """

    ratio: Fraction
    scope: Scope = "layer"

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise InputError(f"a sparsity of {percent(self.ratio)} is not between 0 % and 100 %", _HINT)

    @property
    def name(self) -> str:
        return percent(self.ratio).replace(" ", "")

    @property
    def sparsity(self) -> Fraction:
        return self.ratio

    def describe(self) -> str:
        where = "every row" if self.scope == "row" else "every layer"
        return f"{percent(self.ratio)} unstructured, counted exactly in {where}"

    def count(self, size: int) -> int:
        """How many of `size` weights are pruned."""
        return int(self.ratio * size + Fraction(1, 2))

    def steps(self, count: int) -> list[SparsityPattern]:
        return [Unstructured(self.ratio * step / count, self.scope) for step in range(1, count + 1)]

    def divides(self, rows: int, width: int) -> str:
        size = width if self.scope == "row" else rows * width
        if 0 < self.count(size) < size:
            return ""
        return f"{percent(self.ratio)} of {size} weights rounds to {self.count(size)}"

    @property
    def rows_independent(self) -> bool:
        return self.scope == "row"

    def groups(self, score: Tensor) -> tuple[Tensor, int]:
        grouped = score if self.scope == "row" else score.reshape(1, -1)
        return grouped, self.count(grouped.shape[-1])


def lowest(score: Tensor, count: int | Tensor, dim: int = -1) -> Tensor:
    """Mask of the `count` lowest entries along `dim`; equal scores go by lower index first.

    Args:
        score: any shape, no NaN.
        count: between 0 and the size of `dim`; a tensor that broadcasts (size 1 along `dim`) gives every line its own.
        dim: the dimension to choose along.
    """
    if isinstance(count, Tensor):
        ordered = score.sort(dim=dim).values
        kth = ordered.gather(dim, (count - 1).clamp(min=0)).masked_fill(count == 0, -torch.inf)
        wanted = int(count.sum())
    elif count:
        kth = kth_lowest(score, count, dim)
        wanted = count * (score.numel() // score.shape[dim])
    else:
        return torch.zeros_like(score, dtype=torch.bool)
    mask = score <= kth
    if int(mask.sum()) == wanted:
        return mask
    below = score < kth
    ties = mask & ~below
    room = count - below.sum(dim, keepdim=True)
    return below | (ties & (ties.cumsum(dim) <= room))


def kth_lowest(score: Tensor, count: int, dim: int = -1) -> Tensor:
    """The `count`-th lowest entry along `dim`, which keeps size 1; fast for a short first dimension."""
    if dim == 0 and count * len(score) <= FEW_ROWS:
        return _kth_row(score, count)
    return score.kthvalue(count, dim=dim, keepdim=True).values


def _kth_row(score: Tensor, count: int) -> Tensor:
    """The `count`-th lowest of a few rows, elementwise, by insertion: far faster than a selection per column."""
    lowest_rows: list[Tensor] = []
    for row in score:
        rising = row
        for at, held in enumerate(lowest_rows):
            lowest_rows[at], rising = torch.minimum(held, rising), torch.maximum(held, rising)
        if len(lowest_rows) < count:
            lowest_rows.append(rising)
    return lowest_rows[-1][None]


def parse_pattern(text: str, scope: Scope = "layer") -> SparsityPattern:
    """Read `2:4`, `50%` or `0.5`.

    Args:
        text: what the user typed.
        scope: where the count of an unstructured pattern is exact.

    Raises:
        InputError: for anything else, with a hint.
    """
    spec = text.strip()
    if match := re.fullmatch(r"(\d{1,6}):(\d{1,6})", spec, re.ASCII):
        return NM(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"([+-]?\d{0,9}\.?\d{0,9})\s*(%?)", spec, re.ASCII):
        try:
            ratio = Fraction(match[1]) / (100 if match[2] else 1)
        except ValueError:
            pass
        else:
            if not match[2] and 1 < ratio < 100:
                raise InputError(
                    f"a sparsity of {spec} is not between 0 and 1", f"for {spec} % use {spec}%; else {_HINT}"
                )
            return Unstructured(ratio, scope)
    raise InputError(f"unknown sparsity {text!r}", _HINT)


def percent(ratio: Fraction) -> str:
    """`1/4` -> `25 %`, exactly."""
    with localcontext(prec=50):
        exact = Decimal(ratio.numerator * 100) / ratio.denominator
        return f"{exact.normalize():f} %"
