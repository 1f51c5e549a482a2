"""Criteria that score every expert on its own."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from llmprune.pruning.experts import ExpertCriterion
from llmprune.pruning.experts.problem import Choice, ExpertUse


class Score(ExpertCriterion):
    """A criterion with a score; experts with the lowest go."""

    __slots__ = ()

    @abstractmethod
    def score(self, use: ExpertUse) -> Tensor:
        """Of every expert, `(experts,)`."""

    def select(self, use: ExpertUse, choice: Choice) -> Tensor:
        """The experts that are not among the lowest."""
        return (~choice.lowest(self.score(use))).nonzero().flatten()


@dataclass(frozen=True, slots=True)
class REAP(Score):
    """The mean of `g_e(t) ‖f_e(t)‖` over the tokens of an expert (Lasby et al. 2025, REAP); 0 without tokens."""

    def score(self, use: ExpertUse) -> Tensor:
        """Mean contribution to a token."""
        return use.output / use.tokens.clamp(min=1)


@dataclass(frozen=True, slots=True)
class Frequency(Score):
    """The number of tokens that are sent to an expert."""

    def score(self, use: ExpertUse) -> Tensor:
        """Number of tokens."""
        return use.tokens


@dataclass(frozen=True, slots=True)
class Wanda(Score):
    """`Σ_j ‖W_:j‖ · ‖X_j‖` over the inputs of an expert's output projection, times the gate value.

    The mixture is seen as one layer `y = [W_1 … W_E] z` with inputs `z_e = g_e h_e`, from which all inputs of an expert
    are removed together (Sun et al. 2023, by columns).
    """

    def score(self, use: ExpertUse) -> Tensor:
        """Sum over the columns."""
        return (use.columns * use.inputs).sum(1)
