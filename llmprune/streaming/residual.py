"""Residual adds: where the outputs of layers join the residual stream, found by perturbing them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.model.hooks import hooked, inputs_of
from llmprune.streaming.hooks import BLOCK, SAME, is_expert


@torch.no_grad()
def find_residual_adds(module: nn.Module, groups: Sequence[Sequence[str]], run: Callable[[], Tensor]) -> dict[int, str]:
    """The residual adds of groups of a single layer, where no other group has to be solved before the add.

    Args:
        module: the block.
        groups: local layer names by group, in call order.
        run: lets a batch pass through the block; returns its output.
    """
    called = list(_streams(module, run))
    found: dict[int, str] = {}
    for number in reversed(range(len(groups))):
        alone = len(groups[number]) == 1 and not is_expert(module, groups[number][0])
        place = find_residual_add(module, groups[number][0], run) if alone else None
        later = range(number + 1, len(groups))
        if place == BLOCK and all(found.get(other) == BLOCK for other in later):
            found[number] = BLOCK
        elif place and all(_comes_first(place, groups[other][0], called) for other in later):
            found[number] = place
    return found


def _comes_first(place: str, other: str, called: list[str]) -> bool:
    """Whether a module is called before another; before the one that holds it, if that is an expert without tokens."""
    while other and other not in called:
        other = other.rpartition(".")[0]
    return other in called and called.index(place) < called.index(other)


def find_residual_add(module: nn.Module, layer: str, run: Callable[[], Tensor]) -> str | None:
    """The residual add of a layer: the first module with the sum as input, or the end of the block.

    The layer's output is perturbed by noise; where exactly this noise is found again, nothing else depends on the
    layer. It counts only if adding the noise there, in place, changes the block in the same way. The noise is as large
    as the stream that it may be added to: less would be lost in the rounding of a sum in half precision.

    Args:
        module: the block.
        layer: the layer's local name.
        run: lets a batch pass through the block; returns its output.

    Returns:
        A local module name, `BLOCK`, or None if the output goes another way (through a norm, say).
    """
    outputs: list[Tensor] = []
    noise = torch.empty(0)
    plain = _streams(module, run)

    def perturb(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        nonlocal noise
        if noise.shape != output.shape:
            size = max(_rms(values) for values in (output, *plain.values()) if values.numel() == output.numel())
            noise = (torch.randn(output.shape, generator=torch.Generator().manual_seed(0)) * size).to(output)
        outputs.append(output)
        return output + noise

    with hooked([module.get_submodule(layer).register_forward_hook(perturb)]):
        perturbed = _streams(module, run)
    for place, stream in plain.items() if outputs else ():
        other = perturbed[place]
        # Some models run their layers on flattened tokens.
        if stream.numel() != noise.numel() or other.shape != stream.shape or not _near(other - stream, noise):
            continue
        # A dropout or a norm right behind the layer is fed its output alone.
        if not _near(stream, outputs[0]):
            return place if place == BLOCK or _same_way(module, place, noise, run, perturbed[BLOCK]) else None
    return None


def _streams(module: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The input of every module of a block, in call order, and the block's output; of experts none of the tokens."""
    found: dict[str, Tensor] = {}

    def note(local: str, args: Any, kwargs: Any) -> None:
        first = args[0] if args else next(iter(kwargs.values()), None)
        if local not in found and isinstance(first, Tensor) and first.is_floating_point():
            found[local] = first[:0] if is_expert(module, local) else first.clone()

    handles = (
        part.register_forward_pre_hook(lambda _, args, kwargs, local=local: note(local, args, kwargs), with_kwargs=True)
        for local, part in module.named_modules()
        if local
    )
    with hooked(handles):
        output = run()
    return {**found, BLOCK: output.clone()}


def _same_way(module: nn.Module, place: str, noise: Tensor, run: Callable[[], Tensor], expected: Tensor) -> bool:
    def add(_: nn.Module, args: Any, kwargs: Any) -> None:
        (stream := inputs_of(args, kwargs)).add_(noise.view_as(stream))

    with hooked([module.get_submodule(place).register_forward_pre_hook(add, with_kwargs=True)]):
        return _near(run(), expected)


def _rms(values: Tensor) -> float:
    return float(values.float().square().mean().sqrt())


def _near(a: Tensor, b: Tensor) -> bool:
    return float((a.float() - b.float().reshape(a.shape)).norm()) <= SAME * float(b.float().norm())
