"""Weights that are trained on a grid: zeros and codes stay what a file can hold, at every step."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class Grid(Protocol):
    """The values q that a weight `s q` may have."""

    @property
    def lowest(self) -> float:
        """The smallest q."""
        ...

    @property
    def highest(self) -> float:
        """The largest q."""
        ...

    def nearest(self, values: Tensor) -> Tensor:
        """The nearest q of every value."""
        ...


def fake_quantized(latent: Tensor, spread: Tensor, grid: Grid) -> Tensor:
    """`s q(v / s)`, `(out, in)`, with straight-through gradients for v and s.

    The gradient of q is that of the identity within the grid's range, and zero outside (Bengio et al. 2013). With it
    the gradient of a scale is `q(v / s) − v / s` times that of the weight, as in LSQ (Esser et al. 2020).

    Args:
        latent: v, `(out, in)`, float32.
        spread: the scale of every weight, `(out, in)`.
        grid: of the weights.
    """
    ratio = (latent / spread).clamp(grid.lowest, grid.highest)
    return (ratio + (grid.nearest(ratio.detach()) - ratio).detach()) * spread


class OnGrid(nn.Module):
    """A parametrization of a weight: `s q(v / s)` of latent weights v and scales s that are both trained.

    A scale is `s₀ (1 + γ)`, and γ is what is trained: then one learning rate suits weights and scales.

    Args:
        scale: s₀, `(out, groups)`, float32.
        dtype: in which scales are stored.
        grid: of the weights.
    """

    def __init__(self, scale: Tensor, dtype: torch.dtype, grid: Grid) -> None:
        super().__init__()
        self.grid, self.dtype = grid, dtype
        self.gain = nn.Parameter(torch.zeros_like(scale))
        self.register_buffer("start", scale, persistent=False)

    def forward(self, latent: Tensor) -> Tensor:
        """The weight that the model computes with."""
        return fake_quantized(latent, self._spread(self._start * (1 + self.gain), latent.shape[1]), self.grid)

    @property
    def _start(self) -> Tensor:
        start = self.start
        assert isinstance(start, Tensor)
        return start

    @staticmethod
    def _spread(scale: Tensor, width: int) -> Tensor:
        return scale.repeat_interleave(width // scale.shape[1], dim=1)

    @torch.no_grad()
    def stored(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """The weight `(out, in)` and its scale `(out, groups)` as they are stored; a scale ≤ 0 stays what it was."""
        scale = (self._start * (1 + self.gain)).to(self.dtype).float()
        scale = torch.where((scale > 0) & scale.isfinite(), scale, self._start)
        return fake_quantized(latent, self._spread(scale, latent.shape[1]), self.grid), scale
