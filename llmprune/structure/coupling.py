"""Coupled channels: input channels of a consumer layer and the output channels of its producers; both permuted.

Where every input channel of a consumer comes from output channels (rows) of producers and nothing in between mixes
channels, rows and inputs can be permuted together, or removed together, and the block computes the same. DepGraph (Fang
et al. 2023) calls such layers a dependency group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmprune.model.experts import storage_of


@dataclass(frozen=True, slots=True)
class Producer:
    """A layer whose output channels are permuted with a consumer's inputs; or a norm between, with a row per input.

    Args:
        local: module name inside the block.
        transposed: True where the module stores `(in, out)` (Conv1D).
        rows: for every class of the coupling `(copies, free)`, int64: the rows that are permuted with its columns.
            There may be more than one row for a column (gate and up in one layer), fewer than inputs (one value row
            feeds an input of every query head of its group), or none.
    """

    local: str
    transposed: bool
    rows: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Dependency:
    """The dependence of a consumer's inputs on the rows of a layer, or on the entries of a norm's scale.

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

    def kept_rows(self, removed: Tensor) -> Tensor:
        """The rows that are kept, `(k,)`, int64, without the inputs `removed (in,)`, bool.

        A row is removed with the last of the inputs that depend on it.
        """
        stays = torch.ones(len(self.single), dtype=torch.bool)
        alone = self.single >= 0
        stays[alone] = ~removed[self.single[alone]]
        stays[self.several] = (self.support & ~removed).any(1)
        return stays.nonzero().flatten()


@dataclass(frozen=True, slots=True)
class Coupling:
    """The input channels of a consumer with the rows they depend on.

    Args:
        consumer: module name inside the block.
        transposed: True where it stores `(in, out)` (Conv1D).
        width: its number of inputs.
        classes: each `(copies, free)`, int64, inputs of the consumer. The inputs in one column depend on the same rows
            and are removed together; the columns of a class may be permuted among themselves, not across classes
            (attention heads). Inputs that depend on no row alone are in no class.
        producers: the layers on whose rows they depend one by one.
        dependencies: all layers on which they depend, query and key layers and shared norms too.
        removable: whether inputs can be removed: with the rows that feed only them set to zero, they are zero and all
            other inputs are unchanged (false behind a norm over all of them).
    """

    consumer: str
    transposed: bool
    width: int
    classes: tuple[Tensor, ...]
    producers: tuple[Producer, ...]
    dependencies: tuple[Dependency, ...] = ()
    removable: bool = False

    def permuted_parameters(self, block: nn.Module) -> list[str]:
        """Names in the block of the weights and biases that a permutation of the inputs changes."""
        return self._parameters(block, [producer.local for producer in self.producers])

    def sliced_parameters(self, block: nn.Module) -> list[str]:
        """Names in the block of the weights and biases that are sliced when inputs are removed."""
        return self._parameters(block, [dependency.local for dependency in self.dependencies])

    def _parameters(self, block: nn.Module, locals_: list[str]) -> list[str]:
        names = [f"{local}.{kind}" for local in locals_ for kind in ("weight", "bias")]
        return [name for name in [*names, f"{self.consumer}.weight"] if storage_of(block, name) is not None]


def permute(
    coupling: Coupling, order: Tensor, tensors: Mapping[str, Tensor], prefix: str = "", consumer: bool = True
) -> dict[str, Tensor]:
    """Permute the rows of the producers and the columns of the consumer; the block computes the same as before.

    Args:
        coupling: of the consumer.
        order: `(width,)`, int64: position p of the consumer gets input `order[p]`. It must respect the classes.
        tensors: at least all parameters of these layers, as the modules store them, by name; a bias that is not there
            is one that the layer does not have.
        prefix: of the local names in `tensors`.
        consumer: whether the consumer's columns are permuted too.

    Returns:
        The permuted tensors, new ones, by name.

    Raises:
        ValueError: the order moves an input out of its class, or apart from its copies.
    """
    order = order.cpu()
    moves = [_move(order, slots) for slots in coupling.classes]
    respected = torch.equal(scatter(coupling.classes, moves, coupling.width), order)
    if not respected or len(set(order.tolist())) != coupling.width:
        raise ValueError("the order moves inputs out of their class or apart from their copies, or loses some")
    changed = {}
    for producer in coupling.producers:
        for kind in ("weight", "bias"):
            name = f"{prefix}{producer.local}.{kind}"
            if kind == "weight" or name in tensors:
                axis = tensors[name].dim() - 1 if producer.transposed else 0
                rows = scatter(producer.rows, moves, tensors[name].shape[axis])
                changed[name] = tensors[name].index_select(axis, rows.to(tensors[name].device))
    if consumer:
        name = f"{prefix}{coupling.consumer}.weight"
        changed[name] = tensors[name].index_select(int(not coupling.transposed), order.to(tensors[name].device))
    return changed


def _move(order: Tensor, slots: Tensor) -> Tensor:
    """The permutation of the columns of a class, `(free,)`, int64, that an order of all inputs implies."""
    position = torch.zeros_like(order)
    position[slots[0]] = torch.arange(slots.shape[1])
    return position[order[slots[0]]]


def scatter(indices: Sequence[Tensor], moves: Sequence[Tensor], size: int) -> Tensor:
    """The order of `size` rows in which the columns of every index matrix are permuted by its move, int64."""
    order = torch.arange(size)
    for index, move in zip(indices, moves, strict=True):
        order[index] = index[:, move]
    return order
