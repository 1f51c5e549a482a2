"""Weights on a grid during training: their values, and gradients by the straight-through estimator written out."""

from __future__ import annotations

import pytest
import torch

from llmprune.pruning.grid import parse_grid
from llmprune.training.on_grid import OnGrid


@pytest.mark.parametrize("name", ["int4:g32", "int8", "fp8"])
def test_values_and_gradients_are_the_formulas(name: str) -> None:
    grid, generator = parse_grid(name), torch.Generator().manual_seed(0)
    groups = grid.groups(64)
    latent = torch.randn(3, 64, generator=generator, requires_grad=True)
    scale = torch.rand(3, groups, generator=generator) * 2 / grid.highest + 1e-3
    layer = OnGrid(scale, torch.float32, grid)
    outer = torch.randn(3, 64, generator=generator)
    found = layer(latent)
    found.backward(outer)
    assert latent.grad is not None
    assert layer.gain.grad is not None
    gains = torch.zeros(3, groups)
    for row in range(3):
        for column in range(64):
            group = column // (64 // groups)
            s = float(scale[row, group])
            ratio = latent[row, column].item() / s
            inside = grid.lowest <= ratio <= grid.highest
            q = float(grid.nearest(torch.tensor([ratio]))[0])
            assert found[row, column].item() == pytest.approx(s * q, rel=1e-4, abs=1e-6)
            assert float(latent.grad[row, column]) == pytest.approx(float(outer[row, column]) * inside, abs=1e-5)
            # Outside of the range a value is a multiple of its scale.
            gains[row, group] += float(outer[row, column]) * s * (q - ratio if inside else q)
    assert torch.allclose(layer.gain.grad, gains, rtol=1e-3, atol=1e-4)


def test_what_is_stored_is_what_it_computed_with_and_scales_stay_positive() -> None:
    grid = parse_grid("int4:channel")
    layer = OnGrid(torch.tensor([[0.1], [0.2]]), torch.float32, grid)
    latent = torch.linspace(-1, 1, 16).view(2, 8)
    weight, scale = layer.stored(latent)
    assert torch.equal(weight, layer(latent).detach())
    assert torch.allclose(weight / scale, (weight / scale).round(), atol=1e-5)
    with torch.no_grad():
        layer.gain[0] = -2
    _, scale = layer.stored(latent)
    assert torch.allclose(scale, torch.tensor([[0.1], [0.2]]))
