"""The Lasso over channels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmprune.errors import NumericalError
from llmprune.pruning.criteria import Criterion
from llmprune.pruning.criteria.problem import Choice, RemovalProblem
from llmprune.pruning.methods import Cost

ALPHA_TRIALS, SET_CORRECTIONS, JITTER_RETRIES = 64, 64, 7
LASSO_TOLERANCE = 1e-10


@dataclass(frozen=True, slots=True)
class Lasso(Criterion):
    """Remove the units with a zero coefficient in `min_β ½ ‖Y − Σ_g β_g X_g W_gᵀ‖² / tokens + α ‖β‖₁`, `Y = X Wᵀ`.

    As α rises from 0 (all β are 1) more and more coefficients become zero; the α with the wanted number is taken (He et
    al. 2017, channel pruning). Only `Q_gh = Σ_{j∈g, k∈h} H_jk (WᵀW)_jk` is needed, since
    `⟨X_g W_gᵀ, X_h W_hᵀ⟩ / tokens = Q_gh` and `⟨X_g W_gᵀ, Y⟩ / tokens = Σ_h Q_gh`; outputs of single channels are never
    formed.

    The α is searched for, see `at_count`. Where several pools must lose the same number, a unit counts by how late on
    the path it enters for good, and scikit-learn follows the path (`lars_path_gram`).

    Args:
        jitter: added to Q's diagonal, as a fraction of its mean, so that channels that are alike do no harm. Where the
            choice does not settle (few tokens leave Q without full rank), it is raised tenfold, at most
            `JITTER_RETRIES` times: to a tenth of the mean from the default. That changes which units are chosen, never
            what is fitted, and is reported.
    """

    cost: ClassVar[Cost] = Cost(products=8, squares=8.0)

    jitter: float = 1e-8

    def select(self, problem: RemovalProblem, count: int) -> Choice:
        """Remove the units that the path leaves out."""
        products = design_gram(problem)
        mean = float(products.diagonal().mean())
        if mean <= 0:
            return problem.lowest(torch.zeros(problem.units.shape[:2], device=problem.weight.device), count)
        products /= mean
        pools, units, _ = problem.units.shape
        score, retries = self._score(products, pools, pools * (units - count))
        return replace(problem.lowest(score.view(pools, units).to(problem.weight.device), count), retries=retries)

    def _score(self, products: Tensor, pools: int, kept: int) -> tuple[Tensor, int]:
        """A score of the units, `(pools · units,)`, with as little jitter as settles it; how often it was raised.

        Raises:
            NumericalError: none does.
        """
        target, diagonal = products.sum(1), products.diagonal().clone()
        retries = 0
        while True:
            products.diagonal().copy_(diagonal + self.jitter * 10**retries)
            try:
                if pools == 1:
                    return at_count(products, target, kept), retries
                return _worth(_path(products.cpu(), target.cpu(), len(products)), kept), retries
            except NumericalError:
                if retries == JITTER_RETRIES:
                    raise
                retries += 1


def design_gram(problem: RemovalProblem) -> Tensor:
    """`Q = Σ H ∘ (WᵀW)` over the inputs of the units, `(pools · units, pools · units)`, float64."""
    units = problem.units.flatten(0, 1)
    matrix = (problem.weight.T @ problem.weight).mul_(problem.gram)
    if units.shape[1] > 1:
        rows = torch.stack([matrix[unit].sum(0) for unit in units])
        return torch.stack([rows[:, unit].sum(1) for unit in units], 1)
    order = units[:, 0]
    ordered = torch.equal(order, torch.arange(len(matrix), device=order.device))
    return matrix if ordered else matrix[order][:, order]


def at_count(products: Tensor, target: Tensor, kept: int) -> Tensor:
    """A score of the units, `(units,)`, whose `kept` largest are those in use at the α where so many are.

    For every α tried, the active set and its signs are found by an active-set method that starts at the last solution;
    so it takes a few dozen solves whatever the number of units. Between two α at which the active set changes the
    coefficients are linear in α: where these lines cross zero says which α to try next, and is the score.

    Args:
        products: Q, `(units, units)`, float64, positive definite.
        target: the right-hand side, `(units,)`.
        kept: how many are to be in use.
    """
    low, high, fewest = 0.0, float(target.abs().max()), 0
    best = _solve(products, target, 0.0, torch.ones_like(target), None)
    for _ in range(ALPHA_TRIALS):
        surplus = best.used - kept
        if surplus <= 0 or high - low <= 1e-12 * high:
            break
        alpha = best.next_alpha(surplus)
        if not low < alpha < high:
            inside = min(max(surplus / (best.used - fewest), 0.1), 0.9)
            alpha = low + inside * (high - low)
        found = _solve(products, target, alpha, best.signs, best.beta)
        if found.used >= kept:
            low, best = alpha, found
        else:
            high, fewest = alpha, found.used
    return best.crossing


@dataclass(frozen=True, slots=True)
class _Solution:
    """The Lasso at one α.

    Args:
        alpha: α.
        beta: the coefficients, `(units,)`.
        signs: theirs, 0 where they are not in use.
        slope: how fast they fall with α.
    """

    alpha: float
    beta: Tensor
    signs: Tensor
    slope: Tensor

    @property
    def used(self) -> int:
        """How many are in use."""
        return int(self.signs.count_nonzero())

    @property
    def crossing(self) -> Tensor:
        """The α at which each is zero, if the active set does not change before; 0 for those not in use."""
        falling = self.slope * self.signs > 0
        at = self.alpha + torch.where(falling, self.beta / torch.where(falling, self.slope, 1.0), torch.inf)
        return torch.where(self.signs != 0, at, 0.0)

    def next_alpha(self, surplus: int) -> float:
        """Where so many fewer should be in use: halfway between two crossings."""
        ahead = self.crossing[self.signs != 0].sort().values
        if surplus >= len(ahead):
            return torch.inf
        return float(ahead[surplus - 1 : surplus + 1].mean())


def _solve(products: Tensor, target: Tensor, alpha: float, signs: Tensor, start: Tensor | None) -> _Solution:
    """The Lasso at one α: `Q_SS β_S = q_S − α s_S`; wrong signs leave the active set S, violated bounds join it.

    Raises:
        NumericalError: the sets do not settle.
    """
    beta = torch.zeros_like(target) if start is None else start
    for _ in range(SET_CORRECTIONS):
        beta = _conjugate_gradients(products, target - alpha * signs, signs != 0, beta)
        pull = target - products @ beta
        joins = torch.where(pull.abs() > alpha + LASSO_TOLERANCE * float(target.abs().max()), pull.sign(), 0.0)
        settled = torch.where(signs != 0, torch.where(beta * signs > 0, signs, 0.0), joins)
        if torch.equal(settled, signs):
            slope = _conjugate_gradients(products, signs, signs != 0, torch.zeros_like(beta))
            return _Solution(alpha, beta, signs, slope)
        signs = settled
    raise NumericalError(
        "the Lasso's choice of channels does not settle", "use more calibration tokens, or --method obs"
    )


def _conjugate_gradients(matrix: Tensor, right: Tensor, support: Tensor, start: Tensor) -> Tensor:
    """`A_SS x_S = b_S`, zero off S, preconditioned with the diagonal."""
    weight = support / matrix.diagonal()
    x = start * support
    residual = (right - matrix @ x) * support
    scaled = residual * weight
    direction, square = scaled.clone(), residual @ scaled
    enough = LASSO_TOLERANCE**2 * float((right * support) @ (right * weight))
    for _ in range(len(x)):
        if not float(square) > enough:
            break
        image = matrix @ direction
        step = square / (direction @ image)
        x += step * direction
        residual -= step * image * support
        scaled = residual * weight
        before, square = square, residual @ scaled
        direction = scaled + square / before * direction
    return x


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
