"""Removal of coupled channels from a block's tensors, by slicing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from llmprune.model.experts import storage_of
from llmprune.pruning.permutation import classes_left
from llmprune.structure.coupling import Coupling, Producer, permute

Shapes = dict[str, tuple[int, ...]]


def permute_and_slice(
    coupling: Coupling, order: Tensor, tensors: Mapping[str, Tensor], prefix: str = ""
) -> dict[str, Tensor]:
    """Keep the inputs `order` of a consumer, in that order, and permute and slice its producers to match.

    Inputs that are not in `order` are removed, and with them all rows on which nothing else depends.

    Args:
        coupling: of the consumer.
        order: `(kept,)`, int64: position p of the consumer gets input `order[p]`.
        tensors: at least all parameters of these layers, as the modules store them, by name.
        prefix: of the local names in `tensors`.

    Returns:
        The changed tensors, new ones, by name.

    Raises:
        ValueError: the order moves inputs out of their class or apart from their copies.
    """
    if len(order) == coupling.width:
        return permute(coupling, order, tensors, prefix)
    kept = order.sort().values
    changed = slice_channels(coupling, kept, tensors, prefix)
    if torch.equal(order, kept):
        return changed
    place = _new_index(kept, coupling.width)
    return changed | permute(restricted(coupling, kept), place[order], {**tensors, **changed}, prefix)


def slice_channels(
    coupling: Coupling, kept: Tensor, tensors: Mapping[str, Tensor], prefix: str = ""
) -> dict[str, Tensor]:
    """The weight of a consumer with the inputs `kept (k,)`, int64, and its producers without the rows of the others.

    Tensors on the meta device are sliced too, which gives their new shapes.
    """
    removed = _removed_mask(coupling, kept)
    changed = {}
    for dependency in coupling.dependencies:
        rows = dependency.kept_rows(removed)
        for name in (f"{prefix}{dependency.local}.weight", f"{prefix}{dependency.local}.bias"):
            if name in tensors and len(rows) < len(dependency.single):
                axis = tensors[name].dim() - 1 if dependency.transposed else 0
                changed[name] = tensors[name].index_select(axis, rows.to(tensors[name].device))
    name = f"{prefix}{coupling.consumer}.weight"
    changed[name] = tensors[name].index_select(int(not coupling.transposed), kept.to(tensors[name].device))
    return changed


def restricted(coupling: Coupling, kept: Tensor) -> Coupling:
    """The coupling of the inputs `kept (k,)`, int64, with inputs and rows renumbered; without dependencies."""
    left = classes_left(coupling.classes, kept, coupling.width)
    removed = _removed_mask(coupling, kept)
    rows = {
        dependency.local: _new_index(dependency.kept_rows(removed), len(dependency.single))
        for dependency in coupling.dependencies
    }
    producers = tuple(
        Producer(
            producer.local,
            producer.transposed,
            tuple(rows[producer.local][m[:, s]] for m, (_, s) in zip(producer.rows, left, strict=True) if s.any()),
        )
        for producer in coupling.producers
    )
    classes = tuple(slots for slots, stays in left if stays.any())
    return replace(coupling, width=len(kept), classes=classes, producers=producers, dependencies=())


def _removed_mask(coupling: Coupling, kept: Tensor) -> Tensor:
    removed = torch.ones(coupling.width, dtype=torch.bool)
    removed[kept] = False
    return removed


def _new_index(kept: Tensor, size: int) -> Tensor:
    """The new index of every old one, `(size,)`, int64; −1 for what is removed."""
    numbers = torch.full((size,), -1)
    numbers[kept] = torch.arange(len(kept))
    return numbers


def shapes_after(coupling: Coupling, kept: Tensor, block: nn.Module) -> Shapes:
    """The new shapes of the parameters of a block when a consumer keeps some of its inputs, by local name.

    Of a parameter with the matrices of experts: as if all experts lost as many.

    Args:
        coupling: of the consumer.
        kept: its inputs that stay, `(k,)`, int64.
        block: the block, also on the meta device.
    """
    stored = {name: storage_of(block, name) for name in coupling.sliced_parameters(block)}
    places = {name: found for name, found in stored.items() if found is not None}
    tensors = {name: part(block.get_parameter(place).data) for name, (place, part) in places.items()}
    meta = {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}
    shapes = {}
    for name, tensor in slice_channels(coupling, kept, meta).items():
        place, experts = places[name][0], places[name][0] != name
        shapes[place] = (*([len(block.get_parameter(place))] if experts else []), *tensor.shape)
    return shapes
