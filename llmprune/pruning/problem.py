"""The regression problem of a group of layers, and its solution."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from llmprune.pruning.grid import Grid


class Status(StrEnum):
    """How a layer's solution came about."""

    OK = "ok"
    DAMPING_RAISED = "damping raised"
    NO_INPUT = "no calibration token reached the layer; mask by magnitude, weights kept"


@dataclass(frozen=True, slots=True)
class InputStats:
    """Statistics of the inputs `X (tokens, in)` that a group of layers shares.

    Args:
        tokens: number of rows of X; 0 if no calibration token reached the layers.
        gram: `G = XᵀX / tokens`, `(in, in)`, float32. Its diagonal is the mean square of every input.
        cross: `C = XᵀX_d / tokens` with the inputs X_d of the dense model, None if the target is `X Wᵀ` itself.
        dense: `X_dᵀX_d / tokens`, None like `cross`.
        held: `gram`, `cross` and `residual_cross` of held-out tokens, to validate on them what was fitted on the rest.
        residual_cross: `XᵀE / tokens`, `(in, out)`, if the group's only layer adds to the residual stream: E is the
            dense model's residual stream right behind the layer less the pruned model's, so what the layer's output
            should change by to compensate all errors before it. Such a group has `output_cross` and `output_energy` in
            place of `cross` and `dense`, which are wider where it has many inputs.
        output_cross: `XᵀY_d / tokens`, `(in, out)`, with the outputs `Y_d = X_d Wᵀ` of the dense model.
        output_energy: `(out,)`, mean square of every output of the dense model.
        zero_fraction: `(in,)`, fraction of tokens for which an input is zero, or nearly so, where that is counted.
        scale: `(in,)`, the learned scale of the norm that feeds the layers, where that was looked for.
        pooled: how many of the tokens stand for those of all experts, see `shrinkage.shrunk`.
    """

    tokens: int
    gram: Tensor
    cross: Tensor | None = None
    dense: Tensor | None = None
    held: InputStats | None = None
    residual_cross: Tensor | None = None
    output_cross: Tensor | None = None
    output_energy: Tensor | None = None
    zero_fraction: Tensor | None = None
    scale: Tensor | None = None
    pooled: int = 0


@dataclass(frozen=True, slots=True)
class LayerProblem:
    """One layer `y = W x` to be pruned.

    Args:
        name: the layer's module name.
        weight: W, `(out, in)`, float32. Weights that are exactly zero stay zero.
    """

    name: str
    weight: Tensor


@dataclass(frozen=True, slots=True)
class UnitRemoval:
    """Inputs to be removed from a layer.

    Args:
        units: `(pools, units, size)`, int64: inputs that are removed together (one channel, or those of a head).
        count: number of units to be removed from every pool.
        scale: `(in,)`, the learned scale that multiplies every input, where the criterion needs it.
    """

    units: Tensor
    count: int
    scale: Tensor | None = None


@dataclass(frozen=True, slots=True)
class GroupProblem:
    """The joint problem of layers with the very same inputs.

    Args:
        layers: the layers.
        stats: statistics of their inputs.
        classes: sets of inputs that may be permuted, see `permutation.choose`; none where that cannot be folded away.
        removal: the inputs to be removed, where the group is one layer that loses some.
    """

    layers: tuple[LayerProblem, ...]
    stats: InputStats
    classes: tuple[Tensor, ...] = ()
    removal: UnitRemoval | None = None

    def split(self, rows: Tensor) -> list[Tensor]:
        """Cut a matrix of stacked rows back into the layers' parts (views)."""
        return list(torch.split(rows, [len(layer.weight) for layer in self.layers]))


@dataclass(frozen=True, slots=True)
class Scales:
    """The scales of a quantised weight.

    Args:
        grid: of the weight.
        values: `(out, groups)`, float32.
        group_of: `(in,)`, int64, the group of every input, in the order of the weight's inputs.
    """

    grid: Grid
    values: Tensor
    group_of: Tensor

    def spread(self) -> Tensor:
        """The scale of every weight, `(out, in)`."""
        return self.values[:, self.group_of]


@dataclass(frozen=True, slots=True)
class LayerSolution:
    """New weights on an exact support.

    Args:
        weight: `(out, in)`, float32, exactly zero where `mask` is False.
        mask: `(out, in)`, bool, True = kept.
        status: how the solution came about.
        stats: figures worth reporting, such as the damping that was used.
        scales: those of a weight on a grid; None where any value is allowed.
    """

    weight: Tensor
    mask: Tensor
    status: Status = Status.OK
    stats: dict[str, float] = field(default_factory=dict)
    scales: Scales | None = None


@dataclass(frozen=True, slots=True)
class GroupSolution:
    """The solutions of a group.

    Args:
        layers: one solution per layer, in the present order of the inputs.
        order: `(kept,)`, int64, the order of the inputs in which they hold the pattern; inputs that it does not name
            are removed. None for the order as it is.
    """

    layers: list[LayerSolution]
    order: Tensor | None = None


def unchanged(problem: GroupProblem) -> GroupSolution:
    """The solution that keeps every weight `(out, in)`, with existing zeros as its mask."""
    return GroupSolution([masked(layer.weight, layer.weight != 0) for layer in problem.layers])


def masked(weight: Tensor, mask: Tensor, status: Status = Status.OK) -> LayerSolution:
    """The solution that keeps `weight` on `mask` (and never revives a zero), with +0 elsewhere."""
    mask = mask & (weight != 0)
    return LayerSolution(torch.where(mask, weight, 0.0), mask, status)


def zeros_first(score: Tensor, weight: Tensor) -> Tensor:
    """`score` with `-inf` where `weight` is zero already, so that existing zeros fill the pattern first."""
    return score.masked_fill(weight == 0, -torch.inf)
