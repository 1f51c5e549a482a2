"""Calls of a module that holds experts: tokens, the experts that each is sent to, and their gate values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RoutedCall:
    """A call of the module that holds the experts of a block.

    Args:
        hidden: the tokens, `(tokens, hidden)`.
        index: the experts that each token is sent to, `(tokens, active)`, int64.
        weights: of these, `(tokens, active)`.
    """

    hidden: Tensor
    index: Tensor
    weights: Tensor

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RoutedCall | None:
        """The call with these arguments; None if they are something else."""
        values = [*args, *kwargs.values()]
        if len(values) != 3 or not all(isinstance(value, Tensor) and value.dim() == 2 for value in values):
            return None
        hidden, index, weights = values
        fits = index.shape == weights.shape and len(index) == len(hidden) and not index.is_floating_point()
        return cls(hidden, index, weights) if fits else None

    @classmethod
    def joined(cls, calls: Sequence[RoutedCall]) -> RoutedCall:
        """Several calls as one, their tokens one behind the other."""
        columns = ([getattr(call, name) for call in calls] for name in ("hidden", "index", "weights"))
        return cls(*map(torch.cat, columns))

    def tokens_of(self, expert: int) -> Tensor:
        """Numbers of the tokens that are sent to an expert, rising, int64."""
        return (self.index == expert).any(1).nonzero().flatten()

    def gates_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """The tokens that are sent to an expert, as of `tokens_of`, and their gate values, `(n,)`, float32."""
        tokens = self.tokens_of(expert)
        here = self.index[tokens] == expert
        return tokens, (self.weights[tokens].float() * here).sum(1)

    def gates(self, experts: int) -> Tensor:
        """The gate values of all experts, `(tokens, experts)`, 0 where a token is not sent to one."""
        return self.weights.new_zeros(len(self.index), experts).scatter_add_(1, self.index, self.weights)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Those of the call."""
        return self.hidden, self.index, self.weights

    def sent(self, tokens: Tensor, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of a call in which some of the tokens are all sent to one expert."""
        index = torch.full((len(tokens), 1), expert, dtype=self.index.dtype, device=self.index.device)
        return self.hidden[tokens], index, torch.ones_like(index, dtype=self.weights.dtype)
