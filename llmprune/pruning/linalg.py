"""Damped factorisations of Grams, and the relative output error by which every method is compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.errors import NumericalError
from llmprune.pruning.problem import InputStats

MAX_RETRIES = 3
TILE = 256
ALL = slice(None)


@dataclass(frozen=True, slots=True)
class InverseFactor:
    """`(H + λI)⁻¹ = Uᵀ U` with U upper triangular.

    Args:
        upper: U, `(in, in)`.
        ridge: λ.
        retries: how often λ was raised tenfold before the factorisation succeeded.
    """

    upper: Tensor
    ridge: float
    retries: int


def ridge_of(gram: Tensor, damping: float) -> float:
    """The ridge `λ = damping · mean(diag H)` of a Gram H, `(in, in)`.

    Raises:
        NumericalError: the Gram's diagonal is not finite.
    """
    if damping <= 0:
        raise ValueError(f"damping must be positive, not {damping}")
    mean = float(gram.diagonal().double().mean())
    if not math.isfinite(mean):
        raise NumericalError("the input statistics hold NaN or Inf", "check the model on this calibration text")
    return damping * mean


def add_ridge(gram: Tensor, ridge: float) -> Tensor:
    """The damped Gram `H + λI`, a new matrix `(in, in)`, with 1 added where an input is always zero (`H_jj = 0`)."""
    matrix = gram.clone()
    matrix.diagonal().add_(ridge + (gram.diagonal() == 0).to(gram.dtype))
    return matrix


def inverse_factor(gram: Tensor, damping: float) -> InverseFactor:
    """The upper triangular factor of the inverse of the damped Gram, `H + λI` with `λ = damping · mean(diag H)`.

    With J the reversal of the inputs, the Cholesky factor L of `J (H + λI) J` gives `H + λI = R Rᵀ`, `R = J L J` upper
    triangular, and `U = R⁻¹`: one factorisation and one triangular inverse instead of a factorisation, an inverse and
    a second factorisation (SparseGPT). Inputs that are always zero (`H_jj = 0`) get `H_jj = 1`.

    Args:
        gram: H, `(in, in)`, symmetric, float32 or float64.
        damping: fraction of the mean diagonal, positive.

    Raises:
        NumericalError: the Gram is not finite, or the matrix is not positive definite even after the damping was raised
            tenfold `MAX_RETRIES` times.
    """
    diagonal = gram.diagonal()
    for retries, ridge in _rising_ridges(gram, damping):
        flipped = gram.flip(0, 1)
        flipped.diagonal().add_(ridge + (diagonal == 0).to(gram.dtype).flip(0))
        lower, info = torch.linalg.cholesky_ex(flipped)
        del flipped
        if int(info) == 0:
            _invert_lower(lower)
            if bool(torch.isfinite(lower.diagonal()).all()):
                return InverseFactor(lower.flip(0, 1), ridge, retries)
    raise _singular(damping)


def damped_inverse(gram: Tensor, damping: float) -> tuple[Tensor, Tensor, int]:
    """The inverse of the damped Gram `A = H + λI`.

    No more than two matrices of that size are in memory at a time.

    Args:
        gram: H, `(in, in)`, symmetric, float32 or float64.
        damping: λ as a fraction of the mean diagonal of H; raised tenfold where A is singular.

    Returns:
        `A⁻¹`, `(in, in)`; what was added to the diagonal of H, `(in,)`, both float64; how often λ was raised.

    Raises:
        NumericalError: as `inverse_factor`.
    """
    dead = (gram.diagonal() == 0).double()

    def damped(ridge: float) -> Tensor:
        matrix = gram.to(torch.float64, copy=True)
        matrix.diagonal().add_(dead + ridge)
        return matrix

    lower, ridge, retries = damped_cholesky(damped, gram, damping)
    return torch.cholesky_inverse(lower), dead + ridge, retries


def damped_cholesky(damped: Callable[[float], Tensor], gram: Tensor, damping: float) -> tuple[Tensor, float, int]:
    """The lower Cholesky factor of a matrix with a ridge, raised tenfold as often as the matrix is singular.

    Args:
        damped: makes the matrix, symmetric, for a ridge λ.
        gram: H, `(in, in)`, whose mean diagonal is the unit of the damping.
        damping: λ as a fraction of it.

    Returns:
        the factor, λ, and how often it was raised.

    Raises:
        NumericalError: as `inverse_factor`.
    """
    for retries, ridge in _rising_ridges(gram, damping):
        lower, info = torch.linalg.cholesky_ex(damped(ridge))
        if int(info) == 0:
            return lower, ridge, retries
    raise _singular(damping)


def _rising_ridges(gram: Tensor, damping: float) -> Iterator[tuple[int, float]]:
    """The number of the retry, and λ, raised tenfold each time."""
    base = ridge_of(gram, damping)
    return ((retries, base * 10**retries) for retries in range(MAX_RETRIES + 1))


def _singular(damping: float) -> NumericalError:
    return NumericalError(
        f"the input statistics stay singular with a damping of {damping * 10**MAX_RETRIES:g} of the mean diagonal",
        "use more calibration tokens (--samples, --seq-len) or another text (--calib)",
    )


def _invert_lower(lower: Tensor) -> None:
    """Invert a lower triangular matrix in place, by halves: `[[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [−C⁻¹ B A⁻¹, C⁻¹]]`.

    Nearly all of it is matrix products, several times faster than a triangular solve for the identity.
    """
    width = len(lower)
    if width <= TILE:
        eye = torch.eye(width, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
        return
    half = width // 2
    first, corner, second = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    _invert_lower(first)
    _invert_lower(second)
    corner.copy_(torch.mm(second, corner @ first).neg_())


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add `rowsᵀ rows` to `total`, of which only the lower triangle is valid: little more than half the work.

    BLAS has a routine for this (syrk), but torch does not offer it, and another library's threads slow torch's down.

    Args:
        total: `(in, in)`.
        rows: `(tokens, in)`, same dtype.
    """
    for start in range(0, rows.shape[1], TILE):
        stop = min(start + TILE, rows.shape[1])
        total[start:stop, :stop].addmm_(rows[:, start:stop].T, rows[:, :stop])


def output_energy(weight: Tensor, gram: Tensor) -> float:
    """The mean squared norm of a layer's output per token, `tr(W G Wᵀ) = ⟨G, WᵀW⟩`.

    Args:
        weight: W, `(out, in)`.
        gram: G, `(in, in)`, symmetric.
    """
    square = torch.zeros_like(gram)
    add_gram(square, weight)
    square.tril_().mul_(gram)
    return float(2 * square.sum(dtype=torch.float64) - square.diagonal().sum(dtype=torch.float64))


def relative_error(weight: Tensor, pruned: Tensor, stats: InputStats) -> float:
    """The relative squared error of the layer's output, `‖X W̃ᵀ − Y_d‖² / ‖Y_d‖²`, with `Y_d = X_d Wᵀ`.

    Without statistics of the dense model the target is `X Wᵀ`, and this is `tr(D G Dᵀ) / tr(W G Wᵀ)`, `D = W̃ − W`.
    With a cross Gram it is `[tr(W̃ G W̃ᵀ) − 2 tr(W̃ C Wᵀ) + tr(W G_d Wᵀ)] / tr(W G_d Wᵀ)`; where the products with the
    outputs themselves are known, `C Wᵀ = XᵀY_d` and `tr(W G_d Wᵀ) = ‖Y_d‖²` are these.

    Args:
        weight: W, the dense weight, `(out, in)`.
        pruned: W̃, the pruned weight, `(out, in)`.
        stats: of the layer's inputs.
    """
    return clamped_ratio(*error_terms(weight, pruned, stats))


def error_terms(weight: Tensor, pruned: Tensor, stats: InputStats, rows: slice = ALL) -> tuple[float, float]:
    """Numerator and denominator of `relative_error` for some of the outputs, per token; both are sums over these."""
    weight, pruned = weight[rows], pruned[rows]
    if stats.output_cross is not None and stats.output_energy is not None:
        energy = float(stats.output_energy[rows].sum(dtype=torch.float64))
        product = float((pruned * stats.output_cross[:, rows].T).sum(dtype=torch.float64))
    elif stats.cross is not None and stats.dense is not None:
        energy = output_energy(weight, stats.dense)
        product = float((pruned @ stats.cross).mul_(weight).sum(dtype=torch.float64))
    else:
        return output_energy(pruned - weight, stats.gram), output_energy(weight, stats.gram)
    return output_energy(pruned, stats.gram) - 2 * product + energy, energy


def clamped_ratio(error: float, energy: float) -> float:
    """`error / energy`, at least 0, as what is negative is rounding; 0 where there is no energy."""
    return max(error / energy, 0.0) if energy > 0 else 0.0


def line_minimum(gain: float, cost: float) -> float:
    """The α in [0, 1] that minimises the parabola `cost α² − 2 gain α`."""
    return min(max(gain / max(cost, 1e-300), 0.0), 1.0)
