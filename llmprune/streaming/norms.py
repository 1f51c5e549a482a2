"""Which norms and learned scales feed the layers of a block, found by watching it run."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.model.blocks import is_scale
from llmprune.streaming.hooks import inputs_of, same_memory


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
            if same_memory(output, inputs):
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
