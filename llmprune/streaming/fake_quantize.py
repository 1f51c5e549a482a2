"""Fake quantisation: weights that are trained on their grid, by the straight-through estimator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from llmprune.pruning.problem import Scales
from llmprune.streaming.block import Block
from llmprune.training.on_grid import fake_quantized

SCALE = "@scale"
"""What is behind the name of a weight in that of its scales."""


class FakeQuantization:
    """The weights of a block that are on a grid, of latent weights and scales that are both trained.

    Their gradients are straight-through, see `fake_quantized`.

    Args:
        block: its groups are all solved.
    """

    def __init__(self, block: Block) -> None:
        prefix = f"{block.name}."
        self.block = block
        self.scales = {name.removeprefix(prefix): scales for name, scales in block.scales.items()}
        self.supports = {name.removeprefix(prefix): support for name, support in block.supports.items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """The scales, `(out, groups)`, float32, by the names of their weights and `SCALE`."""
        return {f"{name}{SCALE}": nn.Parameter(scales.values.clone()) for name, scales in self.scales.items()}

    def applied(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the block computes with: latent weights as they are on the grid, all else as it is, no scales."""
        found = {name: value for name, value in values.items() if not name.endswith(SCALE)}
        for name, scales in self.scales.items():
            found[name] = _fake(found[name], values[f"{name}{SCALE}"], scales)
        return found

    @torch.no_grad()
    def rounded(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values as they can be stored: scales in their dtype, weights on the grid."""
        found = {name: value.detach() for name, value in values.items()}
        for name, scales in self.scales.items():
            key, dtype = f"{name}{SCALE}", scales.grid.scale_dtype
            # A scale that training took to zero or below stays what it was.
            new = found[key].to(dtype).float()
            found[key] = torch.where((new > 0) & new.isfinite(), new, scales.values)
            found[name] = _fake(found[name], found[key], scales)
        return found

    def store(self, values: Mapping[str, Tensor]) -> None:
        """Take new scales over into the block."""
        for name, scales in self.scales.items():
            if (new := values.get(f"{name}{SCALE}")) is not None:
                self.block.scales[f"{self.block.name}.{name}"] = replace(scales, values=new)


def _fake(latent: Tensor, values: Tensor, scales: Scales) -> Tensor:
    return fake_quantized(latent, values[:, scales.group_of], scales.grid)
