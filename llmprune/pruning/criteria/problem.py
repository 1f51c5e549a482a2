"""The removal of inputs of a layer: the problem that a criterion solves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Choice:
    """The units that a criterion chose.

    Args:
        removed: the units to be removed, `(pools, units)`, bool, the same number in every pool.
        retries: how often a ridge was raised tenfold before the choice could be made.
    """

    removed: Tensor
    retries: int = 0


@dataclass(frozen=True, slots=True)
class RemovalProblem:
    """A layer `y = W x` some of whose inputs are to be removed.

    Args:
        weight: W, `(out, in)`, float64: the optimum with all inputs.
        gram: `H = XᵀX / tokens`, `(in, in)`, float32 or float64.
        units: `(pools, units, size)`, int64: inputs that are removed together (one channel, or a head's). The same
            number of units is removed from every pool.
        scale: `(in,)`, the learned scale that multiplies every input, or None.
        zero_fraction: `(in,)`, fraction of tokens for which an input is zero or nearly so, or None.
    """

    weight: Tensor
    gram: Tensor
    units: Tensor
    scale: Tensor | None = None
    zero_fraction: Tensor | None = None

    def lowest(self, score: Tensor, count: int) -> Choice:
        """The choice of the `count` units of every pool with the lowest score; ties by lower index first.

        Args:
            score: of every unit, `(pools, units)`.
            count: how many of every pool.
        """
        removed = score.sort(dim=1, stable=True).indices[:, :count]
        return Choice(torch.zeros_like(score, dtype=torch.bool).scatter_(1, removed, True))

    def summed(self, values: Tensor) -> Tensor:
        """The sum over the inputs of every unit, `(pools, units)`, of `values (in,)`."""
        return values[self.units].sum(-1)

    def kept(self, removed: Tensor) -> Tensor:
        """The kept inputs, `(k,)`, int64, rising, without the units `removed (pools, units)`, bool."""
        kept = torch.ones(self.weight.shape[1], dtype=torch.bool, device=self.weight.device)
        kept[self.units[removed].flatten()] = False
        return kept.nonzero().flatten()

    def excluding(self, removed: Tensor, weight: Tensor) -> RemovalProblem:
        """The problem of the kept units.

        Args:
            removed: `(pools, units)`, bool, the same number in every pool.
            weight: the new weights of the kept inputs, `(out, k)`.
        """
        kept = self.kept(removed)
        place = torch.full((self.weight.shape[1],), -1, device=kept.device)
        place[kept] = torch.arange(len(kept), device=kept.device)
        pools, _, size = self.units.shape
        return RemovalProblem(
            weight,
            self.gram[kept][:, kept],
            place[self.units[~removed].view(pools, -1, size)],
            None if self.scale is None else self.scale[kept],
            None if self.zero_fraction is None else self.zero_fraction[kept],
        )
