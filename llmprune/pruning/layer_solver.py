"""Solves a group of layers: dense targets, permutation, an iterative schedule of the method, refit, quantisation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from llmprune.pruning.dense_targets import TARGET_DAMPING, DenseTarget, dense_targets
from llmprune.pruning.grid import Grid
from llmprune.pruning.least_squares import refit
from llmprune.pruning.methods import Method
from llmprune.pruning.parallel import RowSharding
from llmprune.pruning.pattern import SparsityPattern
from llmprune.pruning.permutation import choose, saliency
from llmprune.pruning.problem import GroupProblem, GroupSolution, InputStats, LayerSolution, Status, unchanged
from llmprune.pruning.quantize import quantize
from llmprune.pruning.recipe import Recipe

DAMPINGS = (0.001, 0.01, 0.1, 1.0)
"""Of a layer that is only fitted: held-out tokens choose, see `dense_targets`."""


@dataclass(frozen=True, slots=True)
class LayerSolver:
    """Prunes and quantises the weights of a group of layers.

    Args:
        method: chooses the mask, and weights on it; None where no weight is pruned.
        recipe: the stages around the method.
        sharding: the processes that solve together.
    """

    method: Method | None
    recipe: Recipe
    sharding: RowSharding = field(default_factory=RowSharding)

    @property
    def options(self) -> dict[str, float]:
        """The options of the method."""
        return asdict(self.method) if self.method else {}  # type: ignore[call-overload]

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that the method needs beyond the Gram."""
        return self.method.needs if self.method else frozenset()

    @property
    def zero_threshold(self) -> float | None:
        """No method counts zeros."""
        return None

    def solve(self, problem: GroupProblem, pattern: SparsityPattern | None, grid: Grid | None = None) -> GroupSolution:
        """Prune and quantise the layers of one group.

        Args:
            problem: the group.
            pattern: the sparsity pattern of the weights; None keeps all.
            grid: of the weights that are kept; None allows any value.
        """
        fitted = pattern is None and grid is None
        dense = self.recipe.targets == "dense"
        if fitted and not dense:
            return unchanged(problem)
        dampings = DAMPINGS if fitted else (TARGET_DAMPING,)
        wanted = dense_targets(problem, dampings, self.sharding.group) if dense else DenseTarget(problem)
        goal = with_ridge(wanted.problem, self.recipe.ridge)
        order, retries = self._order(goal, pattern, problem.classes)
        if order is not None:
            goal = permuted(goal, order)
        solutions = self._stages(goal, pattern) if pattern else unchanged(goal).layers
        if grid is not None:
            period = pattern.group if pattern is not None and pattern.elementwise else None
            solutions = quantize(goal, solutions, grid, self.recipe.grid_passes, period=period)
        if order is not None:
            solutions = [reordered(solution, order.argsort()) for solution in solutions]
            for solution in solutions:
                solution.stats["permuted"] = 1.0
        for solution, strength in zip(solutions, wanted.strengths, strict=False):
            solution.stats["target_strength"] = strength
        solutions = [with_stats(s, target_retries=wanted.retries, order_retries=retries) for s in solutions]
        # What was solved together is the same in all processes already, but for what every process does behind it.
        apart = self.recipe.refit or grid is not None or fitted
        return GroupSolution(self.sharding.agreed(solutions) if apart else solutions, order)

    def solve_once(self, problem: GroupProblem, pattern: SparsityPattern) -> list[LayerSolution]:
        """The solutions of the method alone, without the stages around it."""
        assert self.method is not None
        return self.sharding.solve(self.method.solve, problem, pattern)

    def _order(
        self, goal: GroupProblem, pattern: SparsityPattern | None, classes: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, int]:
        """An order that keeps more, None for the one that is; and how often the damping of its scores was raised."""
        if not classes or not self.recipe.permute or pattern is None or not pattern.permutable:
            return None, 0
        (layer,) = goal.layers
        score, retries = saliency(layer.weight, goal.stats.gram)
        order = self.sharding.agreed_order(choose(score, pattern, classes))
        if order is None or bool((order == torch.arange(len(order), device=order.device)).all()):
            return None, retries
        return order, retries

    def _stages(self, goal: GroupProblem, pattern: SparsityPattern) -> list[LayerSolution]:
        """Reach the pattern in nested steps: zeros stay zero, so each step's mask lies within the one before.

        Every step but the last is followed by a refit: the next one takes its weights for the optimum on their support.
        """
        solutions: list[LayerSolution] = []
        current = goal
        *early, last = pattern.steps(self.recipe.steps)
        shapes = [layer.weight.shape for layer in goal.layers]
        # A small ratio of a small layer may round to nothing in the first steps.
        for step in [step for step in early if not any(step.mismatch(*shape) for shape in shapes)] + [last]:
            solutions = self.solve_once(current, step)
            if self.recipe.refit or step is not last:
                solutions = refit(goal, solutions)
            layers = tuple(replace(old, weight=new.weight) for old, new in zip(goal.layers, solutions, strict=True))
            current = replace(goal, layers=layers)
        return solutions


def with_ridge(problem: GroupProblem, ridge: float) -> GroupProblem:
    """The problem with a diagonal-scaled ridge (Tikhonov): `H + r diag H` in place of the Gram H.

    `tr(D (H + r diag H) Dᵀ)` pulls every weight to its target on the scale of its own input. Few tokens, of one kind of
    text, make inputs look more correlated than they are elsewhere; with the ridge they compensate less for each other.

    Args:
        problem: a group.
        ridge: r, fraction of every input's mean square.
    """
    if not ridge:
        return problem
    gram = problem.stats.gram.clone()
    gram.diagonal().mul_(1 + ridge)
    return replace(problem, stats=replace(problem.stats, gram=gram))


def with_stats(solution: LayerSolution, **retries: int) -> LayerSolution:
    """The solution with the dampings that other stages had to raise, if they had to."""
    more = {name: float(count) for name, count in retries.items() if count}
    if not more:
        return solution
    status = Status.DAMPING_RAISED if solution.status is Status.OK else solution.status
    return replace(solution, status=status, stats=solution.stats | more)


def permuted(problem: GroupProblem, order: Tensor) -> GroupProblem:
    """The same problem with its inputs in another order."""
    layers = tuple(replace(layer, weight=layer.weight[:, order]) for layer in problem.layers)
    scale = None if problem.stats.scale is None else problem.stats.scale[order]
    return GroupProblem(layers, InputStats(problem.stats.tokens, problem.stats.gram[order][:, order], scale=scale))


def reordered(solution: LayerSolution, order: Tensor) -> LayerSolution:
    """The same solution with its inputs in another order."""
    scales = solution.scales and replace(solution.scales, group_of=solution.scales.group_of[order])
    return replace(solution, weight=solution.weight[:, order], mask=solution.mask[:, order], scales=scales)
