"""Watching a block run: in which order its layers are called, on what, and where their outputs go."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llmprune.rehearse import hidden_of

BLOCK = ""
"""The landing of a layer whose output is added last: the block's own output."""
SAME = 1e-2


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


@torch.no_grad()
def find_landings(module: nn.Module, groups: Sequence[Sequence[str]], run: Callable[[], Tensor]) -> dict[int, str]:
    """Where the groups of a single layer add to the residual stream, if no other group has to be solved before that.

    Args:
        module: the block.
        groups: local layer names by group, in call order.
        run: lets a batch pass through the block; returns its output.
    """
    called = list(_streams(module, run))
    found: dict[int, str] = {}
    for number in reversed(range(len(groups))):
        place = find_landing(module, groups[number][0], run) if len(groups[number]) == 1 else None
        later = range(number + 1, len(groups))
        if place == BLOCK and all(found.get(other) == BLOCK for other in later):
            found[number] = BLOCK
        elif place and all(_comes_first(place, groups[other][0], called) for other in later):
            found[number] = place
    return found


def _comes_first(place: str, other: str, called: list[str]) -> bool:
    return other in called and called.index(place) < called.index(other)


def find_landing(module: nn.Module, layer: str, run: Callable[[], Tensor]) -> str | None:
    """Where a layer's output is added to the residual stream: the first module that is fed the sum, or the block's end.

    The layer's output is changed by noise; where exactly this noise is found again, everything else that is there did
    not depend on the layer. It counts only if adding the noise there, in place, changes the block in the same way.

    Args:
        module: the block.
        layer: the layer's local name.
        run: lets a batch pass through the block; returns its output.

    Returns:
        A local module name, `BLOCK`, or None if the output goes another way (through a norm, say).
    """
    outputs: list[Tensor] = []
    noise = torch.empty(0)

    def disturb(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        nonlocal noise
        if noise.shape != output.shape:
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(output.shape, generator=generator).to(output) * output.float().std().to(output)
        outputs.append(output)
        return output + noise

    plain = _streams(module, run)
    handle = module.get_submodule(layer).register_forward_hook(disturb)
    try:
        disturbed = _streams(module, run)
    finally:
        handle.remove()
    for place, stream in plain.items() if outputs else ():
        other = disturbed[place]
        # Some models run their layers on flattened tokens.
        if stream.numel() != noise.numel() or other.shape != stream.shape or not _near(other - stream, noise):
            continue
        # A dropout or a norm right behind the layer is fed its output alone.
        if not _near(stream, outputs[0]):
            return place if place == BLOCK or _same_way(module, place, noise, run, disturbed[BLOCK]) else None
    return None


def _streams(module: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """What every module of a block is fed, in call order, and the block's output."""
    found: dict[str, Tensor] = {}

    def note(local: str, args: Any, kwargs: Any) -> None:
        first = args[0] if args else next(iter(kwargs.values()), None)
        if local not in found and isinstance(first, Tensor) and first.is_floating_point():
            found[local] = first.clone()

    with ExitStack() as stack:
        for local, part in module.named_modules():
            if local:
                hook = part.register_forward_pre_hook(
                    lambda _, args, kwargs, local=local: note(local, args, kwargs), with_kwargs=True
                )
                stack.callback(hook.remove)
        output = run()
    return {**found, BLOCK: output.clone()}


def _same_way(module: nn.Module, place: str, noise: Tensor, run: Callable[[], Tensor], expected: Tensor) -> bool:
    def add(_: nn.Module, args: Any, kwargs: Any) -> None:
        (stream := inputs_of(args, kwargs)).add_(noise.view_as(stream))

    handle = module.get_submodule(place).register_forward_pre_hook(add, with_kwargs=True)
    try:
        return _near(run(), expected)
    finally:
        handle.remove()


def _near(a: Tensor, b: Tensor) -> bool:
    return float((a.float() - b.float().view_as(a)).norm()) <= SAME * float(b.float().norm())


@torch.no_grad()
def find_scales(module: nn.Module, layers: Collection[str], run: Callable[[], object]) -> dict[str, tuple[str, float]]:
    """Which norm or learned scale feeds a layer directly: its local name, and what is added to its weight (Gemma: 1).

    Args:
        module: the block, its weights in memory.
        layers: local names.
        run: lets a batch pass through the block.
    """
    made: list[tuple[str, Tensor, Tensor]] = []
    found: dict[str, tuple[str, float]] = {}

    def note(local: str, args: Any, output: Any) -> None:
        if len(args) == 1 and isinstance(output, Tensor) and output.shape == args[0].shape:
            made.append((local, args[0].clone(), output))

    def look(local: str, inputs: Tensor) -> None:
        for norm, given, output in made:
            if _same_memory(output, inputs):
                found[local] = norm, _offset(module.get_submodule(norm), given)

    with ExitStack() as stack:
        for local, part in module.named_modules():
            if is_scale(part):
                hook = part.register_forward_hook(lambda _, args, output, local=local: note(local, args, output))
            elif local in layers:
                hook = part.register_forward_pre_hook(
                    lambda _, args, kwargs, local=local: look(local, inputs_of(args, kwargs)), with_kwargs=True
                )
            else:
                continue
            stack.callback(hook.remove)
        run()
    return found


def is_scale(module: nn.Module) -> bool:
    """A norm, or anything else that has a weight for every channel."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 1 and not any(True for _ in module.children())


def _offset(norm: nn.Module, given: Tensor) -> float:
    """What a norm adds to its weight before it multiplies: its output at weight 0, in units of the change up to 1."""
    own = dict(norm.named_parameters())

    def output(value: float) -> Tensor:
        values = {name: torch.full_like(p, value if name == "weight" else 0.0) for name, p in own.items()}
        made = torch.func.functional_call(norm, values, (given,))
        assert isinstance(made, Tensor)
        return made.float()

    at_zero, slope = output(0.0), output(1.0) - output(0.0)
    return float((at_zero * slope).sum() / slope.square().sum().clamp(min=1e-30))


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
            if _same_memory(known, tensor):
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


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.shape[-1] == b.shape[-1]
