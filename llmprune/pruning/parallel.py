"""Layer problems solved by several processes together: every process solves its rows, all get all solutions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llmprune.pruning.pattern import SparsityPattern
from llmprune.pruning.problem import GroupProblem, LayerSolution, Status
from llmprune.runtime.process_group import SINGLE, ProcessGroup

Solve = Callable[[GroupProblem, SparsityPattern], list[LayerSolution]]


@dataclass(slots=True)
class RowSharding:
    """Shares the rows of layer problems among processes.

    Args:
        group: the processes.
        rows: number of rows that every process has solved so far, by rank; whole layers go to the least busy one.
    """

    group: ProcessGroup = SINGLE
    rows: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows = self.rows or [0] * self.group.world_size

    def solve(self, solve: Solve, problem: GroupProblem, pattern: SparsityPattern) -> list[LayerSolution]:
        """Solve a group of layers: by rows where these do not depend on each other, else by whole layers.

        Args:
            solve: of a method.
            problem: the same in all processes.
            pattern: the sparsity pattern of the weights.
        """
        if self.group.is_single:
            return solve(problem, pattern)
        pieces = self.pieces(problem, pattern)
        mine = [(layer, rows) for layer, rows, owner in pieces if owner == self.group.rank]
        layers = tuple(
            replace(problem.layers[layer], weight=problem.layers[layer].weight[rows]) for layer, rows in mine
        )
        found = solve(replace(problem, layers=layers), pattern) if layers else []
        heads = [iter(one) for one in self.group.all_gather_object([_head(solution) for solution in found])]
        own = iter(found)
        parts: list[list[LayerSolution]] = [[] for _ in problem.layers]
        for layer, rows, owner in pieces:
            like = problem.layers[layer].weight[rows]
            solution = next(own) if owner == self.group.rank else None
            parts[layer].append(self._broadcast(owner, solution, like, next(heads[owner])))
        return [_joined(solutions) for solutions in parts]

    def pieces(self, problem: GroupProblem, pattern: SparsityPattern) -> list[tuple[int, slice, int]]:
        """Layer, rows and owner of every piece; all processes come to the same."""
        pieces = []
        for layer, part in enumerate(problem.layers):
            height = len(part.weight)
            if pattern.rows_independent:
                ranges = enumerate(self.group.row_ranges(height))
                pieces += [(layer, rows, owner) for owner, rows in ranges if rows.start < rows.stop]
            else:
                # A count over a whole layer cannot be divided; the process with the fewest rows so far is next.
                pieces.append((layer, slice(0, height), self.rows.index(min(self.rows))))
            for at, rows, owner in pieces:
                if at == layer:
                    self.rows[owner] += rows.stop - rows.start
        return pieces

    def agreed(self, solutions: list[LayerSolution]) -> list[LayerSolution]:
        """The solutions of rank 0, in all processes: machines may differ in the last bit, weights may not."""
        if self.group.is_single:
            return solutions
        heads = self.group.broadcast_object([_head(solution) for solution in solutions])
        return [self._broadcast(0, own, own.weight, head) for own, head in zip(solutions, heads, strict=True)]

    def agreed_order(self, order: Tensor | None) -> Tensor | None:
        """The order of inputs of rank 0, `(in,)`, in all processes."""
        if self.group.is_single or order is None:
            return order
        return torch.tensor(self.group.broadcast_object(order.tolist()), dtype=order.dtype, device=order.device)

    def _broadcast(self, owner: int, own: LayerSolution | None, like: Tensor, head: list[Any]) -> LayerSolution:
        """The solution of one process, in all; `like` has the form of its weights."""
        if owner == self.group.rank and own is not None:
            weight, mask = own.weight.contiguous(), own.mask.to(torch.uint8).contiguous()
        else:
            weight, mask = (torch.empty_like(like, memory_format=torch.contiguous_format) for _ in range(2))
            mask = mask.to(torch.uint8)
        self.group.broadcast_now(weight, owner)
        self.group.broadcast_now(mask, owner)
        scales = own.scales if own is not None else None
        if scales is not None:
            self.group.broadcast_now(scales.values, owner)
        return LayerSolution(weight, mask.bool(), Status(head[0]), head[1], scales)


def _head(solution: LayerSolution) -> list[Any]:
    """All of a solution but its tensors, as JSON."""
    return [solution.status.value, solution.stats]


def _joined(parts: list[LayerSolution]) -> LayerSolution:
    """One layer from the solutions of its rows; the status is that of the most damped."""
    worst = max(parts, key=lambda part: part.stats.get("damping_retries", 0.0))
    weight, mask = torch.cat([part.weight for part in parts]), torch.cat([part.mask for part in parts])
    return LayerSolution(weight, mask, worst.status, worst.stats)
