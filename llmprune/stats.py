"""Running statistics of a layer's inputs, in float32 whatever the model's dtype."""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import blas
from torch import Tensor

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
        """Take in one batch `(..., in)` of any float dtype; on the CPU only a triangle is summed (BLAS syrk)."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self.tokens += len(rows)
        if rows.device.type != "cpu":
            self._sum.addmm_(rows.T, rows)
            return
        # The transposed views are column-major, as BLAS wants them; its upper triangle is our lower one.
        x, total = np.ascontiguousarray(rows.numpy()).T, self._sum.numpy().T
        if blas.ssyrk(1.0, x, beta=1.0, c=total, overwrite_c=1) is not total:
            raise RuntimeError("BLAS did not work in place")

    def result(self) -> InputStats:
        """The Gram per token; the sum is used up."""
        gram = self._sum.tril_()
        gram += gram.tril(-1).T
        gram /= max(self.tokens, 1)
        return InputStats(self.tokens, gram)
