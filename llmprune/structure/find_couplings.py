"""Discovery of the coupled channels inside a block from its computation alone; no layer's name is known here.

A guess is read off the gradients of one forward, and kept only if the block computes the same after its channels are
permuted at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.errors import first_line
from llmprune.model.blocks import LayerRef
from llmprune.model.hooks import before, hooked
from llmprune.runtime.oom import out_of_memory
from llmprune.structure.coupling import Coupling, permute, scatter
from llmprune.structure.float64 import Float64, random_copy
from llmprune.structure.gradient_probe import Probe, Run

TOLERANCE = 1e-10
OUTPUT = ""
"""Among what is seen in a run, all that the block returns or writes."""
_Seen = dict[str, list[Tensor]]


class OpaqueBlockError(Exception):
    """A block that cannot be run on its own, with random weights in float64."""


def find_couplings(block: nn.Module, run: Run, hidden: Tensor, layers: Sequence[LayerRef]) -> list[Coupling]:
    """The couplings inside one transformer block, one for every consumer that has one.

    The block is copied with random weights in float64, so its own may be anywhere, also on the meta device. In one
    forward, every linear layer's output is replaced by random numbers, and every norm by a random scale for each input.
    So the gradient of a consumer's inputs tells on which rows each of them depends through what lies between
    (activations, products, attention). Rows that feed single inputs are read off by differentiating `log₂(in)` times;
    for the others (query and key rows, value rows shared by heads) every input is differentiated.

    Every guess is verified: the copy's rows and columns are permuted, at random within the classes, and all outputs of
    the run, and the inputs of all other weights, must be the same to `TOLERANCE`. (A few tokens need not show in the
    outputs what another layer sees: an indexer that chooses among more tokens than there are.)

    Args:
        block: the block; it is left alone. No hooks of the caller's may be on it.
        run: calls a block with hidden states; returns all of its outputs, cross-block state included.
        hidden: `(batch, tokens, hidden)` for that call; a few tokens are enough, two at least. Only shape and device
            matter.
        layers: the linear layers of the block.

    Raises:
        OpaqueBlockError: the block cannot run so (a kernel without float64, missing state of an earlier block).
    """
    try:
        return _found(block, run, hidden, layers)
    except Exception as error:
        if out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise OpaqueBlockError(f"cannot be run on its own in float64: {reason}") from error


def _found(block: nn.Module, run: Run, hidden: Tensor, layers: Sequence[LayerRef]) -> list[Coupling]:
    generator = torch.Generator().manual_seed(0)
    copy = random_copy(block, hidden.device, generator)
    noise = torch.randn(hidden.shape, generator=generator, dtype=torch.float64).to(hidden.device)
    probe = Probe(copy, layers, generator)
    probe.watch(run, noise)
    guesses = [guess for layer in layers if (guess := probe.guess(layer)) is not None]
    if not guesses:
        return []
    with Float64(), torch.no_grad():
        dense = _seen(copy, run, noise)
        held = [guess for guess in guesses if _holds(guess, copy, run, noise, dense, generator)]
        return [replace(guess, removable=_is_removable(guess, copy, run, noise)) for guess in held]


def _holds(
    guess: Coupling, block: nn.Module, run: Run, hidden: Tensor, dense: _Seen, generator: torch.Generator
) -> bool:
    """Whether a random permutation changes neither the block's outputs nor what other weights are given.

    One of the producers alone must change the outputs.
    """
    moves = [_cycle(slots.shape[1], generator) for slots in guess.classes]
    order = scatter(guess.classes, moves, guess.width)
    parameters = dict(block.named_parameters())

    def permuted(consumer: bool) -> _Seen:
        with _swapped(parameters, permute(guess, order, parameters, consumer=consumer)):
            return _seen(block, run, hidden)

    both = permuted(consumer=True)
    others = [local for local in dense if local != guess.consumer]
    return both.keys() == dense.keys() and (
        max(_distance(dense[local], both[local]) for local in others)
        <= TOLERANCE
        < _distance(dense[OUTPUT], permuted(consumer=False)[OUTPUT])
    )


def _seen(block: nn.Module, run: Run, hidden: Tensor) -> _Seen:
    """The outputs of a run, and the inputs of all modules that have weights of two or more dimensions."""
    found: _Seen = {}

    def note(local: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        found.setdefault(local, []).extend(_tensors((args, kwargs)))

    with hooked(
        part.register_forward_pre_hook(partial(note, local), with_kwargs=True)
        for local, part in block.named_modules()
        if local and any(parameter.dim() > 1 for parameter in part.parameters(recurse=False))
    ):
        outputs = _tensors(run(block, hidden))
    return {**found, OUTPUT: outputs}


def _is_removable(guess: Coupling, block: nn.Module, run: Run, hidden: Tensor) -> bool:
    """Whether inputs whose rows are set to zero are zero, and all other inputs unchanged.

    Tried with a whole class, with every other column of one, and with one copy of every class (query heads, whose value
    rows are kept for the other copies, so that the inputs need not be zero).
    """
    parameters, inputs = dict(block.named_parameters()), _inputs_of(guess.consumer, block, run)
    dense = inputs(hidden)
    for columns, wholly in _samples(guess.classes):
        removed = torch.zeros(guess.width, dtype=torch.bool)
        removed[columns] = True
        with _swapped(parameters, _zeroed(guess, removed, parameters)):
            left = inputs(hidden)
        removed = removed.to(left.device)
        if (wholly and bool(left[..., removed].any())) or _distance(
            [dense[..., ~removed]], [left[..., ~removed]]
        ) > TOLERANCE:
            return False
    return True


def _samples(classes: tuple[Tensor, ...]) -> list[tuple[Tensor, bool]]:
    """Inputs to remove on trial, and whether all their copies are among them."""
    samples = [(classes[0][:, ::2].flatten(), True)]
    samples += [(classes[0].flatten(), True)] if len(classes) > 1 else []
    samples += [(torch.cat([slots[0] for slots in classes]), False)] if len(classes[0]) > 1 else []
    return samples


def _zeroed(guess: Coupling, removed: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a consumer's dependencies, zero in all rows that feed only the inputs `removed (in,)`, bool."""
    changed = {}
    for dependency in guess.dependencies:
        stays = torch.zeros(len(dependency.single))
        stays[dependency.kept_rows(removed)] = 1
        for name in (f"{dependency.local}.weight", f"{dependency.local}.bias"):
            if name in parameters:
                value = parameters[name].detach()
                across = value.dim() > 1 and not dependency.transposed
                changed[name] = value * (stays[:, None] if across else stays).to(value)
    return changed


def _inputs_of(local: str, block: nn.Module, run: Run) -> Callable[[Tensor], Tensor]:
    """A function that runs the block and returns the input of one of its layers."""

    def inputs(hidden: Tensor) -> Tensor:
        seen: list[Tensor] = []
        with hooked([before(block.get_submodule(local), lambda given: seen.append(given.clone()))]):
            run(block, hidden)
        return seen[0]

    return inputs


def _cycle(size: int, generator: torch.Generator) -> Tensor:
    """A random permutation without fixed points."""
    cycle = torch.randperm(size, generator=generator)
    return torch.empty_like(cycle).scatter_(0, cycle, cycle.roll(1))


@contextmanager
def _swapped(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> Iterator[None]:
    before = {name: parameters[name].data for name in values}
    for name, value in values.items():
        parameters[name].data = value
    try:
        yield
    finally:
        for name, value in before.items():
            parameters[name].data = value


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and mappings, copied."""
    if isinstance(value, Tensor):
        return [value.detach().clone()]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def _distance(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest relative difference; infinite if anything is not finite or has another shape."""
    if [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
        return torch.inf
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        finite = torch.isfinite(a)
        if not torch.equal(a[~finite], b[~finite]):
            return torch.inf
        difference = float((a[finite].double() - b[finite].double()).norm())
        if not difference < torch.inf:
            return torch.inf
        worst = max(worst, difference / max(float(a[finite].double().norm()), 1e-300))
    return worst
