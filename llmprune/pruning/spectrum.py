"""Bounds and moments of the eigenvalues of a Gram, at the price of a few matrix-vector products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

POWER_ITERATIONS = 8


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The spread of the inputs' energy over directions, with λ the eigenvalues of their Gram G, `(in, in)`.

    Args:
        participation_ratio: effective number of directions, `(Σλ)² / Σλ² = tr(G)² / ‖G‖²`, from 1 to in.
        largest: a lower bound of `λ_max`, by power iteration.
        total: `Σλ = tr(G)`.
    """

    participation_ratio: float
    largest: float
    total: float

    def figures(self, ridge: float | None) -> dict[str, float]:
        """The figures of a report; with the ridge λ of a factorisation also the condition number of `G + λI`."""
        found = {"participation_ratio": self.participation_ratio, "top_eigenvalue_ratio": self.largest / self.total}
        return found | ({"condition": 1 + self.largest / ridge} if ridge else {})


def input_spectrum(gram: Tensor) -> Spectrum | None:
    """The spectrum of a Gram `(in, in)`, symmetric, positive semidefinite; None where all inputs are zero."""
    total = float(gram.diagonal().sum())
    if not total > 0:
        return None
    vector = gram[int(gram.diagonal().argmax())]
    for _ in range(POWER_ITERATIONS):
        vector = vector / vector.norm()
        image = gram @ vector
        largest, vector = float(vector @ image), image
    return Spectrum((total / float(torch.linalg.vector_norm(gram))) ** 2, min(largest, total), total)
