"""Exact least squares on a given support."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmprune.pruning.linalg import add_ridge, ridge_of
from llmprune.pruning.problem import GroupProblem, LayerSolution

ROWS_AT_A_TIME = 256


def refit(
    problem: GroupProblem,
    solutions: list[LayerSolution],
    damping: float = 0.01,
    iterations: int = 12,
    tolerance: float = 1e-4,
) -> list[LayerSolution]:
    """Refit the kept weights: `min tr((W̃ − W)(H + λI)(W̃ − W)ᵀ)` over W̃ that is zero off the support.

    The rows are independent, and each is solved by conjugate gradients preconditioned with the diagonal, from the
    solution's weights on (the `pcg` step of ALPS, Meng et al. 2024). All rows of a group advance together, so an
    iteration is one matrix product; a row that has converged stays as it is. Equivalent to one dense solve a row
    (`A_SS w_S = (w* A)_S`), at a fraction of its price. The masks are never touched.

    Args:
        problem: the layers, whose weights W are the unconstrained optimum, and their Gram H.
        solutions: one per layer, by any method.
        damping: λ as a fraction of the mean diagonal of H.
        iterations: most steps; on real layers the first eight give most of the gain.
        tolerance: a row is done when its residual, in the preconditioner's norm, is this fraction of `(w* A)_S`.
    """
    if problem.stats.tokens == 0:
        return list(solutions)
    gram = problem.stats.gram
    A = add_ridge(gram, ridge_of(gram, damping))
    target = torch.cat([layer.weight.T for layer in problem.layers], dim=1)
    weight = torch.cat([solution.weight.T for solution in solutions], dim=1)
    support = torch.cat([solution.mask.T for solution in solutions], dim=1)
    polish(A, target, weight, support, iterations, tolerance)
    return [replace(old, weight=new) for old, new in zip(solutions, problem.split(weight.T), strict=True)]


def polish(A: Tensor, target: Tensor, weight: Tensor, support: Tensor, iterations: int, tolerance: float = 0.0) -> None:
    """Conjugate gradients for `min tr((W − W*)ᵀ A (W − W*))` on a support, in place; rows of a layer are columns here.

    Args:
        A: `(in, in)`, symmetric positive definite.
        target: W*, `(in, rows)`.
        weight: W, `(in, rows)`, zero off the support; where to start, and the result.
        support: `(in, rows)`, bool.
        iterations: most steps.
        tolerance: of a row's residual, relative to `(A W*)_S`.
    """
    # A few rows at a time: their vectors stay in the cache between the products.
    parts = (torch.split(matrix, ROWS_AT_A_TIME, dim=1) for matrix in (target, weight, support))
    for wanted, start, kept in zip(*parts, strict=True):
        _polish(A, wanted, start, kept, iterations, tolerance)


def _polish(A: Tensor, target: Tensor, weight: Tensor, support: Tensor, iterations: int, tolerance: float) -> None:
    """With E = diag(A)^½, the steps of W·E for E⁻¹AE⁻¹: the preconditioned method without its products by E."""
    inverse = A.diagonal().rsqrt()[:, None]
    mask = support.to(A.dtype).mul_(inverse)
    residual = (A @ (target - weight)).mul_(mask)
    squares = residual.square().sum(0)
    enough = (A @ target).mul_(mask).square_().sum(0).mul_(tolerance**2) if tolerance else torch.zeros_like(squares)
    direction, change = residual.clone(), torch.zeros_like(residual)
    image, scaled = torch.empty_like(residual), torch.empty_like(residual)
    for _ in range(iterations):
        active = squares > enough
        if not bool(active.any()):
            break
        torch.mm(A, torch.mul(direction, inverse, out=scaled), out=image)
        image.mul_(mask)
        curvature = torch.mul(direction, image, out=scaled).sum(0)
        # Rounding can leave a singular Gram without curvature in some direction: such a row stays where it is.
        active &= curvature > 0
        step = torch.where(active, squares / curvature, 0.0)
        change.addcmul_(direction, step)
        residual.addcmul_(image, step, value=-1)
        before, squares = squares, residual.square().sum(0)
        direction.mul_(torch.where(active, squares / before, 0.0)).add_(residual)
    weight.add_(change.mul_(inverse))
