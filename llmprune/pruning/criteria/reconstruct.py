"""Least squares on the kept inputs of a layer, with a ridge that held-out tokens choose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.pruning.least_squares import polish
from llmprune.pruning.linalg import damped_cholesky, line_minimum
from llmprune.pruning.problem import InputStats
from llmprune.pruning.statistics import excluding, output_residual_cross

DEFAULT_RIDGE = 0.3
RIDGE_GRID = (0.03, 0.1, 0.3, 1.0, 3.0)
VALIDATION_ROWS = 512
"""At most so many outputs validate the ridges."""
SCALE_FLOOR = 1e-3
"""Fraction of the mean that is added to every input's mean square: that of a rarely active input is nearly zero."""
SUPPORT_STEPS = 50
"""Conjugate-gradient steps where the source has zeros."""

Solve = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Fit:
    """The weights on the kept inputs S.

    Args:
        weight: `W̃_S`, `(out, k)`, float64.
        ridge: r.
        strength: α, the ratio of the correction towards the dense model's output.
        retries: how often r was raised tenfold before `A_SS` could be factored.
    """

    weight: Tensor
    ridge: float
    strength: float = 0.0
    retries: int = 0


def reconstruct(weight: Tensor, stats: InputStats, kept: Tensor) -> Fit:
    """Least squares with the ridge, and the strength of the dense correction, of the least error on held-out tokens.

    With `A = H + r D`, see `least_squares`, and M the cross-covariance of the outputs' residual with the inputs (zero
    without dense targets), `W̃_S = (W A + α M)_:S A_SS⁻¹`. Fitted on a part of the tokens, its error on the held-out
    rest is a parabola in α; the r of `RIDGE_GRID` with the lowest minimum for α in [0, 1] is taken. Then all is fitted
    on all tokens.

    Few tokens, of one kind of text, support much less of a fit than their own error says: r is often near 1, which
    halves what others compensate for an input.

    Args:
        weight: W, `(out, in)`, float64.
        stats: of the inputs; without held-out tokens r is `DEFAULT_RIDGE`.
        kept: S, `(k,)`, int64.

    Raises:
        NumericalError: as `least_squares`.
    """
    ridge, strength = _validated(weight, stats, kept)
    solve, retries = solver(stats.gram, kept, ridge)
    right = products(weight, stats.gram, kept, ridge)
    if strength:
        right += strength * output_residual_cross(weight.float(), stats)[:, kept]
    return Fit(solve(right), ridge, strength, retries)


def least_squares(weight: Tensor, gram: Tensor, kept: Tensor, ridge: float = DEFAULT_RIDGE) -> tuple[Tensor, int]:
    """The optimal weights on the kept inputs S: `min tr((W̃ − W) A (W̃ − W)ᵀ)`, so `W̃_S = (W A)_:S A_SS⁻¹`.

    `A = H + r D` with `D = diag H + SCALE_FLOOR · mean(diag H)`: a diagonal-scaled ridge (Tikhonov), which pulls every
    weight towards its old value. With r = 0 this is plain least squares, with r → ∞ the weights do not change. One
    factorisation serves all rows.

    Args:
        weight: W, `(out, in)`, float64.
        gram: H, `(in, in)`.
        kept: S, `(k,)`, int64.
        ridge: r.

    Returns:
        `W̃_S`, `(out, k)`, and how often r was raised tenfold before A_SS could be factored.

    Raises:
        NumericalError: A_SS stays singular.
    """
    solve, retries = solver(gram, kept, ridge)
    return solve(products(weight, gram, kept, ridge)), retries


def products(weight: Tensor, gram: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """The right-hand side `(W A)_:S`, `(out, k)`, float64."""
    return (weight.to(gram.dtype) @ gram)[:, kept].double() + weight[:, kept] * (ridge * _scale(gram)[kept])


def solver(gram: Tensor, kept: Tensor, ridge: float) -> tuple[Solve, int]:
    """The map `B -> B A_SS⁻¹` for `B (rows, k)`, and how often r was raised tenfold."""
    mean = gram.diagonal().double().mean().clamp(min=1e-300)
    scale, unmet = _scale(gram)[kept] / mean, float(mean <= 1e-300)

    def damped(value: float) -> Tensor:
        matrix = gram[kept][:, kept].to(torch.float64, copy=True)
        matrix.diagonal().add_(value * scale + unmet)
        return matrix

    lower, _, retries = damped_cholesky(damped, gram, ridge)
    return lambda right: torch.cholesky_solve(right.T, lower).T, retries


def _scale(gram: Tensor) -> Tensor:
    """The diagonal of D, `(in,)`, float64."""
    diagonal = gram.diagonal().double().clamp(min=0)
    return diagonal + SCALE_FLOOR * diagonal.mean()


def on_support(weight: Tensor, stats: InputStats, fit: Fit, start: Tensor, support: Tensor, rows: Tensor) -> Tensor:
    """The same fit for rows with supports of their own, by conjugate gradients, `(rows, in)`, float64.

    Args:
        weight: W, `(out, in)`, float64.
        stats: of the inputs.
        fit: whose r and α hold.
        start: where to start, `(out, in)`.
        support: `(out, in)`, bool.
        rows: which outputs, int64.
    """
    matrix = stats.gram.to(torch.float64, copy=True)
    matrix.diagonal().add_(fit.ridge * 10**fit.retries * _scale(stats.gram) + float(stats.tokens == 0))
    target = weight[rows]
    if fit.strength:
        cross = output_residual_cross(weight.float(), stats)[rows].T.double()
        target = target + fit.strength * torch.linalg.solve(matrix, cross).T
    found = (start[rows] * support[rows]).T.contiguous()
    polish(matrix, target.T, found, support[rows].T, SUPPORT_STEPS)
    return found.T


def _validated(weight: Tensor, stats: InputStats, kept: Tensor) -> tuple[float, float]:
    """The ridge and the strength with the least error on the held-out tokens."""
    held = stats.held
    if held is None or not 0 < held.tokens < stats.tokens:
        return DEFAULT_RIDGE, 0.0
    rest, some = excluding(stats, held), slice(None, None, -(-len(weight) // VALIDATION_ROWS))
    rows = weight[some]
    cross = output_residual_cross(weight.float(), rest)[some][:, kept].double()
    held_cross = output_residual_cross(weight.float(), held)[some].double()
    best = (torch.inf, DEFAULT_RIDGE, 0.0)
    for ridge in RIDGE_GRID:
        solve, retries = solver(rest.gram, kept, ridge)
        if retries:
            continue  # another ridge than this was tried
        change = -rows
        change[:, kept] += solve(products(rows, rest.gram, kept, ridge))
        # ‖change X − E‖² per token, less that of E; then of change + α delta.
        moved = change.to(held.gram.dtype) @ held.gram
        error = float((change * (moved - 2 * held_cross)).sum())
        strength = 0.0
        if bool(cross.any()):
            delta = torch.zeros_like(rows)
            delta[:, kept] = solve(cross)
            gain = float((delta * (held_cross - moved)).sum())
            cost = float((delta * (delta.to(held.gram.dtype) @ held.gram)).sum())
            strength = line_minimum(gain, cost)
            error += strength * (strength * cost - 2 * gain)
        best = min(best, (error, ridge, strength))
    return best[1:]
