"""The criterion that asks what the other experts make of the tokens of one that goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.pruning.experts import ExpertCriterion
from llmprune.pruning.experts.problem import Choice, ExpertUse

ROUNDS = 4


@dataclass(frozen=True, slots=True)
class OBS(ExpertCriterion):
    """Remove the experts whose tokens others serve best: the least error of the mixture's output after rerouting.

    `L_e = Σ_t ‖y_{−e}(t) − y(t)‖² − ‖y_R(t) − y(t)‖²`, with y of the dense mixture, `y_R` without the experts that are
    gone, and `y_{−e}` without e as well, the router choosing among the rest. As many go in each round, after which the
    losses are taken anew. The sum of single losses stands for the loss of a set. Optimal brain
    surgeon's question, with the router's own answer in place of a second-order one; Lu et al. (2024) try all sets of a
    few experts.
    """

    def select(self, use: ExpertUse, choice: Choice) -> Tensor:
        """The experts left after the last round."""
        gone = torch.zeros_like(use.tokens, dtype=torch.bool)
        a_group = choice.count // choice.groups
        done = 0
        for part in range(1, ROUNDS + 1):
            upto = a_group * part // ROUNDS
            if upto > done:
                gone = gone | choice.lowest(use.loss_without(gone), gone, (upto - done) * choice.groups)
                done = upto
        return (~gone).nonzero().flatten()
