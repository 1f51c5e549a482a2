"""Grids: spelling, the nearest value, what cannot be stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmprune.errors import InputError
from llmprune.pruning.grid import Grid, parse_grid

NAMES = ["int4:g128", "int4:g64", "int4:g32", "int4:channel", "int8", "int8:g64", "fp8"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_read_as_it_is_written(name: str) -> None:
    assert parse_grid(name).name == name
    assert parse_grid(f" {name.upper().replace(':G', ':g').replace('CHANNEL', 'channel')} ").name == name


@pytest.mark.parametrize(
    "text", ["", "int3", "int4:", "int4:g0", "int4:g48", "int4:64", "fp8:g64", "nf4", "4", "int4:g64:g64"]
)
def test_what_no_format_stores_is_refused(text: str) -> None:
    with pytest.raises(InputError) as refused:
        parse_grid(text)
    assert text in refused.value.message
    assert "int4:g64" in refused.value.hint


def test_int4_takes_the_largest_group_that_divides_all_widths() -> None:
    assert parse_grid("int4").fitted([512, 1024], torch.float32).group == 128
    assert parse_grid("int4").fitted([576, 1536], torch.float32).group == 64
    assert parse_grid("int4").fitted([96, 64], torch.float32).group == 32
    assert parse_grid("int4").fitted([24], torch.float32).group == 0
    assert parse_grid("int4:g128").fitted([576], torch.float32).mismatch(576) == "576 inputs are not divisible by 128"


def values_of(grid: Grid) -> Tensor:
    """All values of q, by another way."""
    if grid.kind == "int":
        return torch.arange(-(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1)).float()
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return every[every.isfinite()]


@pytest.mark.parametrize("name", ["int4:channel", "int8", "fp8"])
def test_the_nearest_value_is_the_nearest_of_all(name: str) -> None:
    grid = parse_grid(name)
    values = torch.randn(500, generator=torch.Generator().manual_seed(0)) * grid.highest
    every = values_of(grid)
    best = (values[:, None] - every).abs().amin(1)
    torch.testing.assert_close((grid.nearest(values) - values).abs(), best, rtol=0, atol=0)
    assert bool(torch.isin(grid.nearest(values), every).all())
    assert grid.nearest(torch.zeros(1)).item() == 0
