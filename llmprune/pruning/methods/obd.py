"""Optimal brain damage."""

from __future__ import annotations

from dataclasses import dataclass

from llmprune.pruning.methods import Method
from llmprune.pruning.methods.magnitude import by_magnitude
from llmprune.pruning.pattern import SparsityPattern
from llmprune.pruning.problem import GroupProblem, LayerSolution, Status, masked, zeros_first


@dataclass(frozen=True, slots=True)
class OBD(Method):
    """Prune the smallest `½ W_ij² H_jj` and leave the other weights as they are (LeCun et al. 1989).

    That is the loss without compensation, for a second-order loss whose off-diagonal terms are neglected.
    It ranks as Wanda does, whose score is its square root but for a factor; so for N:M patterns and counts by row the
    two prune the same weights. Its own scope is the layer, where rows compete; Wanda's is the row.
    """

    def solve(self, problem: GroupProblem, pattern: SparsityPattern) -> list[LayerSolution]:
        """Prune each layer of the group by the diagonal of the second-order loss."""
        if problem.stats.tokens == 0:
            return [by_magnitude(layer.weight, pattern, Status.NO_INPUT) for layer in problem.layers]
        half = problem.stats.gram.diagonal() / 2
        return [
            masked(layer.weight, pattern.project(zeros_first(layer.weight.square() * half, layer.weight)))
            for layer in problem.layers
        ]
