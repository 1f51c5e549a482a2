"""Wanda."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmprune.pruning.methods import Method
from llmprune.pruning.methods.magnitude import by_magnitude
from llmprune.pruning.pattern import Scope, SparsityPattern
from llmprune.pruning.problem import GroupProblem, LayerSolution, Status, masked, zeros_first


@dataclass(frozen=True, slots=True)
class Wanda(Method):
    """Prune the smallest `|W_ij| · ‖X_j‖₂` and leave the other weights as they are (Sun et al. 2023, eq. 1).

    Inputs that are always zero score zero, so they are pruned first.
    """

    scope: ClassVar[Scope] = "row"

    def solve(self, problem: GroupProblem, pattern: SparsityPattern) -> list[LayerSolution]:
        """Prune each layer of the group by weight times input norm."""
        if problem.stats.tokens == 0:
            return [by_magnitude(layer.weight, pattern, Status.NO_INPUT) for layer in problem.layers]
        norms = problem.stats.gram.diagonal().sqrt()
        return [
            masked(layer.weight, pattern.project(zeros_first(layer.weight.abs() * norms, layer.weight)))
            for layer in problem.layers
        ]
