"""Magnitude pruning."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmprune.pruning.methods import Method
from llmprune.pruning.pattern import SparsityPattern
from llmprune.pruning.problem import GroupProblem, LayerSolution, Status, masked, zeros_first


@dataclass(frozen=True, slots=True)
class Magnitude(Method):
    """Prune the weights with the smallest `|W_ij|` and leave the others as they are (Han et al. 2015)."""

    def solve(self, problem: GroupProblem, pattern: SparsityPattern) -> list[LayerSolution]:
        """Prune each layer of the group by the size of its weights."""
        return [by_magnitude(layer.weight, pattern) for layer in problem.layers]


def by_magnitude(weight: Tensor, pattern: SparsityPattern, status: Status = Status.OK) -> LayerSolution:
    """Keep the largest entries of `weight (out, in)` that `pattern` allows."""
    return masked(weight, pattern.project(zeros_first(weight.abs(), weight)), status)
