"""ALPS (Meng et al. 2024) as published, slow and faithful: what our own ADMM is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.pruning.least_squares import polish
from llmprune.pruning.linalg import add_ridge, ridge_of
from llmprune.pruning.pattern import SparsityPattern

LONGEST, EVERY, POLISH = 300, 3, 10


def alps(weight: Tensor, gram: Tensor, pattern: SparsityPattern, damping: float) -> Tensor:
    """The pruned weight: exact steps by eigenvectors, a penalty that grows until the support rests, then a refit.

    With `A = H + λI` in coordinates in which its diagonal is one, and its eigenvectors Q and eigenvalues m:

        B = (A W* − V + ρZ)(A + ρI)⁻¹,  Z = the projection of B + V/ρ on the pattern,  V += ρ(B − Z)

    Every third iteration ρ grows by 1.3, 1.2 or 1.1, the larger the share of the support that has come or gone. A
    support that rests before it has ever moved means a ρ too large: all begins anew with a fifth of it. One that rests
    later, or 300 iterations, are the end, but for ten steps of conjugate gradients on the support.

    Args:
        weight: W*, `(out, in)`.
        gram: H, `(in, in)`; no input is zero on all tokens.
        pattern: what the result obeys.
        damping: λ as a fraction of the mean diagonal of H.

    Returns:
        `(out, in)`, float64.
    """
    A, W = add_ridge(gram.double(), ridge_of(gram.double(), damping)), weight.double()
    scale = A.diagonal().sqrt()
    scaled = A / torch.outer(scale, scale)
    values, Q = torch.linalg.eigh(scaled)
    pull = W * scale @ scaled
    rho, moved = 0.1, False
    first = pattern.project((W * scale).abs())
    kept, Z, V = first, W * scale * first, torch.zeros_like(W)
    for at in range(1, LONGEST + 1):
        B = (pull - V + rho * Z) @ Q / (values + rho) @ Q.T
        mask = pattern.project((B + V / rho).abs())
        Z = (B + V / rho) * mask
        V += rho * (B - Z)
        if at % EVERY:
            continue
        changed = float((mask != kept).sum()) / float(kept.sum())
        kept = mask
        if changed:
            rho, moved = rho * growth(changed), True
        elif moved:
            break
        else:
            rho, kept, Z, V = rho / 5, first, W * scale * first, torch.zeros_like(W)
    result = (Z / scale).T.contiguous()
    polish(A, W.T.contiguous(), result, kept.T.contiguous(), POLISH)
    return result.T.contiguous()


def growth(changed: float) -> float:
    """By what the penalty is multiplied when this share of the support has come or gone."""
    return 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
