"""The choice of blocks, heads and channels together, by the error of the residual stream for what they save."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmprune.pruning.sparsity import Kind


@dataclass(frozen=True, slots=True)
class Depth:
    """One number of removed blocks.

    Args:
        error: of the stream behind the gaps, relative to the stream and summed over them.
        removed: numbers of the blocks, rising.
    """

    error: float
    removed: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Heads:
    """One number of removed attention heads.

    Args:
        errors: of the stream behind the attention of every block, relative to the stream, `(blocks,)`, float64.
        saved: parameters that every block loses, `(blocks,)`, float64.
        number: which of the ways to remove heads this is; -1 for none.
    """

    errors: Tensor
    saved: Tensor
    number: int


@dataclass(frozen=True, slots=True)
class Channels:
    """The curves of the MLP channels.

    Args:
        ratios: of the removed channels, rising.
        errors: of the stream behind the MLP of every block, relative to the stream, `(blocks, ratios)`, float64.
        saved: parameters that every block loses for a ratio of 1, `(blocks,)`, float64.
        step: of the ratio of kept channels, whose numbers are rounded; 0 for none.
    """

    ratios: tuple[float, ...]
    errors: Tensor
    saved: Tensor
    step: float = 0.0

    def possible(self, ratio: float) -> float:
        """The least ratio from this one on that leaves a whole number of steps."""
        return 1 - math.floor((1 - ratio) / self.step + 1e-9) * self.step if self.step else ratio

    def error(self, ratio: float, kept: Tensor) -> float:
        """The error of the blocks `kept (blocks,)` at a ratio between those that were measured.

        Between two of them it is taken to be exponential, below the first one to be linear; infinite beyond the last.
        """
        if ratio <= 0:
            return 0.0
        sums = [max(float(value), 1e-300) for value in self.errors[kept].sum(0)]
        if ratio <= self.ratios[0]:
            return sums[0] * ratio / self.ratios[0]
        for low, high, first, last in zip(self.ratios, self.ratios[1:], sums, sums[1:], strict=False):
            if ratio <= high:
                place = (ratio - low) / (high - low)
                return math.exp(math.log(first) * (1 - place) + math.log(last) * place)
        return math.inf


@dataclass(frozen=True, slots=True)
class SizeErrors:
    """What every kind of removal costs.

    Args:
        depths: numbers of removed blocks, none among them.
        heads: numbers of removed heads, none among them.
        channels: the curves of the channels; None where none can be removed.
    """

    depths: Sequence[Depth]
    heads: Sequence[Heads]
    channels: Channels | None

    def only(self, kind: Kind) -> SizeErrors:
        """Those of one kind of removal."""
        return SizeErrors(
            self.depths if kind == "blocks" else self.depths[:1],
            self.heads if kind == "heads" else self.heads[:1],
            self.channels if kind == "channels" else None,
        )

    def scaled(self, factors: Mapping[Kind, float]) -> SizeErrors:
        """The errors of every kind times a factor; 1 where none is given."""
        blocks, heads, channels = (factors.get(kind, 1.0) for kind in ("blocks", "heads", "channels"))
        curves = self.channels
        return SizeErrors(
            [replace(depth, error=depth.error * blocks) for depth in self.depths],
            [replace(way, errors=way.errors * heads) for way in self.heads],
            None if curves is None else replace(curves, errors=curves.errors * channels),
        )


@dataclass(frozen=True, slots=True)
class SizeChoice:
    """What is removed for a size.

    Args:
        depth: the blocks.
        heads: the heads of the others.
        ratio: of the channels of the others.
        error: what is expected of the stream, summed over all removals.
    """

    depth: Depth
    heads: Heads
    ratio: float
    error: float


def choose(goal: float, blocks: Sequence[int], errors: SizeErrors) -> SizeChoice | None:
    """The choice of the least error among all that leave no more than the size asked for; None where there is none.

    Every number of blocks is tried with every number of heads, and channels are the rest: with B the removed
    blocks, h the heads and r the ratio of channels,

        min E_blocks(B) + Σ_{b ∉ B} (E_heads(b, h) + E_channels(b, r))   over (B, h, r)
        with Σ_{b ∈ B} n_b + Σ_{b ∉ B} (n_heads(b, h) + r n_channels(b)) ≥ (1 - goal) Σ_b n_b,

    n_b the parameters of block b. Errors are taken to add up, as those of layers are wherever ratios are allocated.

    Args:
        goal: ratio of the block parameters that may be left.
        blocks: number of parameters of every block.
        errors: of every kind of removal.
    """
    sizes = torch.tensor(blocks, dtype=torch.float64)
    found = _candidates((1 - goal) * float(sizes.sum()), sizes, errors)
    best = min(found, key=lambda choice: choice.error, default=None)
    return best if best is not None and best.error < math.inf else None


def _candidates(needed: float, sizes: Tensor, errors: SizeErrors) -> Iterator[SizeChoice]:
    channels = errors.channels
    for depth in errors.depths:
        kept = torch.ones(len(sizes), dtype=torch.bool)
        kept[list(depth.removed)] = False
        for way in errors.heads:
            rest = needed - float(sizes[~kept].sum()) - float(way.saved[kept].sum())
            ratio = 0.0
            if rest > 0:
                if channels is None or (saved := float(channels.saved[kept].sum())) <= rest:
                    continue
                ratio = channels.possible(rest / saved)
            error = depth.error + float(way.errors[kept].sum())
            error += 0.0 if channels is None else channels.error(ratio, kept)
            yield SizeChoice(depth, way, ratio, error)
