"""ADMM: mask and weights are optimised together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.pruning.least_squares import polish
from llmprune.pruning.linalg import add_ridge, inverse_factor
from llmprune.pruning.lowest import kth_lowest
from llmprune.pruning.methods import Cost, Method
from llmprune.pruning.methods.magnitude import by_magnitude
from llmprune.pruning.pattern import SparsityPattern
from llmprune.pruning.problem import GroupProblem, LayerSolution, Status

RELAXATION = 1.4
POLISH_STEPS = 2
COUNT_STEPS = 3


@dataclass(frozen=True, slots=True)
class ADMM(Method):
    """Split the problem into a ridge regression without a pattern and a projection without a Gram, and alternate.

    For `min tr((W − W*)ᵀ A (W − W*))` over W in the pattern, `A = H + λI`, with a penalty `ρD` (D diagonal) and the
    state X, the sum of the regression's weights and the running sum of their distance to the pattern:

        Z  = the projection of X on the pattern: pruned are the smallest D_jj X_ij²
        W  = argmin tr((W − W*)ᵀ A (W − W*)) + ρ tr((W − (2Z − X))ᵀ D (W − (2Z − X)))
        X += 1.4 (W − Z)

    A small ρ changes the mask freely, a large one freezes it: ρ grows by a constant factor from `start` to `end`.
    Two steps of conjugate gradients on the final mask bring the weights near their optimum: with the ridge of the
    efforts within a thousandth of the least loss, without one within some per cent where tokens are few (`refit` goes
    on from there).

    `D_jj = (A_jj / [A⁻¹]_jj)^½`, between what a weight costs if no other weight moves (`A_jj`) and if all do
    (`1 / [A⁻¹]_jj`): the kept ones do, the pruned ones cannot.

    Differs from ALPS (Meng et al. 2024): that D instead of `A_jj`; a fixed number of iterations, each over-relaxed; and
    one matrix product an iteration instead of two with the eigenvectors of A. For that, `ρ(A + ρD)⁻¹` is computed at
    the two ends of the path and interpolated linearly in `log ρ`: along an eigenvector it is a logistic function of
    `log ρ`, nearly straight over so short a path. Counts of an unstructured pattern are exact at the end only.

    Args:
        damping: λ as a fraction of the mean diagonal of H.
        iterations: number of matrix products of the weights' size; more are better and slower.
        start: ρ at the beginning; from 1 on, the mask of uncorrelated inputs does not move.
        end: ρ at the end.
    """

    cost: ClassVar[Cost] = Cost(products=15, squares=4.1, stacks=5.2)

    damping: float = 0.01
    iterations: int = 8
    start: float = 0.6
    end: float = 1.8

    def solve(self, problem: GroupProblem, pattern: SparsityPattern) -> list[LayerSolution]:
        """Prune the layers of one group together."""
        gram = problem.stats.gram
        if problem.stats.tokens == 0:
            return [by_magnitude(layer.weight, pattern, Status.NO_INPUT) for layer in problem.layers]
        scale, ridge, retries = self._scale(gram)
        target = torch.cat([layer.weight.T for layer in problem.layers], dim=1)
        choice = _Choice(problem, pattern, target)
        # Of matrices as large as the Gram there are never more at a time than needed.
        state = self._iterate(add_ridge(gram, ridge).mul_(scale).mul_(scale.T), target / scale, choice)
        support = choice.exact(state)
        weight = state.mul_(scale)
        weight[choice.dead] = target[choice.dead]
        weight.mul_(support)
        polish(add_ridge(gram, ridge), target, weight, support, POLISH_STEPS)
        status = Status.DAMPING_RAISED if retries else Status.OK
        stats = {"damping_lambda": ridge, "damping_retries": float(retries)}
        return [
            LayerSolution(rows, mask, status, dict(stats))
            for rows, mask in zip(problem.split(weight.T), problem.split(support.T), strict=True)
        ]

    def _scale(self, gram: Tensor) -> tuple[Tensor, float, int]:
        """`D^−½`, `(in, 1)`; and λ, and how often it was raised."""
        factor = inverse_factor(gram, self.damping)
        diagonal = gram.diagonal() + factor.ridge + (gram.diagonal() == 0).to(gram.dtype)
        scale = (factor.upper.square_().sum(0) / diagonal).pow(0.25)
        return scale[:, None], factor.ridge, factor.retries

    def _iterate(self, A: Tensor, target: Tensor, choice: _Choice) -> Tensor:
        """The state X after all iterations, `(in, rows)`, in coordinates in which D is the identity.

        With `R = 2Z − X − W*` and `K = ρ(A + ρI)⁻¹`, `W = W* + KR`, and an iteration with relaxation α is
        `X = (1 − α/2) X + (α/2) W* + α (K − I/2) R`: few passes over the weights beside the product.
        """
        matrix = _half_reflection(A, self.start)
        change = _half_reflection(A, self.end).sub_(matrix).div_(self.iterations)
        del A
        matrix.add_(change, alpha=-0.5)
        state, negated = target.clone(), torch.empty_like(target)
        for _ in range(self.iterations):
            matrix.add_(change)
            kept = choice.kept(state)
            torch.add(state, target, out=negated).addcmul_(state, kept, value=-2)
            state.add_(target, alpha=RELAXATION / (2 - RELAXATION))
            state.addmm_(matrix, negated, beta=1 - RELAXATION / 2, alpha=-RELAXATION)
        return state


def _half_reflection(A: Tensor, rho: float) -> Tensor:
    """`ρ(A + ρI)⁻¹ − I/2`."""
    shifted = A.clone()
    shifted.diagonal().add_(rho)
    lower = torch.linalg.cholesky(shifted)
    del shifted
    matrix = torch.cholesky_inverse(lower).mul_(rho)
    matrix.diagonal().sub_(0.5)
    return matrix


class _Choice:
    """Projects a state `(in, rows)` on the pattern by its size; existing zeros and dead inputs are pruned first."""

    def __init__(self, problem: GroupProblem, pattern: SparsityPattern, target: Tensor) -> None:
        self.problem, self.pattern = problem, pattern
        self.dead = problem.stats.gram.diagonal() == 0
        zeros = target == 0
        self.zeros = zeros if bool(zeros.any()) else None
        self.score = torch.empty_like(target)
        self.threshold: _Threshold | None = None

    def exact(self, state: Tensor) -> Tensor:
        """Mask of the kept weights, `(in, rows)`."""
        support = self._projected(self._score(state))
        return support if self.zeros is None else support & ~self.zeros

    def kept(self, state: Tensor) -> Tensor:
        """1 for the kept weights, 0 for the others, `(in, rows)`; a count over a row or layer is only nearly right."""
        score = self._score(state)
        if self.pattern.nm is not None:
            n, m = self.pattern.nm
            groups = score.view(-1, m, score.shape[1]).transpose(0, 1)
            groups.gt_(kth_lowest(groups, n, dim=0))
            return score
        if not self.pattern.elementwise:
            return score.copy_(self._projected(score))
        if self.threshold is None:
            self.threshold = _Threshold(self.problem, self.pattern, score)
        return score.gt_(self.threshold.follow(score))

    def _projected(self, score: Tensor) -> Tensor:
        return torch.cat([self.pattern.project(rows).T for rows in self.problem.split(score.T)], dim=1)

    def _score(self, state: Tensor) -> Tensor:
        score = torch.abs(state, out=self.score)
        score[self.dead] = -1.0
        return score if self.zeros is None else score.masked_fill_(self.zeros, -torch.inf)


class _Threshold:
    """The size up to which weights of a row are pruned, followed from iteration to iteration by counting.

    A selection costs as much as the iteration's matrix product, a count almost nothing.

    Args:
        problem: the layers.
        pattern: an elementwise pattern without groups.
        score: of the first iteration, `(in, rows)`.
    """

    def __init__(self, problem: GroupProblem, pattern: SparsityPattern, score: Tensor) -> None:
        self.rows = None if pattern.rows_independent else [len(layer.weight) for layer in problem.layers]
        limits, counts = [], []
        for layer in problem.split(score.T):
            groups, count = pattern.groups(layer)
            limit = kth_lowest(groups, count)[:, 0] if count else groups.new_zeros(len(groups))
            limits.append(limit.expand(len(layer)))
            counts.append(torch.full_like(limits[-1], count))
        self.limit, self.wanted = torch.cat(limits).clamp(min=0.0), torch.cat(counts)

    def follow(self, score: Tensor) -> Tensor:
        """The threshold of every row for a score `(in, rows)`, exact after one step if sizes are evenly spread."""
        for _ in range(COUNT_STEPS):
            found = (score <= self.limit).sum(0)
            if self.rows:
                found = torch.cat([layer.sum().expand(len(layer)) for layer in torch.split(found, self.rows)])
            self.limit = self.limit * (self.wanted / found.clamp(min=1))
        return self.limit
