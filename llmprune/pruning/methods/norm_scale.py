"""Weights by the learned scale of the norm before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmprune.errors import PruneError
from llmprune.pruning.methods import Method
from llmprune.pruning.pattern import SparsityPattern
from llmprune.pruning.problem import GroupProblem, LayerSolution, masked, zeros_first


@dataclass(frozen=True, slots=True)
class Scaling(Method):
    """Prune the smallest `|W_ij| · |γ_j|`, γ the scale of the norm that feeds the layer (after Liu et al. 2017).

    Needs no calibration text beyond what shows which norm feeds which layer. Layers that no norm feeds are refused.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"norm_scale"})

    def solve(self, problem: GroupProblem, pattern: SparsityPattern) -> list[LayerSolution]:
        """Prune each layer of the group by weight times scale."""
        scale = problem.stats.scale
        if scale is None:
            raise PruneError(f"no norm feeds {problem.layers[0].name!r}", "leave such layers dense with --skip GLOB")
        return [
            masked(layer.weight, pattern.project(zeros_first(layer.weight.abs() * scale.abs(), layer.weight)))
            for layer in problem.layers
        ]
