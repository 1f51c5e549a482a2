"""Least squares on the output projections of the experts that stay, towards the dense mixture's output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.pruning.criteria.reconstruct import SCALE_FLOOR
from llmprune.pruning.linalg import damped_cholesky
from llmprune.runtime.process_group import SINGLE, ProcessGroup

RIDGES = (3.0, 1.0, 0.3, 0.1, 0.03)
"""Tried in this order, each from the solution of the one before."""
SWEEPS = 3
"""Passes over all experts once the ridge is known."""


@dataclass(frozen=True, slots=True)
class RefitProblem:
    """A mixture `y(t) = Σ_e W_e z_e(t)`, `z_e = g_e h_e`, whose output is to be nearer to a target.

    Args:
        count: number of experts.
        shape: of a `W_e`, `(out, in)`.
        inputs: of an expert: the numbers of this process's tokens that are sent to it, `(n,)`, int64, and `z_e`,
            `(n, in)`, float32.
        residual: target − y, `(tokens, out)`, float32, of this process's tokens.
        held_out: which tokens choose the ridge, `(tokens,)`, bool.
    """

    count: int
    shape: tuple[int, int]
    inputs: Callable[[int], tuple[Tensor, Tensor]]
    residual: Tensor
    held_out: Tensor


@dataclass(frozen=True, slots=True)
class Refit:
    """The changes of the output projections.

    Args:
        changes: of every `W_e`, `(out, in)`, float32.
        ridge: r; inf where held-out tokens are better off without a refit, which is then left out.
        retries: how often r was raised tenfold at most before a Gram could be factored.
    """

    changes: Sequence[Tensor]
    ridge: float
    retries: int = 0


def refit(problem: RefitProblem, group: ProcessGroup = SINGLE) -> Refit:
    """Minimise `Σ_t ‖T(t) − Σ_e (W_e + Δ_e) z_e(t)‖² + r Σ_e ‖Δ_e D_e^½‖²` over all Δ, one expert after the other.

    With all others fixed, `Δ_e` is a least-squares problem in the tokens of one expert: block Gauss-Seidel on the
    normal equations of the whole mixture, whose Gram `(experts · in)²` is never formed. The ridge is diagonal-scaled,
    `D_e = diag(Z_eᵀ Z_e)`; r is the one of `RIDGES` with the least error on held-out tokens when all others have been
    fitted to.

    Args:
        problem: the mixture.
        group: the processes that have the other tokens.

    Raises:
        NumericalError: a Gram stays singular.
    """
    best, (least,) = torch.inf, group.sum([_square(problem.residual[problem.held_out])])
    path = _Sweeps(problem, ~problem.held_out, group)
    for ridge in RIDGES if bool(group.sum([float(problem.held_out.sum())])[0]) else ():
        path.sweep(ridge)
        (error,) = group.sum([_square(path.residual[problem.held_out])])
        if error >= least:
            break
        best, least = ridge, error
    if best == torch.inf:
        return Refit([torch.zeros_like(change) for change in path.changes], best)
    whole = _Sweeps(problem, torch.ones_like(problem.held_out), group)
    for _ in range(SWEEPS):
        whole.sweep(best)
    return Refit(whole.changes, best, max(path.retries, whole.retries))


class _Sweeps:
    """Passes of block Gauss-Seidel over the experts.

    Args:
        problem: the mixture.
        fitted: the tokens that are fitted to, `(tokens,)`, bool.
        group: the processes.
    """

    def __init__(self, problem: RefitProblem, fitted: Tensor, group: ProcessGroup) -> None:
        self.problem, self.fitted, self.group = problem, fitted, group
        self.residual = problem.residual.clone()
        self.changes = [torch.zeros(problem.shape, device=self.residual.device) for _ in range(problem.count)]
        self.retries = 0

    def sweep(self, ridge: float) -> None:
        """Solve for every expert in turn, and take what it changes off the residual of all tokens."""
        for expert in range(self.problem.count):
            tokens, inputs = self.problem.inputs(expert)
            step = self._step(self.changes[expert], tokens, inputs, ridge)
            if step is not None:
                self.changes[expert] += step
                self.residual.index_add_(0, tokens, inputs @ step.T, alpha=-1)

    def _step(self, change: Tensor, tokens: Tensor, inputs: Tensor, ridge: float) -> Tensor | None:
        """The change of `Δ_e` that minimises the error while the other experts stay; None without tokens."""
        fitted = self.fitted[tokens]
        rows = inputs[fitted]
        gram, cross = rows.T @ rows, self.residual[tokens[fitted]].T @ rows
        (count,) = self.group.sum([len(rows)])
        self.group.all_reduce([gram, cross])
        diagonal = gram.diagonal().double().clamp(min=0)
        if not count or float(diagonal.sum()) == 0:
            return None
        mean = diagonal.mean()
        scale = diagonal / mean + SCALE_FLOOR

        def damped(value: float) -> Tensor:
            matrix = gram.to(torch.float64, copy=True)
            matrix.diagonal().add_(value * scale)
            return matrix

        lower, used, retries = damped_cholesky(damped, gram, ridge)
        self.retries = max(self.retries, retries)
        right = cross.double() - used * change.double() * scale
        return torch.cholesky_solve(right.T, lower).T.float()


def _square(residual: Tensor) -> float:
    return float(residual.square().sum(dtype=torch.float64))
