"""SparseGPT: optimal brain surgeon along the columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from llmprune.pruning.linalg import inverse_factor
from llmprune.pruning.lowest import lowest
from llmprune.pruning.methods import Cost, Method
from llmprune.pruning.methods.magnitude import by_magnitude
from llmprune.pruning.pattern import SparsityPattern
from llmprune.pruning.problem import GroupProblem, LayerSolution, Status

STEP, BLOCK = 8, 128


@dataclass(frozen=True, slots=True)
class SparseGPT(Method):
    """Prune columns left to right; the columns to the right compensate for every pruned weight.

    With `(H + λI)⁻¹ = UᵀU`, a pruned weight `w_j` leaves the error `e_j = w_j / U_jj`, and `w_k −= e_j U_jk` for all
    `k > j`. Pruned are the weights with the smallest `w_j² / U_jj²`: for N:M chosen when the group is reached,
    unstructured when its block of columns is (Frantar & Alistarh 2023, algorithm 1).

    All layers of a group are solved as rows of one matrix, held transposed so that a column is contiguous. The sweep
    halves the columns recursively: solve the left half, update the right half by one matrix product, solve it. A
    group of a few columns is swept one by one. So nearly all the work is in large products, whatever the width.

    Differs from the published code: unstructured counts are exact over the layer (or over each row) instead of a
    threshold per block; inputs that are always zero keep their weights unless the pattern prunes them (the published
    code zeroes them all); zeros of the source stay zero; the default damping is 0.03, not 0.01; it is raised, and that
    is reported, if a factorisation fails.

    Args:
        damping: λ as a fraction of the mean diagonal of H.
    """

    cost: ClassVar[Cost] = Cost(products=4, squares=1.7, stacks=4.0)

    damping: float = 0.03

    def solve(self, problem: GroupProblem, pattern: SparsityPattern) -> list[LayerSolution]:
        """Prune the layers of one group together."""
        gram = problem.stats.gram
        if problem.stats.tokens == 0:
            return [by_magnitude(layer.weight, pattern, Status.NO_INPUT) for layer in problem.layers]
        factor = inverse_factor(gram, self.damping)
        columns = torch.cat([layer.weight.T for layer in problem.layers], dim=1)
        selection = _selection(pattern, [len(layer.weight) for layer in problem.layers], columns == 0)
        kept = _Sweep(columns, factor.upper, gram.diagonal() == 0, selection).run()
        status = Status.DAMPING_RAISED if factor.retries else Status.OK
        stats = {"damping_lambda": factor.ridge, "damping_retries": float(factor.retries)}
        return [
            LayerSolution(weight, mask, status, dict(stats))
            for weight, mask in zip(problem.split(columns.T), problem.split(kept.T), strict=True)
        ]


class _Selection(Protocol):
    """Chooses the pruned weights while the sweep goes on.

    Attributes:
        block: number of columns whose weights are chosen together, when the sweep reaches them.
        step: number of columns that are swept one by one.
    """

    block: int
    step: int

    def choose(self, start: int, score: Tensor) -> Tensor:
        """Mask of the pruned weights of the block from column `start` on, for its score `(columns, rows)`."""
        ...


class _GroupSelection:
    """N of every M inputs are chosen when the sweep reaches the M."""

    def __init__(self, n: int, m: int) -> None:
        self.n = n
        self.step = self.block = m

    def choose(self, start: int, score: Tensor) -> Tensor:
        return lowest(score, self.n, dim=0)


class _ProjectedSelection:
    """Any pattern: a group of inputs is projected when the sweep reaches it; without groups, all inputs at its start.

    Args:
        pattern: the pattern of every layer.
        rows: number of rows of every layer.
        width: number of inputs.
    """

    def __init__(self, pattern: SparsityPattern, rows: list[int], width: int) -> None:
        self.pattern, self.rows = pattern, rows
        self.block = pattern.group or width
        self.step = min(STEP, self.block)

    def choose(self, start: int, score: Tensor) -> Tensor:
        kept = [self.pattern.project(layer.T).T for layer in torch.split(score, self.rows, 1)]
        return ~torch.cat(kept, 1)


class _BlockSelection:
    """A ratio of the weights of a row or a layer: each block of columns has a quota, exact over all blocks.

    Zeros of the source are pruned anyway; what the count asks for beyond them is spread over the blocks in proportion
    to their nonzero weights, as differences of one cumulative count, so that it adds up exactly.

    Args:
        pattern: an elementwise pattern without groups.
        rows: number of rows of every layer.
        zeros: of the source, `(in, rows)`, bool.
    """

    step, block = STEP, BLOCK

    def __init__(self, pattern: SparsityPattern, rows: list[int], zeros: Tensor) -> None:
        self.by_row, self.rows = pattern.rows_independent, rows
        width = len(zeros)
        sizes = [width] * zeros.shape[1] if self.by_row else [width * r for r in rows]
        count = torch.tensor([pattern.count(size) for size in sizes], device=zeros.device)
        nonzero = torch.stack([(~block).sum(0) for block in torch.split(zeros, self.block)])
        if not self.by_row:
            nonzero = torch.stack([part.sum(1) for part in torch.split(nonzero, rows, dim=1)], 1)
        upto = nonzero.cumsum(0)
        beyond = (count - torch.tensor(sizes, device=zeros.device) + upto[-1]).clamp(min=0)
        done = (upto * beyond.double() / upto[-1].clamp(min=1) + 0.5).floor().long()
        done[-1] = beyond
        self.zeros, self.quota = zeros, done.diff(dim=0, prepend=torch.zeros_like(done[:1]))

    def choose(self, start: int, score: Tensor) -> Tensor:
        quota = self.quota[start // self.block]
        zeros = self.zeros[start : start + len(score)]
        if self.by_row:
            return lowest(score, (quota + zeros.sum(0))[None], dim=0)
        parts = zip(torch.split(score, self.rows, 1), torch.split(zeros, self.rows, 1), quota.tolist(), strict=True)
        chosen = [lowest(s.T.flatten(), n + int(z.sum())).view(s.T.shape) for s, z, n in parts]
        return torch.cat(chosen).T.contiguous()


def _selection(pattern: SparsityPattern, rows: list[int], zeros: Tensor) -> _Selection:
    if pattern.nm is not None:
        return _GroupSelection(*pattern.nm)
    if pattern.elementwise:
        return _BlockSelection(pattern, rows, zeros)
    return _ProjectedSelection(pattern, rows, len(zeros))


class _Sweep:
    """One pass over the columns of a stack of layers.

    With `V = diag(U)⁻¹ U` of unit diagonal, the update of `w_k` by a pruned `w_j` is `w_k −= w_j V_jk`.

    Args:
        columns: the weights transposed, `(in, rows)`; pruned in place.
        upper: U, `(in, in)`; used up.
        dead: inputs that are always zero, `(in,)`; of their weights all are pruned before those of other inputs, but
            after existing zeros.
        selection: chooses the pruned weights.
    """

    def __init__(self, columns: Tensor, upper: Tensor, dead: Tensor, selection: _Selection) -> None:
        pivot = upper.diagonal().clone()
        self.columns = columns
        self.unit = upper.div_(pivot[:, None])
        self.saliency = pivot.square().reciprocal()[:, None]
        self.selection = selection
        self.zeros = columns == 0
        self.has_zeros = self.zeros.any(1).tolist()
        self.is_dead = dead.tolist()
        self.pruned = torch.empty_like(columns)
        self.values = torch.empty_like(columns)
        # Views of single columns, made once: making them anew costs more than the arithmetic on them.
        self.column, self.pruned_of, self.values_of = columns.unbind(), self.pruned.unbind(), self.values.unbind()

    def run(self) -> Tensor:
        """Mask of the kept weights, `(in, rows)`."""
        self._half(0, len(self.columns))
        return self.pruned == 0

    def _half(self, start: int, stop: int, chosen: bool = False) -> None:
        width, block, step = stop - start, self.selection.block, self.selection.step
        if not chosen and width <= block:
            self._choose(start, stop)
            chosen = True
        if width <= step:
            self._eliminate(start, stop)
            return
        unit = step if chosen else block
        middle = start + max(width // (2 * unit), 1) * unit
        self._half(start, middle, chosen)
        self.columns[middle:stop].addmm_(self.unit[start:middle, middle:stop].T, self.values[start:middle], alpha=-1)
        self._half(middle, stop, chosen)

    def _choose(self, start: int, stop: int) -> None:
        """Choose the pruned weights of a block, among them all zeros of the source."""
        score = self.columns[start:stop].square().mul_(self.saliency[start:stop])
        for at in range(start, stop):
            if self.is_dead[at]:
                score[at - start] = -1.0
        some_zeros = any(self.has_zeros[start:stop])
        if some_zeros:
            score.masked_fill_(self.zeros[start:stop], -torch.inf)
        pruned = self.selection.choose(start, score)
        self.pruned[start:stop] = pruned.logical_or_(self.zeros[start:stop]) if some_zeros else pruned

    def _eliminate(self, start: int, stop: int) -> None:
        """Prune a few columns one after the other; `removed` keeps each weight as it was when it went."""
        unit = self.unit[start:stop, start:stop].tolist()
        for at in range(start, stop):
            values = torch.mul(self.column[at], self.pruned_of[at], out=self.values_of[at])
            for later in range(at + 1, stop):
                self.column[later].sub_(values, alpha=unit[at - start][later - start])
        self.columns[start:stop].sub_(self.values[start:stop])
