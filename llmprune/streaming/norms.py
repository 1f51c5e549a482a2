"""Norms and learned scales that feed the layers of a block, found by running it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llmprune.model.blocks import is_scale
from llmprune.model.hooks import before, hooked
from llmprune.streaming.hooks import same_memory

NormScale = tuple[str, float]
"""Local name of a norm, and the offset that it adds to its weight (Gemma: 1)."""


@torch.no_grad()
def find_norm_scales(module: nn.Module, layers: Collection[str], run: Callable[[], object]) -> dict[str, NormScale]:
    """The norm or learned scale that feeds each layer directly, by the layer's local name.

    Args:
        module: the block, its weights in memory.
        layers: local names.
        run: lets a batch pass through the block.
    """
    outputs: list[tuple[str, Tensor, Tensor]] = []
    found: dict[str, NormScale] = {}

    def note(local: str, args: Any, output: Any) -> None:
        if len(args) == 1 and isinstance(output, Tensor) and output.shape == args[0].shape:
            outputs.append((local, args[0].clone(), output))

    def match(local: str, inputs: Tensor) -> None:
        for norm, given, output in outputs:
            if same_memory(output, inputs):
                found[local] = norm, _offset(module.get_submodule(norm), given)

    def handles() -> Iterator[RemovableHandle]:
        for local, part in module.named_modules():
            if is_scale(part):
                yield part.register_forward_hook(lambda _, args, output, local=local: note(local, args, output))
            elif local in layers:
                yield before(part, lambda inputs, local=local: match(local, inputs))  # type: ignore[misc]

    with hooked(handles()):
        run()
    return found


def _offset(norm: nn.Module, given: Tensor) -> float:
    """The offset that a norm adds to its weight: its output at weight 0, in units of the change from 0 to 1."""
    own = dict(norm.named_parameters())

    def output(value: float) -> Tensor:
        values = {name: torch.full_like(p, value if name == "weight" else 0.0) for name, p in own.items()}
        made = torch.func.functional_call(norm, values, (given,))
        assert isinstance(made, Tensor)
        return made.float()

    at_zero, slope = output(0.0), output(1.0) - output(0.0)
    return float((at_zero * slope).sum() / slope.square().sum().clamp(min=1e-30))
