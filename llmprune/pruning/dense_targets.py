"""Dense-model targets: the weights whose outputs come nearest to the dense model's, as far as the data support it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmprune.pruning.linalg import inverse_factor, line_minimum
from llmprune.pruning.problem import GroupProblem, InputStats
from llmprune.pruning.statistics import excluding, output_residual_cross
from llmprune.runtime.process_group import SINGLE, ProcessGroup

TARGET_DAMPING = 0.1


@dataclass(frozen=True, slots=True)
class DenseTarget:
    """The unconstrained optimum of a group of layers.

    Args:
        problem: the group with these weights.
        strengths: α of every layer; empty where the dense weights are the optimum.
        retries: how often the damping λ was raised tenfold at most.
    """

    problem: GroupProblem
    strengths: tuple[float, ...] = ()
    retries: int = 0


def dense_targets(
    problem: GroupProblem, dampings: Sequence[float] = (TARGET_DAMPING,), group: ProcessGroup = SINGLE
) -> DenseTarget:
    """The regression of the dense model's outputs on the pruned model's inputs, `W* = W + α Δ`, `Δ = M (H + λI)⁻¹`.

    M, `(out, in)`, is the cross-covariance of the outputs' residual with the inputs: `M = W (C − H)ᵀ` fits a layer to
    its output in the dense model, as asymmetric calibration does (GPTAQ, Li et al. 2025). A layer that adds to the
    residual stream does better to compensate the error E that has accumulated there, `M = EᵀX / tokens`, as far as its
    inputs determine it.

    Differs from GPTAQ: the target does not enter the solver's updates but replaces the weights before them, so any
    method can prune these; the target of the residual stream; and the strength α. The full correction (α = 1) over-fits
    small calibration sets. With Δ fitted on a part of the tokens, the error on the held-out rest is a parabola in α;
    its minimum in [0, 1] is the strength, for each layer on its own. Then Δ is fitted on all tokens. Zeros of the
    source stay zero.

    Args:
        problem: a group with statistics of the dense model; one without is returned as it is.
        dampings: λ as a fraction of the mean diagonal of H; of several the one with the least error on the held-out
            tokens.
        group: the processes, each of which fits its own rows.

    Raises:
        NumericalError: H stays singular.
    """
    stats, held = problem.stats, problem.stats.held
    if held is None or (stats.cross is None and stats.residual_cross is None):
        return DenseTarget(problem, (0.0,) * len(problem.layers))
    weights = torch.cat([layer.weight for layer in problem.layers])
    rest = excluding(stats, held)
    trials = [_trial(problem, weights, rest, held, damping, group) for damping in dampings]
    found = min(range(len(trials)), key=lambda number: trials[number].error)
    damping, strengths, retries = dampings[found], trials[found].strengths, max(trial.retries for trial in trials)
    if not any(strengths):
        return DenseTarget(problem, strengths, retries)
    factor = inverse_factor(stats.gram, damping)
    parts = problem.split(group.map_rows(lambda rows: _correction(weights, rows, stats, factor.upper), len(weights)))
    layers = tuple(
        replace(layer, weight=(layer.weight + strength * delta).mul_(layer.weight != 0))
        for layer, strength, delta in zip(problem.layers, strengths, parts, strict=True)
    )
    return DenseTarget(replace(problem, layers=layers), strengths, max(retries, factor.retries))


@dataclass(frozen=True, slots=True)
class _Trial:
    """A fit on a part of the tokens.

    Args:
        strengths: α of every layer, by the held-out tokens.
        error: what the fit adds to the squared error on these, in all layers.
        retries: how often the damping was raised.
    """

    strengths: tuple[float, ...]
    error: float
    retries: int


def _trial(
    problem: GroupProblem, weights: Tensor, rest: InputStats, held: InputStats, damping: float, group: ProcessGroup
) -> _Trial:
    sums, retries = _gains_and_costs(weights, rest, held, damping, group)
    pairs = [part.sum(0).tolist() for part in problem.split(sums)]
    strengths = tuple(line_minimum(gain, cost) for gain, cost in pairs)
    error = sum(a * (a * cost - 2 * gain) for a, (gain, cost) in zip(strengths, pairs, strict=True))
    return _Trial(strengths, error, retries)


def _gains_and_costs(
    weights: Tensor, rest: InputStats, held: InputStats, damping: float, group: ProcessGroup
) -> tuple[Tensor, int]:
    """The coefficients of the error on the held-out tokens, row by row: `‖E‖² − 2 gain α + cost α²`.

    Returns:
        `(out, 2)`, float64, and how often the damping of the trial's fit was raised.
    """
    factor = inverse_factor(rest.gram, damping)

    def of(rows: slice) -> Tensor:
        trial = _correction(weights, rows, rest, factor.upper)
        gain = (trial * output_residual_cross(weights, held, rows)).sum(1, dtype=torch.float64)
        cost = (trial * (trial @ held.gram)).sum(1, dtype=torch.float64)
        return torch.stack([gain, cost], 1)

    return group.map_rows(of, len(weights)), factor.retries


def _correction(weights: Tensor, rows: slice, stats: InputStats, upper: Tensor) -> Tensor:
    """`Δ = M (H + λI)⁻¹`, some of its rows, with `(H + λI)⁻¹ = Uᵀ U`."""
    return (output_residual_cross(weights, stats, rows) @ upper.T) @ upper
