"""How a layer loses inputs: the criterion in steps, the reconstruction, and then the pattern."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmprune.pruning.criteria import Criterion
from llmprune.pruning.criteria.problem import RemovalProblem
from llmprune.pruning.criteria.reconstruct import least_squares, on_support, reconstruct
from llmprune.pruning.criteria.scores import APoZ, Scaling
from llmprune.pruning.layer_solver import Solver
from llmprune.pruning.linalg import relative_error
from llmprune.pruning.pattern import SparsityPattern
from llmprune.pruning.permutation import classes_left
from llmprune.pruning.problem import GroupProblem, InputStats, LayerSolution, Status


@dataclass(frozen=True, slots=True)
class Remover:
    """The stages that a layer goes through that loses inputs.

    Args:
        criterion: picks the inputs.
        dense: whether the layer is fitted to what the dense model gives.
        steps: in how many nested steps the inputs go.
        reconstruct: whether the rest makes up for them, by least squares.
        solver: prunes the weights that stay.
    """

    criterion: Criterion
    dense: bool = False
    steps: int = 1
    reconstruct: bool = True
    solver: Solver | None = None

    @property
    def quiet(self) -> float | None:
        """What counts as a nearly zero input, if that is to be counted."""
        return self.criterion.epsilon if isinstance(self.criterion, APoZ) else None

    @property
    def scaled(self) -> bool:
        """Whether the learned scale of the inputs is needed."""
        return isinstance(self.criterion, Scaling)

    def solve(
        self,
        problem: GroupProblem,
        units: Tensor,
        count: int,
        pattern: SparsityPattern | None = None,
        classes: tuple[Tensor, ...] = (),
        scale: Tensor | None = None,
    ) -> tuple[list[LayerSolution], Tensor]:
        """Remove inputs of one layer.

        Args:
            problem: a group of one layer.
            units: `(pools, units, size)`, int64: inputs that go together.
            count: how many units of every pool go.
            pattern: what the weights that stay must hold; None to leave them.
            classes: which inputs may change places for that.
            scale: `(in,)`, the learned scale of every input, or None.

        Returns:
            the solution, zero in the inputs that go, and the inputs that stay, in the order in which they hold the
            pattern.
        """
        (layer,) = problem.layers
        target = layer.weight.double()
        gram = problem.stats.gram
        scale = None if scale is None else scale.to(gram.device)
        asked = RemovalProblem(target, gram, units.to(gram.device), scale, problem.stats.quiet)
        kept, raises = self._choose(asked, count)
        weight = torch.zeros_like(target)
        weight[:, kept] = target[:, kept]
        stats = {"error_unfitted": relative_error(layer.weight, weight.float(), problem.stats)}
        stats |= {"choice_raises": float(raises)} if raises else {}
        mask = torch.zeros_like(weight, dtype=torch.bool)
        mask[:, kept] = layer.weight[:, kept] != 0
        if self.reconstruct:
            fit = reconstruct(target, problem.stats, kept)
            weight[:, kept] = fit.weight
            stats |= {"relative_ridge": fit.ridge} | ({"refit_raises": float(fit.raises)} if fit.raises else {})
            stats |= {"target_strength": fit.strength} if self.dense else {}
            raises += fit.raises
            # Zeros of the source stay zero, so rows that have some have a support of their own.
            holed = (~mask[:, kept]).any(1).nonzero().flatten()
            if len(holed):
                weight[holed] = on_support(target, problem.stats, fit, weight, mask, holed)
        status = Status.DAMPING_RAISED if raises else Status.OK if problem.stats.tokens else Status.NO_INPUT
        solution = LayerSolution((weight * mask).float(), mask, status, stats)
        if pattern is None or self.solver is None:
            return [solution], kept
        if self.reconstruct:
            stats["error_refitted"] = relative_error(layer.weight, solution.weight, problem.stats)
        return self._sparse(problem, solution, kept, pattern, classes)

    def _choose(self, problem: RemovalProblem, count: int) -> tuple[Tensor, int]:
        """The inputs that stay, in nested steps: each step's criterion sees the weights that the one before left.

        Returns:
            `(k,)`, int64; and how often a diagonal was raised at most, of a choice or of a fit between two.
        """
        target, gram = problem.weight, problem.gram
        kept = torch.arange(target.shape[1], device=target.device)
        done = raises = 0
        for step in range(1, self.steps + 1):
            upto = count * step // self.steps
            if upto == done:
                continue
            choice = self.criterion.select(problem, upto - done)
            kept, done = kept[problem.kept(choice.gone)], upto
            raises = max(raises, choice.raises)
            if step < self.steps:
                weight, more = least_squares(target, gram, kept) if self.reconstruct else (target[:, kept], 0)
                raises = max(raises, more)
                problem = problem.without(choice.gone, weight)
        return kept, raises

    def _sparse(
        self,
        problem: GroupProblem,
        solution: LayerSolution,
        kept: Tensor,
        pattern: SparsityPattern,
        classes: tuple[Tensor, ...],
    ) -> tuple[list[LayerSolution], Tensor]:
        """Prune the weights that stay, as a problem of its own."""
        assert self.solver is not None
        weight = solution.weight
        gram = problem.stats.gram[kept][:, kept]
        small = replace(problem.layers[0], weight=weight[:, kept])
        scale = None if problem.stats.scale is None else problem.stats.scale[kept]
        inner = GroupProblem((small,), InputStats(problem.stats.tokens, gram, scale=scale))
        left = tuple(slots for slots, stays in classes_left(classes, kept, weight.shape[1]) if stays.any())
        (found,), order = self.solver.solve(inner, pattern, left)
        whole, mask = torch.zeros_like(weight), torch.zeros_like(weight, dtype=torch.bool)
        whole[:, kept], mask[:, kept] = found.weight, found.mask
        status = solution.status if found.status is Status.OK else found.status
        return (
            [LayerSolution(whole, mask, status, {**solution.stats, **found.stats})],
            kept if order is None else kept[order.to(kept.device)],
        )
