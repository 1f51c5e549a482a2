"""Forward hooks on the layers of a block: their call order, their inputs, and the residual stream behind them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from llmprune.model.experts import ExpertMatrix, says_how
from llmprune.model.hooks import before, hooked, inputs_of
from llmprune.model.routed_call import RoutedCall
from llmprune.streaming.batch import hidden_of
from llmprune.streaming.routers import RouterWatch, routers

SAME = 1e-2
"""Relative difference of a layer's output that may be rounding, in half precision too."""
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
        self.routed: dict[str, RoutedCall] = {}
        self.pending_inputs: dict[int, Tensor] = {}
        self.pending_outputs: dict[int, Tensor] = {}

    def enter(self, owner: str, call: RoutedCall) -> None:
        """The module `owner` is about to run its experts."""
        self.routed[owner] = call

    def arrive(self, number: int, observation: Observation) -> None:
        """A group is about to run; one that adds to the residual stream has run, and its output has been added."""
        raise NotImplementedError


class CurrentObserver:
    """The observer of the forward that runs now; called, it gives that observer, None where there is none.

    It refers to nothing else: what holds it and what it is handed to need not wait for the collector of cycles.
    """

    def __init__(self) -> None:
        self._now: Observer | None = None

    def __call__(self) -> Observer | None:
        return self._now

    @contextmanager
    def set_to(self, observer: Observer) -> Iterator[None]:
        """Within, this observer is told of forwards."""
        self._now = observer
        try:
            yield
        finally:
            self._now = None


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
        for owner in experts_in(module):
            yield module.get_submodule(owner).register_forward_pre_hook(
                lambda _, args, kwargs, owner=owner: relay.routed(owner, args, kwargs), with_kwargs=True
            )
        for place in set(residual_adds.values()):
            tell = partial(relay.residual, place)
            yield _after(module, tell) if place == BLOCK else before(module.get_submodule(place), tell)

    with hooked(handles()):
        yield


class _Relay:
    """Passes what hooks see on to the observer of the current forward."""

    def __init__(self, residual_adds: Mapping[int, str], observer: Callable[[], Observer | None]) -> None:
        self.residual_adds, self.observer = residual_adds, observer

    def routed(self, owner: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        observer, call = self.observer(), RoutedCall.of(args, kwargs)
        if observer is not None and call is not None:
            observer.enter(owner, call)

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
        dense: layers that stay dense, and why, see `_obstacles`.
        nbytes: bytes of the groups' inputs for one batch: of all, but of the largest among experts alone, which run one
            after the other and leave nothing but their sum.
    """

    groups: list[list[str]]
    dense: dict[str, str]
    nbytes: int


@torch.no_grad()
def call_order(module: nn.Module, layers: Collection[str], run: Callable[[], Tensor]) -> CallOrder:
    """The call order of the layers of a block, from one forward.

    A layer inside one of several modules of which this batch does not reach all (an expert without tokens) forms a
    group of its own, where its definition stands.

    Args:
        module: the block.
        layers: local names of the layers to be pruned, in definition order.
        run: lets a batch pass through it.
    """
    linear = [local for local, part in module.named_modules() if isinstance(part, nn.Linear | Conv1D)]
    calls: Counter[str] = Counter()
    inputs: dict[str, Tensor] = {}
    other: set[str] = set()
    watch = RouterWatch()

    def note(local: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[local] += 1
        if local in layers:
            inputs.setdefault(local, inputs_of(args, kwargs))

    def check(local: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = inputs_of(args, kwargs)
        watch.follow(local, given.shape[-1], output)
        if not _is_plain(layer, given, output):
            other.add(local)

    def handles() -> Iterator[RemovableHandle]:
        for local, part in module.named_modules():
            yield part.register_forward_pre_hook(partial(note, local), with_kwargs=True)
        for local in linear:
            yield module.get_submodule(local).register_forward_hook(partial(check, local), with_kwargs=True)

    with hooked(handles()), watch:
        run()
    dense = _obstacles(module, layers, calls) | dict.fromkeys(other, "another product than of weight and input")
    dense |= dict.fromkeys(routers(module, watch, linear), "router")
    dense = {local: dense[local] for local in layers if local in dense}
    groups = _grouped({local: tensor for local, tensor in inputs.items() if local not in dense})
    nbytes = _nbytes(module, [inputs[members[0]] for members in groups], groups)
    previous = -1
    for local in (local for local in layers if local not in dense):
        if local in inputs:
            previous = next(number for number, members in enumerate(groups) if local in members)
        else:
            previous += 1
            groups.insert(previous, [local])
    return CallOrder(groups, dense, nbytes)


def _grouped(inputs: Mapping[str, Tensor]) -> list[list[str]]:
    """Layers in call order, those with the very same input together."""
    groups: list[list[str]] = []
    for local, tensor in inputs.items():
        known = (members for members in groups if same_memory(inputs[members[0]], tensor))
        if (members := next(known, None)) is None:
            groups.append([local])
        else:
            members.append(local)
    return groups


def _obstacles(module: nn.Module, layers: Collection[str], calls: Counter[str]) -> dict[str, str]:
    """Layers whose inputs, or the moment of their use, cannot be seen, and why.

    A layer that is not called although the module that holds it is; one in a module that never runs (attention to an
    encoder that is not there), but not in one of several alike (an expert without tokens); one that is called twice.
    """
    found = {}
    for local in layers:
        if calls[local] > 1:
            found[local] = "called more than once in a block"
        elif not calls[local] and calls[_holder(module, local)] and not _has_called_sibling(module, local, calls):
            found[local] = "weight used without a call"
        elif not calls[local] and not is_expert(module, local) and not _is_one_of_many(module, local):
            found[local] = "never called"
    return found


def _holder(module: nn.Module, local: str) -> str:
    """The module that owns the parameter with a layer's weight, or the layer."""
    return owner_of(local) if is_expert(module, local) else local.rpartition(".")[0]


def _has_called_sibling(module: nn.Module, local: str, calls: Counter[str]) -> bool:
    """Whether the same matrix of another expert has been called."""
    owner, attribute = owner_of(local), local.rpartition(".")[2]
    return is_expert(module, local) and any(
        calls[f"{owner}.{index}.{attribute}"] for index in module.get_submodule(owner)._modules
    )


def _is_one_of_many(module: nn.Module, local: str) -> bool:
    """Whether a layer is inside one of several modules of one class in a list."""
    parts = local.split(".")
    holders = [module.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    lists = [list(holder.children()) for holder in holders if isinstance(holder, nn.ModuleList | nn.ModuleDict)]
    return any(len(items) > 1 and len({type(item) for item in items}) == 1 for items in lists)


def _is_plain(layer: nn.Module, given: Tensor, output: Any) -> bool:
    """Whether a layer computes `x Wᵀ + b`; a subclass may do anything else with its weight."""
    if type(layer).forward in {nn.Linear.forward, Conv1D.forward, ExpertMatrix.forward}:
        return True
    if not isinstance(layer, nn.Linear) or not isinstance(output, Tensor) or given.shape[-1] != layer.weight.shape[1]:
        return False
    plain = functional.linear(given, layer.weight, layer.bias)
    return output.shape == plain.shape and float((output - plain).norm()) <= SAME * float(plain.norm())


def is_expert(module: nn.Module, local: str) -> bool:
    """Whether a layer of a block is the matrix of an expert."""
    return isinstance(module.get_submodule(local), ExpertMatrix)


def owner_of(local: str) -> str:
    """The module that owns the parameter with an expert's matrix."""
    return local.rpartition(".")[0].rpartition(".")[0]


def experts_in(module: nn.Module) -> list[str]:
    """The modules of a block that say how they hold experts, and are called with tokens and their routing."""
    return [local for local, part in module.named_modules() if says_how(part)]


def _nbytes(module: nn.Module, inputs: list[Tensor], groups: list[list[str]]) -> int:
    sizes: dict[bool, list[int]] = {True: [0], False: [0]}
    for tensor, members in zip(inputs, groups, strict=True):
        sizes[is_expert(module, members[0])].append(tensor.nbytes)
    return sum(sizes[False]) + max(sizes[True])


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one, or views of one that differ in their leading sizes alone."""
    return a.data_ptr() == b.data_ptr() and 0 < a.numel() == b.numel() and a.shape[-1] == b.shape[-1]
