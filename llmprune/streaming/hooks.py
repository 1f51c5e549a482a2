"""Forward hooks on the layers of a block: their call order, their inputs, and the residual stream behind them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llmprune.model.hooks import before, hooked, inputs_of
from llmprune.streaming.batch import hidden_of

BLOCK = ""
"""The residual add of a layer whose output is added last: the block's own output."""


@dataclass(frozen=True, slots=True)
class Observation:
    """The activations of a group of layers in one forward.

    Args:
        inputs: of its layers, `(..., in)`.
        residual: the residual stream behind its only layer, `(..., out)`, if that layer adds to it.
        output: that layer's own output, `(..., out)`, where the observer wants it.
    """

    inputs: Tensor
    residual: Tensor | None = None
    output: Tensor | None = None


class Observer:
    """Receives the observations of a forward through a block.

    Args:
        outputs: whether it wants the outputs of layers that add to the residual stream.
    """

    def __init__(self, outputs: bool = False) -> None:
        self.outputs = outputs
        self.pending_inputs: dict[int, Tensor] = {}
        self.pending_outputs: dict[int, Tensor] = {}

    def arrive(self, number: int, observation: Observation) -> None:
        """A group is about to run; one that adds to the residual stream has run, and its output has been added."""
        raise NotImplementedError


@contextmanager
def observed(
    module: nn.Module,
    order: Sequence[Sequence[str]],
    residual_adds: Mapping[int, str],
    observer: Callable[[], Observer | None],
) -> Iterator[None]:
    """Report to an observer when the first layer of a group is about to run, or when its output has been added.

    Args:
        module: the block.
        order: local layer names by group.
        residual_adds: for some groups, where the output of their layer becomes part of the residual stream.
        observer: returns the observer of the current forward.
    """
    relay = _Relay(residual_adds, observer)

    def handles() -> Iterator[RemovableHandle]:
        for number, layers in reversed(list(enumerate(order))):
            first = module.get_submodule(layers[0])
            yield before(first, partial(relay.inputs, number))
            if number in residual_adds:
                yield _after(first, partial(relay.output, number))
        for place in set(residual_adds.values()):
            tell = partial(relay.residual, place)
            yield _after(module, tell) if place == BLOCK else before(module.get_submodule(place), tell)

    with hooked(handles()):
        yield


class _Relay:
    """Passes what hooks see on to the observer of the current forward."""

    def __init__(self, residual_adds: Mapping[int, str], observer: Callable[[], Observer | None]) -> None:
        self.residual_adds, self.observer = residual_adds, observer

    def inputs(self, number: int, inputs: Tensor) -> None:
        if (observer := self.observer()) is None:
            return
        if number in self.residual_adds:
            observer.pending_inputs.setdefault(number, inputs)
        else:
            observer.arrive(number, Observation(inputs))

    def output(self, number: int, output: Tensor) -> None:
        observer = self.observer()
        if observer is not None and observer.outputs and number not in observer.pending_outputs:
            # A later module may add to it in place.
            observer.pending_outputs[number] = output.clone()

    def residual(self, place: str, stream: Tensor) -> None:
        for number, add in sorted(self.residual_adds.items()):
            if add == place and (observer := self.observer()) is not None and number in observer.pending_inputs:
                inputs = observer.pending_inputs.pop(number)
                observer.arrive(number, Observation(inputs, stream, observer.pending_outputs.pop(number, None)))


def _after(module: nn.Module, tell: Callable[[Tensor], None]) -> RemovableHandle:
    return module.register_forward_hook(lambda _, args, output: tell(hidden_of(output)))


@dataclass(frozen=True, slots=True)
class CallOrder:
    """The order in which the layers of a block are called.

    Args:
        groups: local names in call order, layers with the very same input tensor together.
        uncalled: layers that are never called although the module that holds them is: their weight is used in some
            other way, so neither their inputs nor the moment of their use can be seen.
        nbytes: bytes of all groups' inputs for one batch.
    """

    groups: list[list[str]]
    uncalled: list[str]
    nbytes: int


@torch.no_grad()
def call_order(module: nn.Module, layers: Collection[str], run: Callable[[], Tensor]) -> CallOrder:
    """The call order of the layers of a block, from one forward.

    A layer inside a module that this batch does not reach (an expert without tokens) forms a group of its own, where
    its definition stands.

    Args:
        module: the block.
        layers: local names of the layers to be pruned, in definition order.
        run: lets a batch pass through it.
    """
    inputs: list[Tensor] = []
    groups: list[list[str]] = []
    called: set[str] = set()

    def note(local: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if local in called:
            return
        called.add(local)
        if local not in layers:
            return
        tensor = inputs_of(args, kwargs)
        for known, members in zip(inputs, groups, strict=True):
            if same_memory(known, tensor):
                members.append(local)
                return
        inputs.append(tensor)
        groups.append([local])

    handles = (
        part.register_forward_pre_hook(lambda _, args, kwargs, local=local: note(local, args, kwargs), with_kwargs=True)
        for local, part in module.named_modules()
    )
    with hooked(handles):
        run()
    nbytes = sum(tensor.nbytes for tensor in inputs)
    uncalled, previous = [], -1
    for local in layers:
        if local in called:
            previous = next(number for number, members in enumerate(groups) if local in members)
        elif local.rpartition(".")[0] in called:
            uncalled.append(local)
        else:
            previous += 1
            groups.insert(previous, [local])
    return CallOrder(groups, uncalled, nbytes)


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one, or views of one that differ in their leading sizes alone."""
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.shape[-1] == b.shape[-1]
