"""How a group is solved: the targets, the method, the refit."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmprune.methods import Method
from llmprune.pattern import SparsityPattern
from llmprune.problem import GroupProblem, LayerSolution
from llmprune.recipe import Recipe
from llmprune.targets import toward_dense


@dataclass(frozen=True, slots=True)
class Solver:
    """The stages that a group goes through.

    Args:
        method: picks the mask, and weights on it.
        recipe: the stages around it.
    """

    method: Method
    recipe: Recipe

    def solve(self, problem: GroupProblem, pattern: SparsityPattern) -> list[LayerSolution]:
        """Prune the layers of one group."""
        goal, strengths = toward_dense(problem) if self.recipe.targets == "dense" else (problem, [])
        solutions = self.method.solve(goal, pattern)
        if strengths:
            solutions = [
                replace(solution, stats={**solution.stats, "target_strength": strength})
                for solution, strength in zip(solutions, strengths, strict=True)
            ]
        return solutions
