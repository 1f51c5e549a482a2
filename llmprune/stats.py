"""Running statistics of a layer's inputs, in float32 whatever the model's dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.linalg import add_gram
from llmprune.problem import InputStats


class RunningGram:
    """Accumulates `XᵀX` over batches of inputs.

    Args:
        width: number of inputs.
        device: where the inputs come from.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.tokens = 0
        self._sum = torch.zeros(width, width, device=device)

    def add(self, inputs: Tensor) -> None:
        """Take in one batch `(..., in)` of any float dtype."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self.tokens += len(rows)
        add_gram(self._sum, rows)

    def result(self) -> InputStats:
        """The Gram per token; the sum is used up."""
        gram = self._sum.tril_()
        gram += gram.tril(-1).T
        gram /= max(self.tokens, 1)
        return InputStats(self.tokens, gram)
