"""Parts of a stored parameter along its first dimension, one for every expert, without the others in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.model.checkpoint import Checkpoint
from llmprune.model.origin import Origin


@dataclass(frozen=True, slots=True)
class CheckpointSlices:
    """The slices of a parameter.

    Args:
        checkpoint: where it stands.
        name: of the parameter.
        shape: of the parameter, the number of slices first.
        origin: of the parameter.
    """

    checkpoint: Checkpoint
    name: str
    shape: torch.Size
    origin: Origin

    def read(self, index: int) -> Tensor:
        """A slice in the dtype of the result."""
        return self._read((index,))[0]

    def _read(self, indices: tuple[int, ...]) -> Tensor:
        checkpoint = self.checkpoint
        if self.origin.converter is None:
            part = [checkpoint.folder.rows(self.origin.names[0], at, at + 1) for at in indices]
            return checkpoint.stored(torch.cat(part))
        made = checkpoint.convert(self._of(indices), checkpoint.folder.__getitem__, len(indices))
        return checkpoint.stored(made[self.name])

    def _of(self, indices: tuple[int, ...]) -> Origin:
        """The tensors of some of the experts: of every pattern as many as there are experts, in their order."""
        by_pattern: dict[str, list[int]] = {}
        for at, pattern in enumerate(self.origin.patterns):
            by_pattern.setdefault(pattern, []).append(at)
        return self.origin.only(sorted(places[index] for places in by_pattern.values() for index in indices))

    def revert(self, index: int, value: Tensor) -> dict[str, Tensor]:
        """The tensors on disk, by name, that make up a slice of this value."""
        first, own = self._of((0,)), self._of((index,))
        names = dict(zip(first.names, own.names, strict=True))
        found = self.checkpoint.revert(first, {self.name: value[None]}, 1)
        return {names[name]: tensor for name, tensor in found.items()}

    def export(self, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Names on disk and tensors of all slices of a value, one slice in memory at a time."""
        for index in range(self.shape[0]):
            yield from self.revert(index, value[index]).items()

    @property
    def one_each(self) -> bool:
        """Whether there are as many tensors of every pattern as there are slices."""
        return set(Counter(self.origin.patterns).values()) == {self.shape[0]}

    def works(self) -> bool:
        """Whether converted slices are the same alone and together, and go back; tried with the first and the last."""
        try:
            ends = (0, self.shape[0] - 1)
            together, alone = self._read(ends), [self.read(index) for index in ends]
            back = {name: tensor for index in ends for name, tensor in self._stored_back(index).items()}
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return False
        return (
            together.shape[1:] == self.shape[1:]
            and torch.equal(together, torch.stack(alone))
            and all(torch.equal(tensor, self.checkpoint.folder[name]) for name, tensor in back.items())
            and back.keys() == set(self._of(ends).names)
        )

    def _stored_back(self, index: int) -> dict[str, Tensor]:
        made = self.checkpoint.convert(self._of((index,)), self.checkpoint.folder.__getitem__, 1)
        return self.revert(index, made[self.name][0])


def find_slices(checkpoint: Checkpoint, name: str) -> CheckpointSlices | None:
    """The parts of a parameter along its first dimension; None where one cannot be had without the others."""
    origin = checkpoint.origin(name)
    found = CheckpointSlices(checkpoint, name, checkpoint.shape(name), origin)
    if origin.converter is None:
        return found
    if not checkpoint.is_alone(name) or not found.one_each:
        return None
    rule = id(origin.converter)
    if rule not in checkpoint.sliceable:
        checkpoint.sliceable[rule] = found.works()
    return found if checkpoint.sliceable[rule] else None
