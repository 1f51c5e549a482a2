"""What the layers of a model lose, and what the smaller model is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmprune.errors import InputError
from llmprune.model.skeleton import Skeleton
from llmprune.pruning.sparsity import Kind
from llmprune.structure.coupling import Coupling, Source
from llmprune.structure.slicing import shapes_after

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class Cut:
    """What one layer loses.

    Args:
        kind: channels or heads.
        block: name of its block.
        coupling: what its inputs hang together with.
        units: `(pools, units, size)`, int64: its inputs that go together.
        count: how many units of every pool go.
    """

    kind: Kind
    block: str
    coupling: Coupling
    units: Tensor
    count: int

    @property
    def name(self) -> str:
        """Full name of the layer."""
        return f"{self.block}.{self.coupling.sink}"

    @property
    def width(self) -> int:
        """Number of inputs that stay."""
        return self.coupling.width - self.count * self.units.shape[0] * self.units.shape[2]

    @property
    def example(self) -> tuple[Coupling, Tensor, str]:
        """Some choice of the inputs that stay, for shapes: the last units of every pool go."""
        stays = torch.ones(self.coupling.width, dtype=torch.bool)
        stays[self.units[:, self.units.shape[1] - self.count :].flatten()] = False
        return self.coupling, stays.nonzero().flatten(), f"{self.block}."


@dataclass(frozen=True, slots=True)
class Structure:
    """The smaller model.

    Args:
        cuts: every layer that loses inputs.
        changes: new values of settings of the config.
        config: the smaller model's.
        said: for every removal, what was asked for and what is done.
    """

    cuts: tuple[Cut, ...]
    changes: dict[str, int]
    config: PreTrainedConfig
    said: tuple[str, ...]

    def saved(self, skeleton: Skeleton) -> int:
        """Bytes by which the written tensors get smaller."""
        tensors = dict(skeleton.model.state_dict())
        shapes = shapes_after([cut.example for cut in self.cuts], tensors)
        return sum(
            (tensors[name].numel() - math.prod(shape)) * skeleton.checkpoint.stored_dtype(name).itemsize
            for name, shape in shapes.items()
            if shape != tuple(tensors[name].shape)
        )

    @property
    def by_name(self) -> dict[str, Cut]:
        """The cuts by their layers' full names."""
        return {cut.name: cut for cut in self.cuts}

    @property
    def touched(self) -> frozenset[str]:
        """Full names of all layers that get smaller."""
        return frozenset(
            f"{cut.block}.{local}"
            for cut in self.cuts
            for local in (cut.coupling.sink, *(feed.local for feed in cut.coupling.feeds))
        )


def unchanged(skeleton: Skeleton) -> Structure:
    """The structure of a model that loses neither channels nor heads."""
    return Structure((), {}, skeleton.config, ())


def scale_of(block: nn.Module, coupling: Coupling) -> Tensor:
    """The learned scale that multiplies every input of a sink, `(in,)`, float64."""
    source = scale_source(block, coupling)
    assert source is not None
    scale = torch.ones(coupling.width, dtype=torch.float64)
    weight = block.get_parameter(f"{source.local}.weight").double().cpu()
    for slots, rows in zip(coupling.classes, source.rows, strict=True):
        scale[slots] = weight[rows]
    return scale


def scale_source(block: nn.Module, coupling: Coupling) -> Source | None:
    """The learned scale among the sources of a sink."""
    vectors = [s for s in coupling.sources if block.get_parameter(f"{s.local}.weight").dim() == 1]
    return vectors[0] if len(vectors) == 1 else None


def check_channel_scales(skeleton: Skeleton, structure: Structure) -> None:
    """Refuse cuts of layers whose inputs have no learned scale.

    Raises:
        InputError: naming the first.
    """
    for cut in structure.cuts:
        if scale_source(skeleton.model.get_submodule(cut.block), cut.coupling) is None:
            raise InputError(
                f"no learned scale multiplies the inputs of {cut.name!r}", "choose another --method, such as obs"
            )
