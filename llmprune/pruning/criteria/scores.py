"""Criteria that score every input on its own; a unit's score is the sum over its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmprune.pruning.criteria import Criterion
from llmprune.pruning.criteria.problem import Choice, RemovalProblem


@dataclass(frozen=True, slots=True)
class Magnitude(Criterion):
    """Remove the units with the smallest `Σ_j ‖W_:j‖²` (Han et al. 2015, by columns)."""

    def select(self, problem: RemovalProblem, count: int) -> Choice:
        """Remove by the size of the weights."""
        return problem.lowest(problem.summed(problem.weight.square().sum(0)), count)


@dataclass(frozen=True, slots=True)
class Wanda(Criterion):
    """Remove the units with the smallest `Σ_j ‖W_:j‖ · ‖X_j‖` (Sun et al. 2023, by columns)."""

    def select(self, problem: RemovalProblem, count: int) -> Choice:
        """Remove by the size of the weights times that of the inputs."""
        norms = problem.gram.diagonal().clamp(min=0).sqrt()
        return problem.lowest(problem.summed(problem.weight.norm(dim=0) * norms), count)


@dataclass(frozen=True, slots=True)
class OBD(Criterion):
    """Remove the units with the smallest `Σ_j ½ ‖W_:j‖² H_jj`, the loss without compensation (LeCun et al. 1989).

    For single channels this is half of Wanda's score squared, so the same ones are removed; for heads the sums differ.
    """

    def select(self, problem: RemovalProblem, count: int) -> Choice:
        """Remove by the diagonal of the second-order loss."""
        loss = problem.weight.square().sum(0) * problem.gram.diagonal() / 2
        return problem.lowest(problem.summed(loss), count)


@dataclass(frozen=True, slots=True)
class Scaling(Criterion):
    """Remove the units with the smallest `Σ_j |γ_j|`, γ the learned scale of the inputs (Liu et al. 2017)."""

    needs: ClassVar[frozenset[str]] = frozenset({"channel_scale"})

    def select(self, problem: RemovalProblem, count: int) -> Choice:
        """Remove by the learned scale."""
        assert problem.scale is not None
        return problem.lowest(problem.summed(problem.scale.abs()), count)


@dataclass(frozen=True, slots=True)
class APoZ(Criterion):
    """Remove the units whose inputs have the highest average percentage of zeros, APoZ (Hu et al. 2016).

    Exact where at least 5% of a layer's inputs are exactly zero (ReLU). Elsewhere an input counts as zero up to
    `epsilon` times the root mean square of the layer's inputs over the first batch; that takes in the few exact zeros
    that GELU gives where it underflows.

    Args:
        epsilon: what counts as nearly zero (fraction).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"zero_fraction"})

    epsilon: float = 0.05

    @property
    def zero_threshold(self) -> float:
        """Fraction of the root mean square up to which an input counts as zero."""
        return self.epsilon

    def select(self, problem: RemovalProblem, count: int) -> Choice:
        """Remove by how often inputs are zero."""
        assert problem.zero_fraction is not None
        return problem.lowest(-problem.summed(problem.zero_fraction), count)
