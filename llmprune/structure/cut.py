"""The inputs to remove from every layer, and the smaller model that results."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmprune.errors import InputError
from llmprune.model.experts import storage_of
from llmprune.model.skeleton import Skeleton
from llmprune.pruning.sparsity import Kind
from llmprune.structure.coupling import Coupling, Producer
from llmprune.structure.expert_cut import Mixtures
from llmprune.structure.slicing import Shapes, shapes_after

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class Cut:
    """The inputs that one consumer layer loses.

    Args:
        kind: channels or heads.
        block: name of its block.
        coupling: its coupled channels.
        units: `(pools, units, size)`, int64: its inputs, by units that are removed as a whole (a channel, a head).
        count: number of units to remove from every pool.
    """

    kind: Kind
    block: str
    coupling: Coupling
    units: Tensor
    count: int

    @property
    def name(self) -> str:
        """Full name of the layer."""
        return f"{self.block}.{self.coupling.consumer}"

    @property
    def width(self) -> int:
        """Number of inputs that are kept."""
        return self.coupling.width - self.count * self.units.shape[0] * self.units.shape[2]

    def rows(self, block: nn.Module) -> int:
        """Number of outputs of the layer."""
        found = storage_of(block, f"{self.coupling.consumer}.weight")
        assert found is not None
        return found[1](block.get_parameter(found[0]).data).numel() // self.coupling.width

    def parameters(self, block: nn.Module) -> dict[str, str]:
        """Full names of the parameters that get smaller, by the local names of the weights and biases in them.

        They differ for an expert, whose matrices lie in parameters with those of others.

        Args:
            block: its block.
        """
        names = self.coupling.sliced_parameters(block)
        return {name: f"{self.block}.{place[0]}" for name in names if (place := storage_of(block, name)) is not None}

    def shapes(self, block: nn.Module) -> Shapes:
        """New shapes by full name, see `shapes_after`: they are the same whichever inputs are removed."""
        kept = torch.ones(self.coupling.width, dtype=torch.bool)
        kept[self.units[:, self.units.shape[1] - self.count :].flatten()] = False
        found = shapes_after(self.coupling, kept.nonzero().flatten(), block)
        return {f"{self.block}.{local}": shape for local, shape in found.items()}


def removed_ratio(cuts: Sequence[Cut]) -> Fraction:
    """Ratio of the units that the cuts remove to all units of these layers."""
    removed = sum(cut.count * cut.units.shape[0] for cut in cuts)
    return Fraction(removed, sum(cut.units.shape[0] * cut.units.shape[1] for cut in cuts))


def smaller_shapes(skeleton: Skeleton, cuts: Sequence[Cut], mixtures: Mixtures | None) -> Shapes:
    """The new shapes of the tensors that get smaller, by full name."""
    fewer: Shapes = mixtures.shapes(dict(skeleton.model.state_dict())) if mixtures else {}
    found: Shapes = {}
    for cut in cuts:
        block = skeleton.model.get_submodule(cut.block)
        if not found.keys() >= set(cut.parameters(block).values()):  # else another expert has told them
            found |= cut.shapes(block)
    both = {name: (fewer[name][0], *found[name][1:]) for name in fewer.keys() & found.keys()}
    return fewer | found | both


@dataclass(frozen=True, slots=True)
class Structure:
    """The architecture after the removal of blocks, channels, heads and experts.

    Args:
        cuts: one for every consumer layer that loses inputs.
        changes: settings of the config with new values.
        config: of the smaller model.
        summary: for every removal, the request and what is done.
        ratios: of the blocks, and of the channels, heads and experts in all of them, that are removed.
        mixtures: the cuts of experts; None where none are removed.
        kept_blocks: numbers of the blocks that stay, rising; None for all.
        whole: where blocks are removed, the structure with all of them.
    """

    cuts: tuple[Cut, ...]
    changes: dict[str, Any]
    config: PreTrainedConfig
    summary: tuple[str, ...]
    ratios: Mapping[Kind, Fraction]
    mixtures: Mixtures | None = None
    kept_blocks: tuple[int, ...] | None = None
    whole: Structure | None = None

    def saved(self, skeleton: Skeleton) -> int:
        """Bytes that the written tensors lose."""
        return sum(n * skeleton.checkpoint.stored_dtype(name).itemsize for name, n in self._removed(skeleton))

    def removed_parameters(self, skeleton: Skeleton) -> int:
        """Number of parameters that the model loses."""
        parameters = dict(skeleton.model.named_parameters())
        return sum(n for name, n in self._removed(skeleton) if name in parameters)

    def _removed(self, skeleton: Skeleton) -> Iterator[tuple[str, int]]:
        """Name of every tensor that gets smaller or is removed, and how many values it loses."""
        tensors = dict(skeleton.model.state_dict())
        for index in self.removed_blocks(skeleton):
            for name in skeleton.block_parameters(index):
                yield name, tensors.pop(name).numel()
        for name, shape in self.shapes(skeleton).items():
            if name in tensors:
                yield name, tensors[name].numel() - math.prod(shape)

    def removed_blocks(self, skeleton: Skeleton) -> list[int]:
        """Numbers of the blocks that are removed, rising."""
        kept = self.kept_blocks
        return [] if kept is None else sorted(set(range(len(skeleton.blocks))) - set(kept))

    def shapes(self, skeleton: Skeleton) -> Shapes:
        """The new shapes of the tensors that get smaller, by full name."""
        return smaller_shapes(skeleton, self.cuts, self.mixtures)

    @property
    def by_name(self) -> dict[str, Cut]:
        """The cuts by the full names of their consumers."""
        return {cut.name: cut for cut in self.cuts}

    def sliced_layers(self, skeleton: Skeleton) -> frozenset[str]:
        """Full names of all layers that lose rows or inputs, or belong to mixtures that lose experts."""
        return frozenset(
            f"{cut.block}.{local}"
            for cut in self.cuts
            for local in (cut.coupling.consumer, *(dependency.local for dependency in cut.coupling.dependencies))
        ) | frozenset(
            f"{cut.block}.{local}"
            for cut in (self.mixtures.cuts.values() if self.mixtures else ())
            for local in cut.layers(skeleton.model.get_submodule(cut.block))
        )


def unchanged(skeleton: Skeleton) -> Structure:
    """The structure of a model that loses neither blocks nor channels nor heads nor experts."""
    return Structure((), {}, skeleton.config, (), {})


def scale_of(block: nn.Module, coupling: Coupling) -> Tensor:
    """The learned norm scale of every input of a consumer, `(in,)`, float64."""
    producer = scale_producer(block, coupling)
    assert producer is not None
    scale = torch.ones(coupling.width, dtype=torch.float64)
    weight = block.get_parameter(f"{producer.local}.weight").double().cpu()
    for slots, rows in zip(coupling.classes, producer.rows, strict=True):
        scale[slots] = weight[rows]
    return scale


def scale_producer(block: nn.Module, coupling: Coupling) -> Producer | None:
    """The norm among the producers of a consumer; None where there is none, or more than one."""
    places = [(s, storage_of(block, f"{s.local}.weight")) for s in coupling.producers]
    vectors = [s for s, place in places if place is not None and block.get_parameter(place[0]).dim() == 1]
    return vectors[0] if len(vectors) == 1 else None


def check_channel_scales(skeleton: Skeleton, structure: Structure) -> None:
    """Refuse cuts of layers whose inputs have no learned norm scale.

    Raises:
        InputError: naming the first such layer.
    """
    for cut in structure.cuts:
        if scale_producer(skeleton.model.get_submodule(cut.block), cut.coupling) is None:
            raise InputError(
                f"no learned scale multiplies the inputs of {cut.name!r}", "choose another --method, such as obs"
            )
