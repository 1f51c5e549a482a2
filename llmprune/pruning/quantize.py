"""Quantisation of a group of layers: error feedback, coordinate descent, least-squares scales, exchanges in supports.

For targets W* and `A = H + λI`, every row w minimises `(w − w*)ᵀ A (w − w*)` over `w = s q` on its support, q on the
grid. It starts from the weights that a method found on that support:

1. scales by a search: of each group, the fraction of its largest weight with the least error, weighted by `diag A`;
2. a sweep with error feedback (GPTQ, Frantar et al. 2022, with zeros held): column by column, in order of falling
   `A_jj`, the rounding error is compensated by the columns that are still to come. Where that is worse than rounding
   to the nearest, a row is rounded;
3. passes: the scales that are optimal for the codes q (of all groups of a row jointly, a least-squares problem with
   as many unknowns as groups); where the support has a pattern N:M, exchanges of a kept weight for a pruned one; then
   coordinate descent: column by column, each q becomes the best for all others.

No pass raises the error of a row, so the result is at least as good as rounding.

Differs from GPTQ: scales are fitted to the Gram; the codes are changed after the sweep, as in QuantEase (Behdin et al.
2023), which has neither supports nor new scales. Exchanges are those of a local search over supports, as in OSSCAR
(Meng et al. 2024) for whole inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmprune.pruning.grid import Grid
from llmprune.pruning.linalg import add_ridge, inverse_factor
from llmprune.pruning.problem import GroupProblem, LayerSolution, Scales, Status

DAMPING = 0.01
BLOCK = 32
"""Columns between two products of matrices."""
ROWS_AT_A_TIME = 2048
WIDEST = 32
"""Wider groups of N:M keep their supports: the pairs of a group, each with all rows, would fill the memory."""
SHRINKS = torch.linspace(1.0, 0.4, 25).tolist()
"""Fractions of a group's largest weight that are tried as the largest value of the grid."""


def quantize(
    problem: GroupProblem,
    solutions: list[LayerSolution],
    grid: Grid,
    passes: int,
    damping: float = DAMPING,
    period: int | None = None,
) -> list[LayerSolution]:
    """The solutions with weights on a grid.

    Args:
        problem: with the targets as its weights; no calibration token, and the error is that of the weights.
        solutions: where to start.
        grid: of every layer.
        passes: of new scales and coordinate descent.
        damping: λ as a fraction of the mean diagonal of H.
        period: M of a pattern N:M, whose supports may change within groups of up to `WIDEST`; None keeps them.

    Returns:
        weights that are `s q` in float32, and their scales, in float32 but values of the grid's `scale_dtype`.
    """
    gram = problem.stats.gram
    if problem.stats.tokens == 0:
        gram = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    # The sweep's order; the groups stay those of consecutive inputs.
    order = gram.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(gram[order][:, order], damping)
    factor.upper.div_(factor.upper.diagonal()[:, None].clone())
    rows = _Rows(add_ridge(gram, factor.ridge), grid, factor.upper, order, period)
    target = torch.cat([layer.weight for layer in problem.layers])
    weight = torch.cat([solution.weight for solution in solutions])
    support = torch.cat([solution.mask for solution in solutions])
    parts = [slice(at, at + ROWS_AT_A_TIME) for at in range(0, len(weight), ROWS_AT_A_TIME)]
    scales = torch.cat([rows.solve(target[part], weight[part], support[part], passes) for part in parts])
    more = {"grid_retries": float(factor.retries)} if factor.retries else {}
    return [
        replace(
            one,
            weight=new,
            mask=mask,
            scales=Scales(grid, values, rows.group_of),
            status=Status.DAMPING_RAISED if more else one.status,
            stats=one.stats | more,
        )
        for one, new, mask, values in zip(
            solutions, *(problem.split(whole) for whole in (weight, support, scales)), strict=True
        )
    ]


@dataclass(slots=True)
class _State:
    """Some rows of a group of layers, as columns.

    Args:
        target: W*, `(in, rows)`.
        support: `(in, rows)`, bool.
        weight: `s q`, `(in, rows)`.
        scale: `(groups, rows)`.
    """

    target: Tensor
    support: Tensor
    weight: Tensor
    scale: Tensor


class _Rows:
    """The steps for some rows of a group of layers.

    Args:
        A: `(in, in)`, symmetric positive definite.
        grid: of the weights.
        unit: U of `A⁻¹ = Uᵀ U` with its rows divided by their pivots, in the sweep's order, `(in, in)`.
        order: of the sweep, `(in,)`.
        period: M of a pattern N:M, or None.
    """

    def __init__(self, A: Tensor, grid: Grid, unit: Tensor, order: Tensor, period: int | None = None) -> None:
        self.A, self.grid, self.unit, self.order, self.period = A, grid, unit, order, period
        self.width = len(A)
        self.groups = grid.groups(self.width)
        self.group_of = torch.arange(self.width, device=A.device) // (self.width // self.groups)

    def solve(self, target: Tensor, weight: Tensor, support: Tensor, passes: int) -> Tensor:
        """Put rows on the grid, in place of `weight` and `support`, `(rows, in)`; their scales, `(rows, groups)`."""
        state = self.begin(target.T, weight.T, support.T)
        for _ in range(passes):
            self.refit_scales(state)
            if self.period is not None and self.period <= WIDEST:
                self.exchange(state, self.period)
            self.descend(state)
        weight.copy_(state.weight.T)
        support.copy_(state.support.T)
        return state.scale.T

    def begin(self, target: Tensor, start: Tensor, support: Tensor) -> _State:
        """The better of the sweep and of rounding to the nearest, row by row."""
        target, start, support = target.contiguous(), start.contiguous(), support.contiguous()
        scale = self._search(start)
        rounded = self._rounded(start, scale[self.group_of])
        state = _State(target, support, self._sweep(start.clone(), support, scale), scale)
        state.weight = torch.where(
            self._error(state.weight, target) < self._error(rounded, target), state.weight, rounded
        )
        return state

    def _error(self, weight: Tensor, target: Tensor) -> Tensor:
        """`(w − w*)ᵀ A (w − w*)` of every row, `(rows,)`."""
        missed = weight - target
        return (self.A @ missed).mul_(missed).sum(0)

    def _rounded(self, values: Tensor, scale: Tensor) -> Tensor:
        return self.grid.nearest(values / scale).mul_(scale)

    def _stored(self, scale: Tensor) -> Tensor:
        """Scales as they can be stored, none of them zero."""
        stored = scale.to(self.grid.scale_dtype)
        return stored.clamp_(min=self.grid.lowest_scale).float()

    def _grouped(self, values: Tensor) -> Tensor:
        """`(groups, inputs of a group, rows)`, a view of `(in, rows)`."""
        return values.view(self.groups, self.width // self.groups, -1)

    def _search(self, weight: Tensor) -> Tensor:
        """Scales, `(groups, rows)`, with the least error weighted by `diag A`; 1 for a group of zeros."""
        grouped, cost = self._grouped(weight), self._grouped(self.A.diagonal()[:, None])
        largest = grouped.abs().amax(1) / self.grid.highest
        largest = torch.where(largest > 0, largest, 1.0)
        best, least = self._stored(largest), torch.full_like(largest, torch.inf)
        for shrink in SHRINKS:
            scale = self._stored(largest * shrink)
            error = (self._rounded(grouped, scale[:, None]).sub_(grouped).square_().mul_(cost)).sum(1)
            better = error < least
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
        return best

    def _sweep(self, weight: Tensor, support: Tensor, scale: Tensor) -> Tensor:
        """Round column by column; columns to come compensate the error of `weight`, which is used up."""
        order, result = self.order.tolist(), torch.empty_like(weight)
        weight, group_of = weight[self.order], self.group_of[self.order].tolist()
        # Views of single columns, made once: making them anew costs as much as the arithmetic on them.
        column, kept, scales, rounded = weight.unbind(), support.unbind(), scale.unbind(), result.unbind()
        for start in range(0, self.width, BLOCK):
            stop = min(start + BLOCK, self.width)
            missed = torch.empty_like(weight[start:stop])
            for at, error in enumerate(missed.unbind(), start):
                value = self._rounded(column[at], scales[group_of[at]]).mul_(kept[order[at]])
                rounded[order[at]].copy_(value)
                torch.sub(column[at], value, out=error)
                weight[at + 1 : stop].addr_(self.unit[at, at + 1 : stop], error, alpha=-1)
            weight[stop:].addmm_(self.unit[start:stop, stop:].T, missed, alpha=-1)
        return result

    def descend(self, state: _State) -> None:
        """One pass of coordinate descent: column by column, the best value of the grid for all other columns."""
        A, weight = self.A, state.weight
        diagonal, group_of = A.diagonal().tolist(), self.group_of.tolist()
        column, kept, scales = weight.unbind(), state.support.unbind(), state.scale.unbind()
        gradient = A @ (weight - state.target)
        for start in range(0, self.width, BLOCK):
            stop = min(start + BLOCK, self.width)
            ahead, moved = gradient[start:stop].clone(), torch.empty_like(weight[start:stop])
            slopes = ahead.unbind()
            for at, change in enumerate(moved.unbind(), start):
                free = torch.sub(column[at], slopes[at - start], alpha=1 / diagonal[at])
                new = self._rounded(free, scales[group_of[at]]).mul_(kept[at])
                torch.sub(new, column[at], out=change)
                column[at].copy_(new)
                ahead[at + 1 - start :].addr_(A[at, at + 1 : stop], change)
            gradient.addmm_(A[:, start:stop], moved)

    def exchange(self, state: _State, period: int) -> None:
        """Of every group of inputs and every row, the exchange of a kept weight for a pruned one that gains most.

        With the gradient g of the halved error, the kept weight j falls to zero and the pruned one k becomes the value
        v of the grid that is best then:

            E(j, k) = −w_j g_j + ½ w_j² A_jj + v (g_k − w_j A_jk) + ½ v² A_kk ,

        and the exchange with the least E is made where that is negative.

        Args:
            state: of some rows.
            period: number of consecutive inputs of a group.
        """
        A, weight = self.A, state.weight
        gradient = A @ (weight - state.target)
        block = max(BLOCK // period, 1) * period
        for start in range(0, self.width, block):
            stop = min(start + block, self.width)
            moved = torch.zeros_like(weight[start:stop])
            ahead = gradient[start:stop].clone()
            for at in range(start, stop, period):
                own, here = slice(at, at + period), slice(at - start, at - start + period)
                change = self._exchanged(state, own, ahead[here])
                moved[here] = change
                ahead[here.stop :].addmm_(A[here.stop + start : stop, own], change)
            gradient.addmm_(A[:, start:stop], moved)

    def _exchanged(self, state: _State, own: slice, gradient: Tensor) -> Tensor:
        """Make the exchange in one group of inputs; the change of its weights, `(period, rows)`."""
        A, weight, support = self.A[own, own], state.weight[own], state.support[own]
        scale, diagonal = state.scale[self.group_of[own]], A.diagonal()[:, None]
        # (kept, pruned, rows): the slope of the pruned one once the kept one is zero
        slope = gradient[None] - weight[:, None] * A[:, :, None]
        value = self._rounded(-slope / diagonal, scale)
        gain = value * (slope + 0.5 * value * diagonal) + (weight * (0.5 * weight * diagonal - gradient))[:, None]
        allowed = support[:, None] & ~support[None] & (state.target[own] != 0)[None]
        least, pair = gain.masked_fill_(~allowed, torch.inf).flatten(0, 1).min(0)
        chosen = least < 0
        out, into = (pair // len(A))[None], (pair % len(A))[None]
        new = weight.scatter(0, out, 0.0).scatter(0, into, value.flatten(0, 1).gather(0, pair[None]))
        change = torch.where(chosen, new - weight, 0.0)
        weight += change
        swapped = support.scatter(0, out, False).scatter(0, into, True)
        support.copy_(torch.where(chosen, swapped, support))
        return change

    def refit_scales(self, state: _State) -> None:
        """Scales that are optimal for the codes, for rows where they, as stored, lower the error."""
        codes = state.weight / state.scale[self.group_of]
        wanted = self._grouped((self.A @ state.target).mul_(codes)).sum(1).T
        gram = torch.empty(wanted.shape[0], self.groups, self.groups, dtype=codes.dtype, device=codes.device)
        size = self.width // self.groups
        for group in range(self.groups):
            inputs = slice(group * size, (group + 1) * size)
            gram[:, group] = self._grouped((self.A[:, inputs] @ codes[inputs]).mul_(codes)).sum(1).T
        old = state.scale.T
        empty = gram.diagonal(dim1=1, dim2=2) == 0
        system = gram + torch.diag_embed(empty + 1e-6 * gram.diagonal(dim1=1, dim2=2))
        solved, info = torch.linalg.solve_ex(system, torch.where(empty, 0.0, wanted)[..., None])
        new = torch.where(empty, old, solved[..., 0])
        valid = (new > 0).all(1) & new.isfinite().all(1) & (info == 0)
        new = self._stored(torch.where(valid[:, None], new, old))

        def error(scale: Tensor) -> Tensor:
            return ((gram @ scale[..., None])[..., 0] - 2 * wanted).mul_(scale).sum(1)

        better = valid & (error(new) < error(old))
        state.scale = torch.where(better[:, None], new, old).T.contiguous()
        state.weight = codes.mul_(state.scale[self.group_of])
