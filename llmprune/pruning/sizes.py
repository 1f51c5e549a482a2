"""The choice of blocks, heads and channels together, by the error of the residual stream for what they save."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.pruning.sparsity import Kind

POWERS = (1.0, 6.0)
"""Costs grow at least in proportion to errors."""


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


@dataclass(frozen=True, slots=True)
class Cost:
    """What errors E of one kind of removal cost at the end of the model, `c E^p`.

    Args:
        factor: c.
        power: p.
    """

    factor: float = 1.0
    power: float = 1.0

    def __call__(self, error: float) -> float:
        """The cost of an error of the residual stream."""
        return float(self.factor * error**self.power)

    @classmethod
    def through(cls, *points: tuple[float, float]) -> Cost:
        """Through one or two pairs of error and cost, the larger error first; p is 1 for one, else within `POWERS`."""
        (error, cost), *rest = points
        if min(error, cost) <= 0:
            return cls()
        power = 1.0
        for less, cheaper in rest:
            if 0 < less < error and cheaper > 0:
                power = min(max(math.log(cost / cheaper) / math.log(error / less), POWERS[0]), POWERS[1])
        return cls(cost / error**power, power)


@dataclass(frozen=True, slots=True)
class SizeChoice:
    """What is removed for a size.

    Args:
        depth: the blocks.
        heads: the heads of the others.
        ratio: of the channels of the others.
        cost: what is expected, summed over all kinds.
    """

    depth: Depth
    heads: Heads
    ratio: float
    cost: float


def choose(
    goal: float, blocks: Sequence[int], errors: SizeErrors, costs: Mapping[Kind, Cost] | None = None
) -> SizeChoice | None:
    """The choice of the least cost among all that leave no more than the size asked for; None where there is none.

    Every number of blocks is tried with every number of heads, and channels are the rest: with B the removed
    blocks, h the heads and r the ratio of channels,

        min C_blocks(E(B)) + C_heads(Σ_{b ∉ B} E(b, h)) + C_channels(Σ_{b ∉ B} E(b, r))   over (B, h, r)
        with Σ_{b ∈ B} n_b + Σ_{b ∉ B} (n_heads(b, h) + r n_channels(b)) ≥ (1 - goal) Σ_b n_b,

    n_b the parameters of block b. Costs are taken to add up, as those of layers are wherever ratios are allocated.

    Args:
        goal: ratio of the block parameters that may be left.
        blocks: number of parameters of every block.
        errors: of every kind of removal.
        costs: what they cost; the errors themselves for None.
    """
    sizes = torch.tensor(blocks, dtype=torch.float64)
    found = _candidates((1 - goal) * float(sizes.sum()), sizes, errors, costs or {})
    best = min(found, key=lambda choice: choice.cost, default=None)
    return best if best is not None and best.cost < math.inf else None


def _candidates(needed: float, sizes: Tensor, errors: SizeErrors, costs: Mapping[Kind, Cost]) -> Iterator[SizeChoice]:
    channels = errors.channels
    of_blocks, of_heads, of_channels = (costs.get(kind, Cost()) for kind in ("blocks", "heads", "channels"))
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
            cost = of_blocks(depth.error) + of_heads(float(way.errors[kept].sum()))
            cost += 0.0 if channels is None else of_channels(channels.error(ratio, kept))
            yield SizeChoice(depth, way, ratio, cost)
