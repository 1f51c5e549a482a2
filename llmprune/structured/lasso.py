"""The Lasso path over channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmprune.errors import NumericalError
from llmprune.structured.problem import RemovalProblem


@dataclass(frozen=True, slots=True)
class Lasso:
    """The units whose coefficient is zero go: `min_β ½ ‖Y − Σ_g β_g X_g W_gᵀ‖² / tokens + α ‖β‖₁`, `Y = X Wᵀ`.

    As α rises from 0 (all β are 1) more and more coefficients become zero; the α with as many as wanted is taken (He et
    al. 2017). Only `Q_gh = Σ_{j∈g, k∈h} H_jk (WᵀW)_jk` is needed, since `⟨X_g W_gᵀ, X_h W_hᵀ⟩ / tokens = Q_gh` and
    `⟨X_g W_gᵀ, Y⟩ / tokens = Σ_h Q_gh`; outputs of single channels are never formed. scikit-learn follows the path from
    the empty end (`lars_path_gram`), which is exact at every size.

    Where several pools must lose the same number, a unit counts by how late on the path it enters for good.

    Args:
        jitter: added to Q's diagonal, as a fraction of its mean, so that channels that are alike do no harm.
    """

    jitter: float = 1e-8

    def select(self, problem: RemovalProblem, count: int) -> Tensor:
        """Remove what the path leaves out."""
        products = design_gram(problem)
        units = len(products)
        mean = float(products.diagonal().mean())
        if mean <= 0:
            return problem.lowest(torch.zeros(problem.units.shape[:2]), count)
        target = products.sum(1) / mean
        products = products / mean
        products.diagonal().add_(self.jitter)
        pools = problem.units.shape[0]
        kept = units - count * pools
        path = _path(products, target, kept if pools == 1 else units)
        return problem.lowest(_worth(path, kept).view(problem.units.shape[:2]), count)


def design_gram(problem: RemovalProblem) -> Tensor:
    """`Q = Σ H ∘ (WᵀW)` over the inputs of the units, `(pools · units, pools · units)`, float64."""
    units = problem.units.flatten(0, 1)
    matrix = problem.gram * (problem.weight.T @ problem.weight)
    rows = torch.stack([matrix[unit].sum(0) for unit in units]) if units.shape[1] > 1 else matrix[units[:, 0]]
    return torch.stack([rows[:, unit].sum(1) for unit in units], 1) if units.shape[1] > 1 else rows[:, units[:, 0]]


def _path(products: Tensor, target: Tensor, kept: int) -> Tensor:
    """Coefficients along the path from the empty model on, `(steps, units)`, until `kept` are in use."""
    from sklearn.linear_model import lars_path_gram

    steps, limit = kept, 8 * len(products)
    while True:
        found: Any = lars_path_gram(
            Xy=target.numpy(), Gram=products.numpy(), n_samples=1, max_iter=steps, method="lasso", alpha_min=0.0,
            copy_X=True, copy_Gram=True,
        )  # fmt: skip
        path = torch.from_numpy(found[2].T.copy())
        used = int((path[-1] != 0).sum())
        if used >= kept or len(path) <= steps or steps >= limit:
            break
        steps += max(kept - used, 1)
    if not bool(torch.isfinite(path).all()):
        raise NumericalError("the Lasso path holds NaN or Inf", "use more calibration tokens, or --method obs")
    return path


def _worth(path: Tensor, kept: int) -> Tensor:
    """A score by which the `kept` best are those in use where the path first uses so many; then by time in use."""
    active = path != 0
    numbers = active.sum(1)
    enough = (numbers >= kept).nonzero()
    at = int(enough[0]) if len(enough) else len(path) - 1
    out = ~active[: at + 1].flip(0)
    # How many steps before `at` a unit was last out: those that were in all along from early on are worth most.
    since = torch.where(out.any(0), out.to(torch.float64).argmax(0), at + 1)
    return since.double() + (active[at] * path.abs().sum(0)) / path.abs().sum().clamp(min=1e-300)
