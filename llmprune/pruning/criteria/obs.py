"""Greedy optimal brain surgeon on whole units, then swaps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.pruning.criteria import Criterion
from llmprune.pruning.criteria.problem import Choice, RemovalProblem
from llmprune.pruning.linalg import damped_inverse
from llmprune.pruning.methods import Cost

PANEL = 4
SWAP_ROUNDS = 64
CANDIDATES = 3
PRODUCT_ROWS = 64
WIDEST = 4096
"""Wider layers keep the choice of the greedy removal: exchanges would take longer than all else."""


@dataclass(frozen=True, slots=True)
class OBS(Criterion):
    """Remove the unit of the least loss after compensation, one after the other; then exchange units.

    With `A = H + λI` and `M = A_SS⁻¹` over the kept inputs S, the loss of unit g is `tr(W_g M_gg⁻¹ W_gᵀ)` (ZipLM,
    Kurtic et al. 2023). When it is removed, `W −= W_g M_gg⁻¹ M_g:` and `M −= M_:g M_gg⁻¹ M_g:`, both exact.

    Differs from ZipLM: wide layers lose `block` units at a time. Of the `PANEL · block` units with the lowest loss the
    best `block` are found one by one with exact downdates among themselves, and the rest of the matrices follows in one
    product. So the work is that of a few factorisations, whatever the width.

    Then units are exchanged (OSSCAR, Meng et al. 2024): a removed one is restored, which gains `tr(r_g K_g⁻¹ r_gᵀ)`
    with `r = [(W* − W) A]_:g` and `K_g = A_gg − A_gS A_SS⁻¹ A_Sg`, and a kept one is removed instead. For single
    channels the loss of every pair is known exactly from three products; the best pairs change places, several at a
    time while that lowers the loss, then fewer. For heads those that gain most are restored in turn, each in exchange
    for the cheapest.

    Inputs that are always zero (`H_jj = 0`) have no loss, whatever their weights: units of such inputs go first.

    Args:
        damping: λ as a fraction of the mean diagonal of H.
        swaps: most rounds of swaps.
    """

    cost: ClassVar[Cost] = Cost(products=8, squares=8.0)

    damping: float = 0.01
    swaps: int = SWAP_ROUNDS

    def select(self, problem: RemovalProblem, count: int) -> Choice:
        """Remove the units of the least loss after compensation."""
        search = Search(problem, self.damping)
        block = max(1, problem.units.shape[1] // 128)
        search.remove(count, block)
        at_a_time = 4 * block
        for _ in range(self.swaps if problem.weight.shape[1] <= WIDEST else 0):
            if not search.swap(at_a_time):
                if at_a_time == 1:
                    break
                at_a_time = (at_a_time + 1) // 2
        return Choice(search.removed, search.retries)


class Search:
    """The state of a removal: inverse Gram and optimal weights of the kept inputs.

    Args:
        problem: the layer, and the units of its inputs.
        damping: λ as a fraction of the mean diagonal of H.

    Attributes:
        removed: `(pools, units)`, bool.
        inverse: `M`, `(in, in)`: `A_SS⁻¹` on S, zero elsewhere.
        weight: `W`, `(out, in)`: optimal on S, zero elsewhere.
        retries: how often the damping was raised tenfold.
    """

    def __init__(self, problem: RemovalProblem, damping: float) -> None:
        self.units = problem.units
        self.target = problem.weight.masked_fill(problem.gram.diagonal() == 0, 0)
        self.removed = torch.zeros(problem.units.shape[:2], dtype=torch.bool, device=problem.weight.device)
        self.inverse, self.ridge, self.retries = damped_inverse(problem.gram, damping)
        self.gram = problem.gram
        self.weight = self.target.clone()

    def remove(self, count: int, block: int) -> float:
        """Remove `count` units from every pool, `block` at a time; returns the loss that this adds."""
        remaining, loss = count, 0.0
        while remaining:
            now = min(block, remaining)
            panel = self._panel(PANEL * now, now)
            chosen, added = self._best(panel, now)
            self._drop(chosen)
            remaining, loss = remaining - now, loss + added
        return loss

    def losses(self) -> Tensor:
        """The loss `tr(W_g M_gg⁻¹ W_gᵀ)` of every unit, `(pools, units)`, infinite for removed ones."""
        square = _products(self.weight, self.weight, self.units)
        return _losses(self.inverse, square, self.units).masked_fill(self.removed, torch.inf)

    def _panel(self, size: int, least: int) -> Tensor:
        """The candidates of every pool, `(pools, size)`: the units with the lowest loss."""
        size = min(max(size, least), int((~self.removed[0]).sum()))
        if self.units.shape[-1] > 1:
            size = int((~self.removed[0]).sum())
        return self.losses().sort(dim=1, stable=True).indices[:, :size]

    def _best(self, panel: Tensor, count: int) -> tuple[Tensor, float]:
        """The best `count` units of every pool of the panel, found one by one: `(pools, count)`, and their loss."""
        units = self.units.gather(1, panel[..., None].expand(-1, -1, self.units.shape[-1]))
        columns = units.flatten()
        inverse = self.inverse[columns][:, columns]
        square = self.weight[:, columns].T @ self.weight[:, columns]
        local = torch.arange(len(columns), device=columns.device).view(units.shape)
        pools, size = panel.shape
        removed = torch.zeros(pools, size, dtype=torch.bool, device=panel.device)
        order: list[list[int]] = [[] for _ in range(pools)]
        total = 0.0
        for _ in range(count * pools):
            full = torch.tensor([len(picked) == count for picked in order], device=panel.device)
            losses = _losses(inverse, _blocks(square, local), local).masked_fill(removed | full[:, None], torch.inf)
            at = int(losses.argmin())
            pool, unit = divmod(at, size)
            total += float(losses.flatten()[at])
            order[pool].append(unit)
            removed[pool, unit] = True
            self._downdate(inverse, square, local[pool, unit])
        picked = torch.tensor(order, device=panel.device)
        return panel.gather(1, picked), total

    @staticmethod
    def _downdate(inverse: Tensor, square: Tensor, unit: Tensor) -> None:
        """Remove one unit, given by its inputs, from `M` and `WᵀW`, in place."""
        pivot = inverse[unit][:, unit]
        step = torch.linalg.solve(pivot, inverse[unit])
        own = square[unit][:, unit]
        # (W − W_g T)ᵀ(W − W_g T) = Q − Q_:g T − Tᵀ Q_g: + Tᵀ Q_gg T
        half = square[unit] - 0.5 * own @ step
        square -= step.T @ half
        square -= half.T @ step
        inverse -= inverse[:, unit] @ step

    def _drop(self, chosen: Tensor) -> None:
        """Remove units `(pools, count)` from the state."""
        self._drop_columns(self.units.gather(1, chosen[..., None].expand(-1, -1, self.units.shape[-1])).flatten())

    def _drop_columns(self, columns: Tensor) -> float:
        """Remove whole units, given by their inputs, from the state; returns the loss that this adds."""
        lower = torch.linalg.cholesky(self.inverse[columns][:, columns])
        step = torch.cholesky_solve(self.inverse[columns], lower)
        weight = self.weight[:, columns]
        loss = float((torch.cholesky_solve(weight.T, lower).T * weight).sum())
        self.weight.addmm_(weight, step, alpha=-1)
        self.inverse.addmm_(self.inverse[:, columns], step, alpha=-1)
        self.weight[:, columns] = 0
        self.inverse[columns] = 0
        self.inverse[:, columns] = 0
        self.removed |= self._holds(columns)
        return loss

    def swap(self, count: int) -> bool:
        """Exchange up to `count` removed units for kept ones; whether that lowered the loss."""
        away, reach, residual, schur = self._outside()
        if self.units.shape[-1] == 1:
            return self._try(*self._pairs(away, reach, residual, schur, count))
        gains = torch.linalg.solve(schur, _products(residual, residual, away)).diagonal(dim1=-2, dim2=-1).sum(-1)
        columns = self.units[self.removed].view(away.shape)
        for at in gains.flatten().argsort(descending=True)[:CANDIDATES].tolist():
            pool, unit = divmod(at, away.shape[1])
            if self._try(columns[pool, unit][None], None, pool):
                return True
        return False

    def _outside(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the removed inputs P: the units as numbers in P, `M A_:P`, `[(W* − W) A]_:P`, all `K_g`."""
        columns = self.units[self.removed].flatten()
        cross = self._damped(columns)
        reach = self.inverse @ cross
        residual = (self.target - self.weight) @ cross
        pools, _, size = self.units.shape
        away = torch.arange(len(columns), device=columns.device).view(pools, -1, size)
        schur = _blocks(cross[columns], away) - _products(cross, reach, away)
        return away, reach, residual, schur

    def _pairs(self, away: Tensor, reach: Tensor, residual: Tensor, schur: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The best exchanges of single channels: those to restore `(k, 1)`, and those to remove `(k, 1)`.

        With i restored, `W_j` becomes `W_j − v_ji r_i / K_i` and `M_jj` becomes `M_jj + v_ji² / K_i`, `v = M A_:P`;
        so the loss of j is known for every i.
        """
        columns, kept = self.units[self.removed].flatten(), self.units[~self.removed].flatten()
        pivot = schur.flatten()
        square = residual.square().sum(0)
        v = reach[kept]
        cross = self.weight[:, kept].T @ residual
        top = self.weight[:, kept].square().sum(0)[:, None] - 2 * v * cross / pivot + v.square() * square / pivot**2
        change = top / (self.inverse.diagonal()[kept][:, None] + v.square() / pivot) - square / pivot
        pools = len(self.units)
        if pools > 1:
            same = torch.arange(pools, device=kept.device)
            home, other = (same.repeat_interleave(len(part) // pools) for part in (kept, columns))
            change.masked_fill_(home[:, None] != other, torch.inf)
        best, partner = change.min(0)
        back: list[int] = []
        taken: list[int] = []
        for at in best.argsort().tolist():
            if len(back) == count or float(best[at]) >= 0:
                break
            if int(partner[at]) not in taken:
                back.append(at)
                taken.append(int(partner[at]))
        return columns[back][:, None], kept[taken][:, None]

    def _try(self, back: Tensor, away: Tensor | None, pool: int = 0) -> bool:
        """Exchange units, given by inputs `(k, size)`; undone, and False, if that raises the loss.

        Args:
            back: those to restore.
            away: those to remove; None for the cheapest of the pool.
            pool: where that is looked for.
        """
        if not len(back):
            return False
        before = self.removed.clone(), self.weight.clone(), self.inverse.clone()
        gained = self._restore(back)
        if away is None:
            losses = self.losses()[pool]
            lost, unit = losses.min(0)
            self._drop_columns(self.units[pool, unit])
            cost = float(lost)
        else:
            cost = self._drop_columns(away.flatten())
        if cost < gained * (1 - 1e-9):
            return True
        self.removed, self.weight, self.inverse = before
        return False

    def _restore(self, back: Tensor) -> float:
        """Restore units, given by inputs `(k, size)`; returns by how much the loss falls."""
        columns = back.flatten()
        cross = self._damped(columns)
        reach = self.inverse @ cross
        residual = (self.target - self.weight) @ cross
        lower = torch.linalg.cholesky(cross[columns] - cross.T @ reach)
        step = torch.cholesky_solve(residual.T, lower).T
        self.weight.addmm_(step, reach.T, alpha=-1)
        self.weight[:, columns] += step
        upward = torch.cholesky_solve(reach.T, lower)
        self.inverse.addmm_(reach, upward)
        self.inverse[:, columns] -= upward.T
        self.inverse[columns] -= upward
        self.inverse[columns[:, None], columns] = torch.cholesky_inverse(lower)
        self.removed &= ~self._holds(columns)
        return float((step * residual).sum())

    def _holds(self, columns: Tensor) -> Tensor:
        """Mask of the units that these inputs make up, `(pools, units)`."""
        inside = torch.zeros(self.target.shape[1], dtype=torch.bool, device=columns.device)
        inside[columns] = True
        return inside[self.units[..., 0]]

    def _damped(self, columns: Tensor) -> Tensor:
        """The columns `A_:,columns` of the damped Gram, float64."""
        part = self.gram[:, columns].double()
        part[columns, torch.arange(len(columns), device=columns.device)] += self.ridge[columns]
        return part


def _products(left: Tensor, right: Tensor, units: Tensor) -> Tensor:
    """The product `L_gᵀR_g` of every unit, `(pools, units, size, size)`."""
    if units.shape[-1] == 1:
        # A few rows at a time, so that no third matrix is written: several times faster.
        rows = zip(torch.split(left, PRODUCT_ROWS), torch.split(right, PRODUCT_ROWS), strict=True)
        return sum(((a * b).sum(0) for a, b in rows), torch.zeros_like(left[0]))[units][..., None]
    return torch.einsum("opus,oput->pust", left[:, units], right[:, units])


def _blocks(matrix: Tensor, units: Tensor) -> Tensor:
    """The diagonal blocks of the units, `(pools, units, size, size)`."""
    return matrix[units[..., :, None], units[..., None, :]]


def _losses(inverse: Tensor, square: Tensor, units: Tensor) -> Tensor:
    """The loss `tr(W_g M_gg⁻¹ W_gᵀ)` of every unit, `(pools, units)`; undefined for removed units."""
    pivot = _blocks(inverse, units)
    if units.shape[-1] == 1:
        return (square / pivot.clamp(min=1e-300)).flatten(2).squeeze(-1)
    eye = torch.eye(units.shape[-1], dtype=pivot.dtype, device=pivot.device)
    empty = pivot.diagonal(dim1=-2, dim2=-1).le(0).any(-1)[..., None, None]
    solved: Tensor = torch.linalg.solve(torch.where(empty, eye, pivot), square)
    return solved.diagonal(dim1=-2, dim2=-1).sum(-1)
