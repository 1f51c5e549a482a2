"""The choice for a size against a search over all combinations on a fine grid of ratios."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from llmprune.pruning.sizes import Channels, Cost, Depth, Heads, SizeErrors, choose
from llmprune.pruning.sparsity import Kind

BLOCKS, RATIOS = 6, (0.1, 0.3, 0.5, 0.75)


def use_of(seed: int) -> tuple[list[int], SizeErrors]:
    """A made-up model: blocks of different sizes, errors that rise with what is removed."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    sizes = [100, 100, 120, 120, 100, 100]
    depths = [Depth(0.0, ()), *(Depth(float(drawn(1)) * count, tuple(range(1, 1 + count))) for count in (1, 2, 3))]
    nothing = torch.zeros(BLOCKS, dtype=torch.float64)
    heads = [Heads(nothing, nothing, -1)]
    heads += [Heads(drawn(BLOCKS) * ratio / 3, nothing + 30 * ratio, at) for at, ratio in enumerate((0.25, 0.5))]
    curves = drawn(BLOCKS, 1) * torch.tensor(RATIOS, dtype=torch.float64) ** 2
    return sizes, SizeErrors(depths, heads, Channels(RATIOS, curves, nothing + 60))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("goal", [0.95, 0.8, 0.6])
@pytest.mark.parametrize("step", [0.0, 1 / 24])
def test_no_other_combination_has_a_smaller_error(seed: int, goal: float, step: float) -> None:
    sizes, given = use_of(seed)
    assert given.channels is not None
    given = replace(given, channels=replace(given.channels, step=step))
    found = choose(goal, sizes, given)
    assert found is not None
    assert given.channels is not None
    errors = []
    for depth in given.depths:
        kept = torch.tensor([block not in depth.removed for block in range(BLOCKS)])
        for way in given.heads:
            for ratio in [1 - step * kept for kept in range(24, -1, -1)] if step else [at / 1000 for at in range(751)]:
                left = [
                    0 if block in depth.removed else size - float(way.saved[block]) - ratio * 60
                    for block, size in enumerate(sizes)
                ]
                if sum(left) <= goal * sum(sizes) + 1e-9:
                    error = depth.error + float(way.errors[kept].sum()) + given.channels.error(ratio, kept)
                    errors.append(error)
                    break
    assert min(errors) - 5e-3 <= found.cost <= min(errors) + 1e-9


def test_the_curve_passes_through_what_was_measured_and_rises() -> None:
    channels = use_of(0)[1].channels
    assert channels is not None
    kept = torch.ones(BLOCKS, dtype=torch.bool)
    for at, ratio in enumerate(RATIOS):
        assert channels.error(ratio, kept) == pytest.approx(float(channels.errors[:, at].sum()))
    values = [channels.error(step / 200, kept) for step in range(151)]
    assert values[0] == 0
    assert values == sorted(values)
    assert channels.error(0.76, kept) == math.inf


def test_what_cannot_be_reached_is_not_chosen() -> None:
    sizes, errors = use_of(0)
    assert choose(0.1, sizes, errors) is None
    assert choose(0.8, sizes, errors.only("heads")) is None
    only = choose(0.9, sizes, errors.only("blocks"))
    assert only is not None
    assert only.ratio == 0
    assert only.depth.removed


@pytest.mark.parametrize("kind", ["blocks", "channels", "heads"])
def test_a_kind_that_costs_much_more_is_not_taken(kind: Kind) -> None:
    sizes, errors = use_of(0)
    found = choose(0.8, sizes, errors, {kind: Cost(1e6)})
    assert found is not None
    gone = {"blocks": bool(found.depth.removed), "channels": found.ratio > 0, "heads": found.heads.number >= 0}
    assert not gone[kind]
    without = choose(0.8, sizes, errors, {kind: Cost(1e5)})
    assert without is not None
    assert found.cost == pytest.approx(without.cost)


def test_a_cost_passes_through_what_was_measured() -> None:
    cost = Cost.through((0.2, 0.9), (0.1, 0.2))
    assert [cost(error) for error in (0.2, 0.1)] == pytest.approx([0.9, 0.2])
    assert Cost.through((0.2, 0.9))(0.1) == pytest.approx(0.45)
    # Less for more: noise, so in proportion.
    assert Cost.through((0.2, 0.9), (0.1, 0.8))(0.1) == pytest.approx(0.45)
    assert Cost.through((0.0, 0.9))(0.3) == 0.3
    assert cost(0.0) == 0
