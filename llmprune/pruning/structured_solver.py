"""Removes inputs of a layer: the criterion in an iterative schedule, least squares, then the pattern."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from llmprune.pruning.criteria import Criterion
from llmprune.pruning.criteria.problem import RemovalProblem
from llmprune.pruning.criteria.reconstruct import least_squares, on_support, reconstruct
from llmprune.pruning.criteria.scores import Magnitude
from llmprune.pruning.grid import Grid
from llmprune.pruning.layer_solver import LayerSolver
from llmprune.pruning.linalg import relative_error
from llmprune.pruning.parallel import RowSharding
from llmprune.pruning.pattern import SparsityPattern
from llmprune.pruning.permutation import classes_left
from llmprune.pruning.problem import (
    GroupProblem,
    GroupSolution,
    InputStats,
    LayerSolution,
    Status,
    UnitRemoval,
    unchanged,
)
from llmprune.pruning.recipe import Recipe


@dataclass(frozen=True, slots=True)
class StructuredSolver:
    """Removes inputs of layers, and prunes the weights of the others.

    Args:
        criterion: chooses the inputs to be removed; None where no layer loses any.
        recipe: its `steps`, `targets` and `compensate` count here.
        inner: prunes the kept weights, and layers that lose no inputs.
        sharding: the processes that must agree on the solutions.
    """

    criterion: Criterion | None
    recipe: Recipe
    inner: LayerSolver | None = None
    sharding: RowSharding = field(default_factory=RowSharding)

    @property
    def options(self) -> dict[str, float]:
        """The options of criterion and method."""
        own: dict[str, float] = asdict(self.criterion) if self.criterion else {}  # type: ignore[call-overload]
        return own | (self.inner.options if self.inner else {})

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that criterion and method need beyond the Gram."""
        parts: tuple[Criterion | LayerSolver | None, ...] = (self.criterion, self.inner)
        return frozenset().union(*(part.needs for part in parts if part is not None))

    @property
    def zero_threshold(self) -> float | None:
        """Fraction of the root mean square up to which an input counts as zero, if zeros are counted."""
        return self.criterion.zero_threshold if self.criterion else None

    def solve(self, problem: GroupProblem, pattern: SparsityPattern | None, grid: Grid | None = None) -> GroupSolution:
        """Remove the inputs that `problem.removal` asks for, then prune and quantise the kept weights.

        Args:
            problem: the group; one of several layers, or without a removal, is only pruned.
            pattern: the sparsity pattern of the kept weights; None leaves them.
            grid: of the kept weights; None allows any value.
        """
        if problem.removal is None:
            return self._pruned(problem, pattern, grid)
        solution, kept = self._removed(problem, problem.removal)
        found = GroupSolution([solution], kept)
        if (pattern or grid) and self.inner is not None:
            found = self._sparse(problem, solution, kept, pattern, grid)
        return GroupSolution(self.sharding.agreed(found.layers), self.sharding.agreed_order(found.order))

    def _pruned(self, problem: GroupProblem, pattern: SparsityPattern | None, grid: Grid | None) -> GroupSolution:
        return unchanged(problem) if self.inner is None else self.inner.solve(problem, pattern, grid)

    def solve_once(self, problem: GroupProblem, pattern: SparsityPattern) -> list[LayerSolution]:
        """The solutions of the method of the weights alone, without the stages around it."""
        return unchanged(problem).layers if self.inner is None else self.inner.solve_once(problem, pattern)

    def _removed(self, problem: GroupProblem, removal: UnitRemoval) -> tuple[LayerSolution, Tensor]:
        """The solution, zero in the removed inputs, and the kept inputs, `(k,)`, int64, rising."""
        (layer,) = problem.layers
        target = layer.weight.double()
        gram = problem.stats.gram
        scale = None if removal.scale is None else removal.scale.to(gram.device)
        asked = RemovalProblem(target, gram, removal.units.to(gram.device), scale, problem.stats.zero_fraction)
        reached = problem.stats.tokens > 0
        # An expert that no token came to keeps what is largest, as it is.
        kept, retries = self._choose(asked, removal.count) if reached else (_largest(asked, removal.count), 0)
        weight = torch.zeros_like(target)
        weight[:, kept] = target[:, kept]
        stats = {"error_uncompensated": relative_error(layer.weight, weight.float(), problem.stats)}
        stats |= {"choice_retries": float(retries)} if retries else {}
        mask = torch.zeros_like(weight, dtype=torch.bool)
        mask[:, kept] = layer.weight[:, kept] != 0
        if self.recipe.compensate and reached:
            fit = reconstruct(target, problem.stats, kept)
            weight[:, kept] = fit.weight
            stats |= {"compensation_ridge": fit.ridge} | (
                {"compensation_retries": float(fit.retries)} if fit.retries else {}
            )
            stats |= {"target_strength": fit.strength} if self.recipe.targets == "dense" else {}
            retries += fit.retries
            # Zeros of the source stay zero, so rows that have some have a support of their own.
            holed = (~mask[:, kept]).any(1).nonzero().flatten()
            if len(holed):
                weight[holed] = on_support(target, problem.stats, fit, weight, mask, holed)
        status = Status.DAMPING_RAISED if retries else Status.OK if reached else Status.NO_INPUT
        return LayerSolution((weight * mask).float(), mask, status, stats), kept

    def _choose(self, problem: RemovalProblem, count: int) -> tuple[Tensor, int]:
        """The kept inputs, chosen in nested steps: each step's criterion sees the weights that the one before fitted.

        Returns:
            `(k,)`, int64; and how often a diagonal was raised at most, of a choice or of a fit between two.
        """
        assert self.criterion is not None
        target, gram = problem.weight, problem.gram
        kept = torch.arange(target.shape[1], device=target.device)
        done = retries = 0
        steps = self.recipe.steps
        for step in range(1, steps + 1):
            upto = count * step // steps
            if upto == done:
                continue
            choice = self.criterion.select(problem, upto - done)
            kept, done = kept[problem.kept(choice.removed)], upto
            retries = max(retries, choice.retries)
            if step < steps:
                weight, more = least_squares(target, gram, kept) if self.recipe.compensate else (target[:, kept], 0)
                retries = max(retries, more)
                problem = problem.excluding(choice.removed, weight)
        return kept, retries

    def _sparse(
        self,
        problem: GroupProblem,
        solution: LayerSolution,
        kept: Tensor,
        pattern: SparsityPattern | None,
        grid: Grid | None,
    ) -> GroupSolution:
        """Prune and quantise the kept weights, as a problem of its own."""
        weight = solution.weight
        if self.recipe.compensate:
            fitted = relative_error(problem.layers[0].weight, weight, problem.stats)
            solution.stats["error_compensated"] = fitted
        gram = problem.stats.gram[kept][:, kept]
        small = replace(problem.layers[0], weight=weight[:, kept])
        scale = None if problem.stats.scale is None else problem.stats.scale[kept]
        classes = classes_left(problem.classes, kept, weight.shape[1])
        left = tuple(slots for slots, stays in classes if stays.any())
        inner = GroupProblem((small,), InputStats(problem.stats.tokens, gram, scale=scale), left)
        result = self._pruned(inner, pattern, grid)
        (found,), order = result.layers, result.order
        whole, mask = torch.zeros_like(weight), torch.zeros_like(weight, dtype=torch.bool)
        whole[:, kept], mask[:, kept] = found.weight, found.mask
        status = solution.status if found.status is Status.OK else found.status
        scales = found.scales
        if scales is not None:
            group_of = torch.zeros_like(weight[0], dtype=torch.int64)
            group_of[kept] = scales.group_of
            scales = replace(scales, group_of=group_of)
        return GroupSolution(
            [LayerSolution(whole, mask, status, {**solution.stats, **found.stats}, scales)],
            kept if order is None else kept[order.to(kept.device)],
        )


def _largest(problem: RemovalProblem, count: int) -> Tensor:
    """The kept inputs, `(k,)`, int64, without the `count` units of every pool that have the smallest weights."""
    return problem.kept(Magnitude().select(problem, count).removed)
