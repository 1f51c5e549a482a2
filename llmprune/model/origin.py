"""The tensors on disk that parameters are read from, and transformers' conversion between the two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """The tensors on disk that one or more parameters are read from, and their conversion, if any.

    Args:
        names: on disk.
        renamed: the same by the module's names, without the model's prefix.
        patterns: the pattern of the conversion that each name matches.
        converter: transformers' rule; None where the parameter is stored as it is.
        target: the parameter that they were matched with; others that the rule makes are told from it.
    """

    names: tuple[str, ...]
    renamed: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    converter: Any = None
    target: str = ""

    def only(self, places: Sequence[int]) -> Origin:
        """Some of the tensors, by their places among `names`."""
        columns = self.names, self.renamed, self.patterns
        names, renamed, patterns = (tuple(column[at] for at in places) for column in columns)
        return replace(self, names=names, renamed=renamed, patterns=patterns)


class Fewer:
    """A model for transformers' conversion of some of its experts: its parameters have as many slices.

    Args:
        model: on the meta device.
        count: number of slices.
    """

    def __init__(self, model: Any, count: int) -> None:
        self._model, self._count = model, count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Tensor:
        """A parameter with fewer slices, on the meta device."""
        shape = self._model.get_parameter(name).shape
        return torch.empty(self._count, *shape[1:], device="meta")
