"""Watching a block run: in which order its layers are called, and on what."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llmprune.streaming.capture import hidden_of

BLOCK = ""
"""The landing of a layer whose output is added last: the block's own output."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a forward shows of a group.

    Args:
        inputs: of its layers, `(..., in)`.
        landed: the residual stream right behind its only layer, `(..., out)`, if it adds to that.
        made: that layer's own output, `(..., out)`, where that was wanted.
    """

    inputs: Tensor
    landed: Tensor | None = None
    made: Tensor | None = None


class Observer:
    """Is told what happens in a forward through a block.

    Args:
        outputs: whether it wants the outputs of layers that land, too.
    """

    def __init__(self, outputs: bool = False) -> None:
        self.outputs = outputs
        self.passing: dict[int, Tensor] = {}
        self.made: dict[int, Tensor] = {}

    def arrive(self, number: int, seen: Seen) -> None:
        """A group has been reached, or its output has landed if it has a landing."""
        raise NotImplementedError


@contextmanager
def watched(
    module: nn.Module,
    order: Sequence[Sequence[str]],
    landings: Mapping[int, str],
    observer: Callable[[], Observer | None],
) -> Iterator[None]:
    """Tell an observer when the first layer of a group is about to run, or has run and its output has landed.

    Args:
        module: the block.
        order: local layer names by group.
        landings: for some groups, where the output of their layer becomes part of the residual stream.
        observer: whom to tell.
    """
    watch = _Watch(landings, observer)
    with ExitStack() as stack:
        for number, layers in reversed(list(enumerate(order))):
            first = module.get_submodule(layers[0])
            stack.callback(_before(first, partial(watch.reach, number)).remove)
            if number in landings:
                stack.callback(_behind(first, partial(watch.make, number)).remove)
        for place in set(landings.values()):
            land = partial(watch.land, place)
            hook = _behind(module, land) if place == BLOCK else _before(module.get_submodule(place), land)
            stack.callback(hook.remove)
        yield


class _Watch:
    """Passes on to the observer of the moment what hooks see."""

    def __init__(self, landings: Mapping[int, str], observer: Callable[[], Observer | None]) -> None:
        self.landings, self.observer = landings, observer

    def reach(self, number: int, inputs: Tensor) -> None:
        if (told := self.observer()) is None:
            return
        if number in self.landings:
            told.passing.setdefault(number, inputs)
        else:
            told.arrive(number, Seen(inputs))

    def make(self, number: int, output: Tensor) -> None:
        if (told := self.observer()) is not None and told.outputs and number not in told.made:
            # What comes next may add to it in place.
            told.made[number] = output.clone()

    def land(self, place: str, stream: Tensor) -> None:
        for number, landing in sorted(self.landings.items()):
            if landing == place and (told := self.observer()) is not None and number in told.passing:
                told.arrive(number, Seen(told.passing.pop(number), stream, told.made.pop(number, None)))


def _before(module: nn.Module, tell: Callable[[Tensor], None]) -> RemovableHandle:
    return module.register_forward_pre_hook(lambda _, args, kwargs: tell(inputs_of(args, kwargs)), with_kwargs=True)


def _behind(module: nn.Module, tell: Callable[[Tensor], None]) -> RemovableHandle:
    return module.register_forward_hook(lambda _, args, output: tell(hidden_of(output)))


@dataclass(frozen=True, slots=True)
class CallOrder:
    """How the layers of a block are called.

    Args:
        groups: local names in call order, layers fed the very same tensor together.
        uncalled: layers that are never called although the module that holds them is: their weight is used in some
            other way, so neither their inputs nor the moment of their use can be seen.
        nbytes: size of all groups' inputs for one batch.
    """

    groups: list[list[str]]
    uncalled: list[str]
    nbytes: int


@torch.no_grad()
def call_order(module: nn.Module, layers: Collection[str], run: Callable[[], Tensor]) -> CallOrder:
    """Find out how the layers of a block are called, by running it once.

    A layer inside a module that this batch does not reach (an expert nobody chose) forms a group of its own, where its
    definition stands.

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

    with ExitStack() as stack:
        for local, part in module.named_modules():
            hook = part.register_forward_pre_hook(
                lambda _, args, kwargs, local=local: note(local, args, kwargs), with_kwargs=True
            )
            stack.callback(hook.remove)
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


def inputs_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a linear layer is called with."""
    found = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(found, Tensor)
    return found


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one, or views of one that differ in their leading sizes alone."""
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.shape[-1] == b.shape[-1]
