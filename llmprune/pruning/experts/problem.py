"""The removal of experts from a mixture: what is known of them, and how many must stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ExpertUse:
    """What the experts of a mixture do on the calibration tokens; tensors are float64, `(experts,)` unless said.

    With the gate value `g_e(t)`, the inputs `h_e(t)` of the output projection `W_e`, and the output `f_e(t)`, sums run
    over the tokens t that are sent to e.

    Args:
        tokens: their number.
        output: `Σ g_e ‖f_e‖`.
        inputs: `(Σ g_e² h_e,j²)^½` for every input j of the output projection, `(experts, in)`.
        columns: `‖W_e,:j‖`, `(experts, in)`.
        largest: the largest magnitude of an output's channel.
        massive: whether the block's output holds massive activations.
        loss_without: for a set of experts that are gone, `(experts,)` bool, the squared error of the mixture's output
            that is added when one more goes and the router sends its tokens elsewhere; inf for those that are gone.
    """

    tokens: Tensor
    output: Tensor
    inputs: Tensor
    columns: Tensor
    largest: Tensor
    massive: bool
    loss_without: Callable[[Tensor], Tensor]


SUPER = 10.0
"""A super expert's largest output is so many times the median expert's."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How many experts go, and which must not.

    Args:
        count: how many go.
        groups: the router's groups, of consecutive experts; as many go from each.
        guarded: experts that stay whatever their score, `(experts,)`, bool.
    """

    count: int
    groups: int
    guarded: Tensor

    def lowest(self, score: Tensor, gone: Tensor | None = None, count: int | None = None) -> Tensor:
        """The experts of every group with the lowest scores, `(experts,)`, bool; ties by lower index first.

        Args:
            score: of every expert, `(experts,)`.
            gone: those that are gone already, `(experts,)`, bool; they are not among the lowest.
            count: how many of all groups together; None for `count`.
        """
        out = self.guarded if gone is None else self.guarded | gone
        score = score.double().masked_fill(out, torch.inf).view(self.groups, -1)
        removed = score.sort(dim=1, stable=True).indices[:, : (self.count if count is None else count) // self.groups]
        return torch.zeros_like(score, dtype=torch.bool).scatter_(1, removed, True).flatten()


def super_experts(use: ExpertUse) -> Tensor:
    """The experts whose largest output is far beyond the others' in a block with massive activations, bool.

    `max |f_e| > SUPER · median_e max |f_e|`. A few experts make the massive activations on which attention relies;
    without them a model breaks down (Su et al. 2025, "Unveiling super experts"). There the threshold is taken over the
    experts of all blocks, the 99.5th percentile and a tenth of the maximum; here over those of one block, as the others
    have not been seen.
    """
    seen = use.largest[use.tokens > 0]
    if not use.massive or not len(seen):
        return torch.zeros_like(use.tokens, dtype=torch.bool)
    return use.largest > SUPER * seen.median()


MASSIVE, MASSIVE_RATIO = 100.0, 1000.0


def is_massive(largest: float, median: float) -> bool:
    """Whether the residual stream holds massive activations: above 100, and a thousand times the median magnitude.

    Sun et al. (2024), "Massive activations in large language models", section 2.

    Args:
        largest: magnitude in the stream.
        median: magnitude in it.
    """
    return largest > MASSIVE and largest > MASSIVE_RATIO * median
