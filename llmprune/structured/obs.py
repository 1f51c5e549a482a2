"""Greedy optimal brain surgeon on whole units, then swaps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.linalg import damped_inverse
from llmprune.structured.problem import RemovalProblem

PANEL = 4
ROUNDS = 64


@dataclass(frozen=True, slots=True)
class OBS:
    """The unit whose loss the others can best make up for goes, one after the other; then units change places.

    With `A = H + λI` and `M = A_SS⁻¹` over the inputs S that are left, the loss of unit g is `tr(W_g M_gg⁻¹ W_gᵀ)` (ZipLM,
    Kurtic et al. 2023). When it goes, `W −= W_g M_gg⁻¹ M_g:` and `M −= M_:g M_gg⁻¹ M_g:`, both exact.

    Wide layers lose `block` units at a time: of the `PANEL · block` units with the lowest loss the best `block` are
    found one by one with exact downdates among themselves, and the rest of the matrices follows in one product. So the
    work is that of a few factorisations, whatever the width.

    Then (OSSCAR, Meng et al. 2024) the units that are gone and would gain most, `tr(r_g K_g⁻¹ r_gᵀ)` with
    `r = [(W* − W) A]_:g` and `K_g = A_gg − A_gS A_SS⁻¹ A_Sg`, come back and the cheapest go instead, a block at a time,
    as long as that lowers the loss; otherwise half a block.

    Args:
        damping: λ as a fraction of the mean diagonal of H.
        swaps: most rounds of swaps.
    """

    damping: float = 0.01
    swaps: int = ROUNDS

    def select(self, problem: RemovalProblem, count: int) -> Tensor:
        """Remove what can best be made up for."""
        search = Search(problem, self.damping)
        block = max(1, problem.units.shape[1] // 128)
        search.remove(count, block)
        at_a_time = min(4 * block, count)
        for _ in range(self.swaps):
            if at_a_time == 0:
                break
            if not search.swap(at_a_time):
                at_a_time //= 2
        return search.gone


class Search:
    """The state of a removal: inverse and weights of what is left.

    Args:
        problem: what to remove from.
        damping: λ as a fraction of the mean diagonal of H.

    Attributes:
        gone: `(pools, units)`, bool.
        inverse: `M`, `(in, in)`: `A_SS⁻¹` on S, zero elsewhere.
        weight: `W`, `(out, in)`: optimal on S, zero elsewhere.
    """

    def __init__(self, problem: RemovalProblem, damping: float) -> None:
        self.units, self.target = problem.units, problem.weight
        self.gone = torch.zeros(problem.units.shape[:2], dtype=torch.bool, device=problem.weight.device)
        self.inverse, self.ridge = damped_inverse(problem.gram, damping)
        self.gram = problem.gram
        self.weight = problem.weight.clone()

    def remove(self, count: int, block: int) -> float:
        """Remove `count` units from every pool; returns the loss that this adds."""
        left, loss = count, 0.0
        while left:
            now = min(block, left)
            panel = self._panel(PANEL * now if now < left or block > 1 else now + PANEL, now)
            chosen, added = self._best(panel, now)
            self._drop(chosen)
            left, loss = left - now, loss + added
        return loss

    def losses(self) -> Tensor:
        """`tr(W_g M_gg⁻¹ W_gᵀ)` of every unit, `(pools, units)`, infinite for those that are gone."""
        return _losses(self.inverse, _square(self.weight, self.units), self.units).masked_fill(self.gone, torch.inf)

    def _panel(self, size: int, least: int) -> Tensor:
        """The units of every pool that are worth a closer look, `(pools, size)`: those with the lowest loss."""
        size = min(max(size, least), int((~self.gone[0]).sum()))
        if self.units.shape[-1] > 1:
            size = int((~self.gone[0]).sum())
        return self.losses().sort(dim=1, stable=True).indices[:, :size]

    def _best(self, panel: Tensor, count: int) -> tuple[Tensor, float]:
        """`count` units of every pool of the panel, one by one with exact downdates: `(pools, count)`, and their loss."""
        units = self.units.gather(1, panel[..., None].expand(-1, -1, self.units.shape[-1]))
        columns = units.flatten()
        inverse = self.inverse[columns][:, columns]
        square = self.weight[:, columns].T @ self.weight[:, columns]
        local = torch.arange(len(columns), device=columns.device).view(units.shape)
        pools, size = panel.shape
        gone = torch.zeros(pools, size, dtype=torch.bool, device=panel.device)
        order: list[list[int]] = [[] for _ in range(pools)]
        total = 0.0
        for _ in range(count * pools):
            full = torch.tensor([len(picked) == count for picked in order], device=panel.device)
            losses = _losses(inverse, _blocks(square, local), local).masked_fill(gone | full[:, None], torch.inf)
            at = int(losses.argmin())
            pool, unit = divmod(at, size)
            total += float(losses.flatten()[at])
            order[pool].append(unit)
            gone[pool, unit] = True
            self._downdate(inverse, square, local[pool, unit])
        picked = torch.tensor(order, device=panel.device)
        return panel.gather(1, picked), total

    @staticmethod
    def _downdate(inverse: Tensor, square: Tensor, going: Tensor) -> None:
        """Remove one unit from `M` and `WᵀW`, in place."""
        pivot = inverse[going][:, going]
        step = torch.linalg.solve(pivot, inverse[going])
        own = square[going][:, going]
        # (W − W_g T)ᵀ(W − W_g T) = Q − Q_:g T − Tᵀ Q_g: + Tᵀ Q_gg T
        half = square[going] - 0.5 * own @ step
        square -= step.T @ half
        square -= half.T @ step
        inverse -= inverse[:, going] @ step

    def _drop(self, chosen: Tensor) -> None:
        """Remove units `(pools, count)` from the state."""
        columns = self.units.gather(1, chosen[..., None].expand(-1, -1, self.units.shape[-1])).flatten()
        pivot = self.inverse[columns][:, columns]
        step = torch.cholesky_solve(self.inverse[columns], torch.linalg.cholesky(pivot))
        self.weight.addmm_(self.weight[:, columns].clone(), step, alpha=-1)
        self.inverse.addmm_(self.inverse[:, columns].clone(), step, alpha=-1)
        self.weight[:, columns] = 0
        self.inverse[columns] = 0
        self.inverse[:, columns] = 0
        self.gone.scatter_(1, chosen, True)

    def swap(self, count: int) -> bool:
        """Bring `count` units of every pool back and let as many go; whether that lowered the loss (or it is undone)."""
        before = self.gone.clone(), self.weight.clone(), self.inverse.clone()
        gained = self._restore(count)
        lost = self.remove(count, count)
        if lost < gained * (1 - 1e-9) and not torch.equal(self.gone, before[0]):
            return True
        self.gone, self.weight, self.inverse = before
        return False

    def _restore(self, count: int) -> float:
        """Bring back the units of every pool that gain most, as if alone; returns what they gain together."""
        pools, _, size = self.units.shape
        away = self.units[self.gone].view(pools, -1, size)
        columns = away.flatten()
        cross = self._damped(columns)
        reach = self.inverse @ cross
        residual = (self.target - self.weight) @ cross
        local = torch.arange(len(columns), device=columns.device).view(away.shape)
        schur = _blocks(cross[columns], local) - _products(cross, reach, local)
        square = _square(residual, local)
        best = torch.linalg.solve(schur, square).diagonal(dim1=-2, dim2=-1).sum(-1)
        chosen = best.sort(dim=1, descending=True, stable=True).indices[:, :count]
        inside = local.gather(1, chosen[..., None].expand(-1, -1, size)).flatten()
        back, reach, residual = columns[inside], reach[:, inside], residual[:, inside]
        schur = cross[back][:, inside] - cross[:, inside].T @ reach
        lower = torch.linalg.cholesky(schur)
        step = torch.cholesky_solve(residual.T, lower).T
        gained = float((step * residual).sum())
        self.weight.addmm_(step, reach.T, alpha=-1)
        self.weight[:, back] += step
        upward = torch.cholesky_solve(reach.T, lower)
        self.inverse.addmm_(reach, upward)
        self.inverse[:, back] -= upward.T
        self.inverse[back] -= upward
        self.inverse[back[:, None], back] = torch.cholesky_inverse(lower)
        number = torch.zeros_like(self.gone, dtype=torch.long)
        number[self.gone] = torch.arange(best.shape[1], device=columns.device).repeat(pools)
        returning = (number[..., None] == chosen[:, None]).any(-1) & self.gone
        self.gone &= ~returning
        return gained

    def _damped(self, columns: Tensor) -> Tensor:
        """`A_:,columns`."""
        part = self.gram[:, columns].clone()
        part[columns, torch.arange(len(columns), device=columns.device)] += self.ridge[columns]
        return part


def _square(weight: Tensor, units: Tensor) -> Tensor:
    """`W_gᵀW_g` of every unit, `(pools, units, size, size)`."""
    if units.shape[-1] == 1:
        return weight.square().sum(0)[units][..., None]
    return _products(weight, weight, units)


def _products(left: Tensor, right: Tensor, units: Tensor) -> Tensor:
    """`L_gᵀR_g` of every unit, `(pools, units, size, size)`."""
    if units.shape[-1] == 1:
        return (left * right).sum(0)[units][..., None]
    return torch.einsum("opus,oput->pust", left[:, units], right[:, units])


def _blocks(matrix: Tensor, units: Tensor) -> Tensor:
    """The diagonal blocks of the units, `(pools, units, size, size)`."""
    return matrix[units[..., :, None], units[..., None, :]]


def _losses(inverse: Tensor, square: Tensor, units: Tensor) -> Tensor:
    """`tr(W_g M_gg⁻¹ W_gᵀ)` of every unit, `(pools, units)`; units that are gone give anything."""
    pivot = _blocks(inverse, units)
    if units.shape[-1] == 1:
        return (square / pivot.clamp(min=1e-300)).flatten(2).squeeze(-1)
    eye = torch.eye(units.shape[-1], dtype=pivot.dtype, device=pivot.device)
    empty = pivot.diagonal(dim1=-2, dim2=-1).le(0).any(-1)[..., None, None]
    return torch.linalg.solve(torch.where(empty, eye, pivot), square).diagonal(dim1=-2, dim2=-1).sum(-1)
