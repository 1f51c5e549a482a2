"""ADMM: mask and weights are sought together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.linalg import add_ridge, inverse_factor
from llmprune.methods.magnitude import by_magnitude
from llmprune.pattern import NM, Scope, SparsityPattern, Unstructured, lowest
from llmprune.problem import GroupProblem, LayerSolution, Status
from llmprune.refit import polish

RELAXATION = 1.4
POLISH = 2


@dataclass(frozen=True, slots=True)
class ADMM:
    """Split the problem into a ridge regression without a pattern and a projection without a Gram, and alternate.

    For `min tr((W − W*)ᵀ A (W − W*))` over W in the pattern, `A = H + λI`, with a penalty `ρD` (D diagonal) and the
    state X, the sum of the regression's weights and the running sum of their distance to the pattern:

        Z  = the projection of X: what goes has the smallest D_jj X_ij²
        W  = argmin tr((W − W*)ᵀ A (W − W*)) + ρ tr((W − (2Z − X))ᵀ D (W − (2Z − X)))
        X += 1.4 (W − Z)

    A small ρ changes the mask freely, a large one freezes it: ρ grows by a constant factor from `start` to `end`.
    Two steps of conjugate gradients on the final mask bring the weights to their optimum.

    Differs from ALPS (Meng et al. 2024), whose quality on real layers it reaches at a small part of the price:
    `D_jj = 1 / [A⁻¹]_jj`, the saliency of optimal brain surgeon, instead of `A_jj`; a fixed number of iterations, each
    over-relaxed; and one matrix product an iteration instead of two with the eigenvectors of A. For that,
    `ρ(A + ρD)⁻¹` is computed at the two ends of the path and interpolated linearly in `log ρ`: along an eigenvector it
    is a logistic function of `log ρ`, nearly straight over so short a path.

    Args:
        damping: λ as a fraction of the mean diagonal of H.
        iterations: number of matrix products of the weights' size; more are better and slower.
        start: ρ at the beginning; above 1, the mask of uncorrelated inputs does not move.
        end: ρ at the end.
    """

    scope: ClassVar[Scope] = "layer"

    damping: float = 0.03
    iterations: int = 10
    start: float = 1.1
    end: float = 4.0

    def solve(self, problem: GroupProblem, pattern: SparsityPattern) -> list[LayerSolution]:
        """Prune the layers of one group together."""
        gram = problem.stats.gram
        if problem.stats.tokens == 0:
            return [by_magnitude(layer.weight, pattern, Status.NO_INPUT) for layer in problem.layers]
        factor = inverse_factor(gram, self.damping)
        A = add_ridge(gram, factor.ridge)
        scale = factor.upper.square().sum(0).sqrt()[:, None]
        target = torch.cat([layer.weight.T for layer in problem.layers], dim=1)
        score = _Score(problem, pattern, target)
        state = self._iterate(A * scale * scale.T, target / scale, score)
        support = score.final(state)
        weight = state.mul_(scale)
        weight[score.dead] = target[score.dead]
        weight.mul_(support)
        polish(A, target, weight, support, POLISH)
        status = Status.DAMPING_RAISED if factor.raises else Status.OK
        stats = {"ridge": factor.ridge, "damping_raises": float(factor.raises)}
        return [
            LayerSolution(rows, mask, status, dict(stats))
            for rows, mask in zip(problem.split(weight.T), problem.split(support.T), strict=True)
        ]

    def _iterate(self, A: Tensor, target: Tensor, score: _Score) -> Tensor:
        """The state X after all iterations, `(in, rows)`; in coordinates in which D is the identity."""
        first, last = _resolvent(A, self.start), _resolvent(A, self.end)
        state, between = target.clone(), torch.empty_like(A)
        projected, step = torch.empty_like(state), torch.empty_like(state)
        for at in range(self.iterations):
            torch.lerp(first, last, (at + 0.5) / self.iterations, out=between)
            torch.mul(state, score.kept(state), out=projected)
            torch.sub(projected, state, out=step).add_(projected).sub_(target)
            state.sub_(projected, alpha=RELAXATION).add_(target, alpha=RELAXATION)
            state.addmm_(between, step, alpha=RELAXATION)
        return state


def _resolvent(A: Tensor, rho: float) -> Tensor:
    """`ρ(A + ρI)⁻¹`."""
    shifted = A.clone()
    shifted.diagonal().add_(rho)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted)).mul_(rho)


class _Score:
    """Chooses the weights that stay by the size of a state `(in, rows)`; existing zeros and dead inputs go first."""

    def __init__(self, problem: GroupProblem, pattern: SparsityPattern, target: Tensor) -> None:
        if not isinstance(pattern, NM | Unstructured):
            raise TypeError(f"admm has no rule for {pattern.name}")
        self.problem, self.pattern = problem, pattern
        self.dead = problem.stats.gram.diagonal() == 0
        zeros = target == 0
        self.zeros = zeros if bool(zeros.any()) else None
        self.score = torch.empty_like(target)

    def kept(self, state: Tensor) -> Tensor:
        """Mask of the weights that stay, `(in, rows)`."""
        score, pattern = self._of(state), self.pattern
        if isinstance(pattern, NM):
            groups = score.view(-1, pattern.m, score.shape[1]).transpose(0, 1)
            gone = lowest(groups, pattern.n, dim=0).transpose(0, 1).reshape(score.shape)
        else:
            gone = torch.cat([~pattern.project(rows).T for rows in self.problem.split(score.T)], dim=1)
        return gone.logical_not_() if self.zeros is None else gone.logical_or_(self.zeros).logical_not_()

    def final(self, state: Tensor) -> Tensor:
        """The same, with ties broken as every method breaks them."""
        kept = torch.cat([self.pattern.project(rows).T for rows in self.problem.split(self._of(state).T)], dim=1)
        return kept if self.zeros is None else kept & ~self.zeros

    def _of(self, state: Tensor) -> Tensor:
        score = torch.abs(state, out=self.score)
        score[self.dead] = -1.0
        return score if self.zeros is None else score.masked_fill_(self.zeros, -torch.inf)
