"""Sparsity patterns: the supports that a weight may have.

`N:M` means that of every M consecutive inputs of a row, N weights are pruned (the convention of SparseGPT, Wanda and
LLM Compressor; a part of the literature counts the kept ones).

Adding a pattern: a frozen dataclass here that declares how it groups, and its place in `PATTERNS`. Methods,
permutation, schedules, checks and the command line ask for nothing else.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from llmprune.errors import InputError
from llmprune.pruning.lowest import lowest

Scope = Literal["row", "layer"]
PatternScope = Literal["group", "row", "layer"]

_HINT = "use N:M with 0 < N < M (2:4 prunes 2 of every 4), a ratio such as 50% or 0.5, blocks:20% or channels:25%"


@dataclass(frozen=True, slots=True)
class PatternCheck:
    """The zeros that `SparsityPattern.check` counted in one weight.

    Args:
        weights: number of weights.
        zeros: how many of them are exactly zero.
        required: how many the pattern asks for.
        violations: missing zeros, summed over the groups, rows or the layer that have too few.
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
    """A set of allowed supports for a weight of shape `(out, in)`; `project` finds the best of them for a score.

    In every group an exact count of units is pruned. A unit is one weight, or a block of weights that are pruned
    together; a group is `group` consecutive inputs of a row, a whole row, or the layer, as `scope` says. A pattern
    that is not made like this overrides `project`, `check` and `mismatch`, and declares itself not `elementwise` and
    not `permutable`.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def name(self) -> str:
        """Canonical spelling, as `parse` reads it."""

    @property
    @abstractmethod
    def sparsity(self) -> Fraction:
        """The exact ratio of pruned weights."""

    @property
    @abstractmethod
    def scope(self) -> PatternScope:
        """Where the count is exact: in every group of inputs of a row, every row, or every layer."""

    @classmethod
    @abstractmethod
    def parse(cls, text: str, scope: PatternScope) -> SparsityPattern | None:
        """The pattern that `text` spells, in this scope if it has a choice; None if it spells none of this kind.

        Raises:
            InputError: it spells one that cannot be.
        """

    @abstractmethod
    def describe(self) -> str:
        """One phrase that leaves no doubt which weights are pruned."""

    @abstractmethod
    def count(self, size: int) -> int:
        """The number of units that are pruned in a group of `size` units."""

    @abstractmethod
    def with_ratio(self, ratio: Fraction) -> SparsityPattern:
        """The same kind of pattern with another ratio of pruned weights, rounded up to the next that it can have."""

    @property
    def group(self) -> int | None:
        """The number of consecutive inputs that a group spans; None where it is a whole row or the layer."""
        return None

    @property
    def unit(self) -> tuple[int, int]:
        """The block of weights that are pruned together, `(rows, inputs)`."""
        return 1, 1

    @property
    def allocatable(self) -> bool:
        """Whether every ratio can be had, so that blocks may get ratios of their own."""
        return False

    @property
    def elementwise(self) -> bool:
        """Whether single weights are pruned, so that in every group the lowest scores are."""
        return self.unit == (1, 1)

    @property
    def nm(self) -> tuple[int, int] | None:
        """`(N, M)` if N single weights of every M consecutive inputs of a row are pruned, else None."""
        return (self.count(self.group), self.group) if self.group is not None and self.elementwise else None

    @property
    def rows_independent(self) -> bool:
        """Whether the mask of a row does not depend on other rows."""
        return self.unit[0] == 1 and self.scope != "layer"

    @property
    def permutable(self) -> bool:
        """Whether another order of the inputs can keep more: they are in groups, each on its own."""
        return self.group is not None and self.unit[1] == 1

    @property
    def multiple_of(self) -> int:
        """What the number of inputs must be a multiple of."""
        return self.group or self.unit[1]

    def speed_note(self) -> str:
        """What this pattern does to file size and speed."""
        return (
            f"{self.name} leaves file size and speed unchanged in stock runtimes; "
            "it pays where a runtime or a compressor knows about zeros"
        )

    def mismatch(self, rows: int, width: int) -> str:
        """Why a weight of shape `(rows, width)` cannot have this pattern, or '' if it can."""
        for size, divisor, what in ((width, self.multiple_of, "inputs"), (rows, self.unit[0], "rows")):
            if size % divisor:
                return f"{size} {what} are not divisible by {divisor}"
        inputs = width if self.group is None else self.group
        size = inputs * (rows if self.scope == "layer" else self.unit[0])
        units = size // math.prod(self.unit)
        if 0 < self.count(units) < units:
            return ""
        return f"{percent(self.sparsity)} of {size} weights rounds to {self.count(units) * math.prod(self.unit)}"

    def steps(self, count: int) -> list[SparsityPattern]:
        """An iterative schedule: patterns of rising ratio that end in this one, at most `count`."""
        return list(dict.fromkeys(self.with_ratio(self.sparsity * step / count) for step in range(1, count + 1)))

    def units(self, score: Tensor) -> Tensor:
        """The score of every unit, `(out / unit rows, in / unit inputs)`: the sum over its weights.

        `-inf`, which marks weights that are zero already, counts only for units of nothing else.
        """
        if self.unit == (1, 1):
            return score
        rows, inputs = self.unit
        blocks = score.reshape(len(score) // rows, rows, -1, inputs)
        marked = blocks == -torch.inf
        return blocks.masked_fill(marked, 0).sum((1, 3)).masked_fill(marked.all(3).all(1), -torch.inf)

    def groups(self, units: Tensor) -> tuple[Tensor, int]:
        """A matrix of units viewed as `(..., size)`, one line a group; and the number to prune in each."""
        if self.scope == "layer":
            grouped = units.reshape(1, -1)
        elif self.group is None:
            grouped = units
        else:
            grouped = units.reshape(len(units), -1, self.group // self.unit[1])
        return grouped, self.count(grouped.shape[-1])

    def project(self, score: Tensor) -> Tensor:
        """Keep mask `(out, in)`, True = kept: in every group the lowest scores are pruned, of ties the first.

        Args:
            score: `(out, in)`, any float dtype, no NaN. `-inf` marks weights that must be pruned first.
        """
        units = self.units(score)
        grouped, count = self.groups(units)
        kept = ~lowest(grouped, count).reshape(units.shape)
        if self.unit == (1, 1):
            return kept
        return kept.repeat_interleave(self.unit[0], 0).repeat_interleave(self.unit[1], 1)

    def check(self, weight: Tensor) -> PatternCheck:
        """Count the zeros of `weight (out, in)` against this pattern."""
        zeros = weight == 0
        empty = zeros if self.unit == (1, 1) else self.units((~zeros).float()) == 0
        grouped, count = self.groups(empty)
        found, size = grouped.sum(-1), math.prod(self.unit)
        return PatternCheck(
            weights=weight.numel(),
            zeros=int(zeros.sum()),
            required=count * found.numel() * size,
            violations=int((count - found).clamp(min=0).sum()) * size,
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

    @property
    def scope(self) -> PatternScope:
        return "group"

    @property
    def group(self) -> int:
        return self.m

    @classmethod
    def parse(cls, text: str, scope: PatternScope) -> NM | None:
        match = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text, re.ASCII)
        return NM(int(match[1]), int(match[2])) if match else None

    def describe(self) -> str:
        return f"{self.name}, prunes {self.n} of every {self.m} weights, {percent(self.sparsity)}"

    def speed_note(self) -> str:
        if (self.n, self.m) != (2, 4):
            return SparsityPattern.speed_note(self)
        return (
            "2:4 leaves file size and CPU speed unchanged; NVIDIA GPUs since Ampere run it faster "
            "(torch.sparse.to_sparse_semi_structured)"
        )

    def count(self, size: int) -> int:
        return self.n * size // self.m

    def with_ratio(self, ratio: Fraction) -> NM:
        return NM(math.ceil(ratio * self.m), self.m)


@dataclass(frozen=True, slots=True)
class Unstructured(SparsityPattern):
    """An exact ratio of the weights of every row (`scope="row"`) or of the layer (`scope="layer"`) is pruned.

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

    @property
    def allocatable(self) -> bool:
        return True

    @classmethod
    def parse(cls, text: str, scope: PatternScope) -> Unstructured | None:
        match = re.fullmatch(r"([+-]?\d{0,9}\.?\d{0,9})\s*(%?)", text, re.ASCII)
        try:
            ratio = Fraction(match[1]) / (100 if match[2] else 1) if match else None
        except ValueError:
            ratio = None
        if match is None or ratio is None:
            return None
        if not match[2] and 1 < ratio < 100:
            raise InputError(f"a sparsity of {text} is not between 0 and 1", f"for {text} % use {text}%; else {_HINT}")
        return Unstructured(ratio, "row" if scope == "row" else "layer")

    def describe(self) -> str:
        where = "every row" if self.scope == "row" else "every layer"
        return f"{percent(self.ratio)} unstructured, counted exactly in {where}"

    def count(self, size: int) -> int:
        return int(self.ratio * size + Fraction(1, 2))

    def with_ratio(self, ratio: Fraction) -> Unstructured:
        return Unstructured(ratio, self.scope)


PATTERNS: list[type[SparsityPattern]] = [NM, Unstructured]


def parse_pattern(text: str, scope: PatternScope = "layer") -> SparsityPattern:
    """The pattern that `2:4`, `50%` or `0.5` stands for.

    Args:
        text: what the user typed.
        scope: where the count of an unstructured pattern is exact; other patterns have their own.

    Raises:
        InputError: for anything else, with a hint.
    """
    for kind in PATTERNS:
        if (pattern := kind.parse(text.strip(), scope)) is not None:
            return pattern
    raise InputError(f"unknown sparsity {text!r}", _HINT)


def percent(ratio: Fraction) -> str:
    """`1/4` -> `25 %`, exactly."""
    with localcontext(prec=50):
        exact = Decimal(ratio.numerator * 100) / ratio.denominator
        return f"{exact.normalize():f} %"
