"""Hints at the eigenvalues of a Gram, for little more than reading it a few times."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

POWER_ITERATIONS = 8


@dataclass(frozen=True, slots=True)
class Spectrum:
    """How the energy of a layer's inputs lies in their space, `λ` the eigenvalues of their Gram G.

    Args:
        directions: how many directions hold it, `(Σλ)² / Σλ² = tr(G)² / ‖G‖²`, 1 to in.
        largest: `λ_max`, from below, by power iteration.
        total: `Σλ = tr(G)`.
    """

    participation_ratio: float
    largest: float
    total: float

    def figures(self, ridge: float | None) -> dict[str, float]:
        """What a report tells; with the ridge of a factorisation also the condition of what was factored."""
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
