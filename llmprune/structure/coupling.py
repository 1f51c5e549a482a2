"""How the inputs of a layer hang together with the rows of other layers, and how both change places.

If the inputs of a layer (the sink) are fed one by one by output rows of others (its sources), with nothing in between
that mixes them, rows and inputs can change places together, or go together, and the block computes the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Source:
    """A layer whose output rows feed a sink; or a norm on the way to it, whose scale has a row for every input.

    Args:
        local: module name inside the block.
        transposed: True where the module stores `(in, out)` (Conv1D).
        rows: for every class of the coupling `(copies, free)`, int64: the rows that move with its columns. There may be
            more than one row for a column (gate and up in one layer), fewer than inputs (one value row feeds an input
            of every query head of its group), or none.
    """

    local: str
    transposed: bool
    rows: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Feed:
    """Which inputs of a sink the rows of a layer, or the entries of a norm's scale, feed.

    Args:
        local: module name inside the block.
        single: `(rows,)`, int64, the only input that a row feeds, −1 for none or several.
        several: `(k,)`, int64, the rows that feed several (query and key rows feed all inputs of their heads).
        support: `(k, in)`, bool: which ones.
        transposed: True where the module stores `(in, out)` (Conv1D).
    """

    local: str
    single: Tensor
    several: Tensor
    support: Tensor
    transposed: bool = False

    def staying(self, gone: Tensor) -> Tensor:
        """The rows that stay, `(k,)`, int64, if the inputs `gone (in,)` go: a row goes with all that it feeds."""
        stays = torch.ones(len(self.single), dtype=torch.bool)
        alone = self.single >= 0
        stays[alone] = ~gone[self.single[alone]]
        stays[self.several] = (self.support & ~gone).any(1)
        return stays.nonzero().flatten()


@dataclass(frozen=True, slots=True)
class Coupling:
    """How a sink's inputs hang together with its sources' rows.

    Args:
        sink: module name inside the block.
        transposed: True where it stores `(in, out)` (Conv1D).
        width: its number of inputs.
        classes: each `(copies, free)`, int64, inputs of the sink. The inputs in one column are fed by the same rows and
            go together; the columns of a class may change places with each other, those of different classes may not
            (attention heads). Inputs that no row feeds alone are in no class.
        sources: the layers whose rows feed them one by one.
        feeds: all that feeds them, query and key rows and shared norms too.
        severable: whether inputs can be removed: without the rows that feed only them, they are zero, and the others
            are what they were (behind a norm over all of them they are not).
    """

    sink: str
    transposed: bool
    width: int
    classes: tuple[Tensor, ...]
    sources: tuple[Source, ...]
    feeds: tuple[Feed, ...] = ()
    severable: bool = False

    def parameters(self, block: nn.Module) -> list[str]:
        """Names in the block of the parameters that a permutation moves."""
        return self._parameters(block, [source.local for source in self.sources])

    def fed(self, block: nn.Module) -> list[str]:
        """Names in the block of the parameters that shrink when inputs are removed."""
        return self._parameters(block, [feed.local for feed in self.feeds])

    def _parameters(self, block: nn.Module, locals_: list[str]) -> list[str]:
        own = {name for name, _ in block.named_parameters()}
        names = [f"{local}.{kind}" for local in locals_ for kind in ("weight", "bias")]
        return [name for name in [*names, f"{self.sink}.weight"] if name in own]


def fold(
    coupling: Coupling, order: Tensor, tensors: Mapping[str, Tensor], prefix: str = "", sink: bool = True
) -> dict[str, Tensor]:
    """Permute the rows of the sources and the columns of the sink; the block computes the same as before.

    Args:
        coupling: what moves together.
        order: `(width,)`, int64: position p of the sink gets input `order[p]`. It must respect the classes.
        tensors: at least all parameters of these layers, as the modules store them, by name; a bias that is not there
            is one that the layer does not have.
        prefix: stands before the local names.
        sink: whether the sink's columns are permuted too.

    Returns:
        The tensors that changed, new ones, by name.

    Raises:
        ValueError: the order moves an input out of its class, or apart from its copies.
    """
    order = order.cpu()
    moves = [_move(order, slots) for slots in coupling.classes]
    respected = torch.equal(scatter(coupling.classes, moves, coupling.width), order)
    if not respected or len(set(order.tolist())) != coupling.width:
        raise ValueError("the order moves inputs out of their class or apart from their copies, or loses some")
    changed = {}
    for source in coupling.sources:
        for kind in ("weight", "bias"):
            name = f"{prefix}{source.local}.{kind}"
            if kind == "weight" or name in tensors:
                axis = tensors[name].dim() - 1 if source.transposed else 0
                rows = scatter(source.rows, moves, tensors[name].shape[axis])
                changed[name] = tensors[name].index_select(axis, rows.to(tensors[name].device))
    if sink:
        name = f"{prefix}{coupling.sink}.weight"
        changed[name] = tensors[name].index_select(int(not coupling.transposed), order.to(tensors[name].device))
    return changed


def _move(order: Tensor, slots: Tensor) -> Tensor:
    """By which column of `slots` every column is replaced."""
    position = torch.zeros_like(order)
    position[slots[0]] = torch.arange(slots.shape[1])
    return position[order[slots[0]]]


def scatter(indices: Sequence[Tensor], moves: Sequence[Tensor], size: int) -> Tensor:
    """The order of `size` rows in which the columns of every index matrix are moved."""
    order = torch.arange(size)
    for index, move in zip(indices, moves, strict=True):
        order[index] = index[:, move]
    return order
