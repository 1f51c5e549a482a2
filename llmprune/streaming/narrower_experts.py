"""Experts that lose channels: their parameters, with new shapes, are filled expert by expert."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from torch import Tensor, nn

from llmprune.model.experts import ExpertMatrix, storage_of
from llmprune.runtime.mapped import MappedFile, release_pages


class NarrowerExperts:
    """The parameters of experts that lose channels, as they are filled expert by expert.

    Args:
        module: the block.
        sliced: local names of those that are not in memory, and then in files.
        folder: for these.

    Attributes:
        parameters: by local name.
    """

    def __init__(self, module: nn.Module, sliced: Collection[str], folder: Path | None) -> None:
        self.module, self.sliced, self.folder = module, sliced, folder
        self.parameters: dict[str, Tensor] = {}

    def takes(self, local: str, value: Tensor, before: Tensor) -> bool:
        """Note the new matrix or bias of an expert; false where it is not smaller than before, or not an expert's."""
        parameter, layer = _parameter_of(self.module, local), self.module.get_submodule(local.rpartition(".")[0])
        if not isinstance(layer, ExpertMatrix) or value.shape == before.shape:
            return False
        if parameter not in self.parameters:
            shape, in_file = (layer.place.layout.count, *value.shape), parameter in self.sliced
            self.parameters[parameter] = (
                MappedFile(shape, value.dtype, self.folder).tensor if in_file else value.new_empty(shape)
            )
        self.parameters[parameter][layer.place.index].copy_(value)
        for used in (before, self.parameters[parameter]):
            release_pages(used)
        return True


def _parameter_of(module: nn.Module, local: str) -> str:
    """The local name of the parameter that holds a weight or bias."""
    found = storage_of(module, local)
    assert found is not None
    return found[0]
