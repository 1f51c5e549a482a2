"""What is left of a layer, made anew from what is left of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.linalg import damped_cholesky

DAMPING = 0.01


def least_squares(weight: Tensor, gram: Tensor, kept: Tensor, damping: float = DAMPING) -> tuple[Tensor, int]:
    """The best weights on the inputs S that stay: `min tr((W̃ − W) A (W̃ − W)ᵀ)`, so `W̃_S = (W A)_:S A_SS⁻¹`.

    `A = H + λI` pulls towards W, not towards zero. One Cholesky factorisation serves all rows.

    Args:
        weight: W, `(out, in)`, float64.
        gram: H, `(in, in)`.
        kept: S, `(k,)`, int64.
        damping: λ as a fraction of the mean diagonal of H.

    Returns:
        `W̃_S`, `(out, k)`, and how often λ was raised tenfold before A_SS could be factored.

    Raises:
        NumericalError: A_SS stays singular.
    """
    part = gram[:, kept].double()
    dead = (gram.diagonal()[kept] == 0).double()
    places = torch.arange(len(kept), device=kept.device)

    def damped(ridge: float) -> Tensor:
        matrix = part[kept]
        matrix.diagonal().add_(dead + ridge)
        return matrix

    lower, ridge, raises = damped_cholesky(damped, gram, damping)
    part[kept, places] += dead + ridge
    return torch.cholesky_solve((weight @ part).T, lower).T, raises
