"""Quantisation as laws: against brute force, an independent GPTQ, least squares, and rounding after pruning."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from llmprune.pruning.grid import Grid, parse_grid
from llmprune.pruning.layer_solver import LayerSolver
from llmprune.pruning.methods import load_method
from llmprune.pruning.pattern import parse_pattern
from llmprune.pruning.problem import GroupProblem, InputStats, LayerProblem, LayerSolution, masked
from llmprune.pruning.quantize import DAMPING, quantize
from llmprune.pruning.recipe import Recipe

GRIDS = ["int4:g32", "int4:channel", "int8", "fp8"]


def problem_of(width: int, rows: int, seed: int = 0, tokens: int = 400) -> GroupProblem:
    """A layer with correlated inputs of very different sizes."""
    torch.manual_seed(seed)
    mixing = torch.eye(width) + torch.randn(width, width) / width**0.5
    inputs = torch.randn(tokens, width) @ mixing * torch.randn(width).mul(0.7).exp()
    return GroupProblem(
        (LayerProblem("layer", torch.randn(rows, width)),), InputStats(tokens, inputs.T @ inputs / tokens)
    )


def damped(problem: GroupProblem) -> Tensor:
    gram = problem.stats.gram.double()
    return gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def errors(problem: GroupProblem, weight: Tensor) -> Tensor:
    """`(w - w*)' A (w - w*)` of every row."""
    missed = (weight - problem.layers[0].weight).double()
    return ((missed @ damped(problem)) * missed).sum(1)


def dense(problem: GroupProblem) -> list[LayerSolution]:
    return [masked(problem.layers[0].weight, problem.layers[0].weight != 0)]


def grid_of(name: str, width: int = 64, dtype: torch.dtype = torch.float32) -> Grid:
    return parse_grid(name).fitted([width], dtype)


def rounded(weight: Tensor, grid: Grid) -> Tensor:
    """Rounding to nearest with the largest weight of a group at the end of the grid."""
    grouped = weight.view(len(weight), grid.groups(weight.shape[1]), -1)
    scale = grouped.abs().amax(-1, keepdim=True) / grid.highest
    scale[scale == 0] = 1
    return (grid.nearest(grouped / scale) * scale).view_as(weight)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "admm"])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_never_worse_than_pruning_and_then_rounding(name: str, method: str, seed: int) -> None:
    problem, grid = problem_of(64, 40, seed), grid_of(name)
    pruned = load_method(method).solve(problem, parse_pattern("2:4"))
    (found,) = quantize(problem, pruned, grid, 2)
    assert float(errors(problem, found.weight).sum()) <= float(errors(problem, rounded(pruned[0].weight, grid)).sum())
    assert torch.equal(found.mask, pruned[0].mask)
    assert not bool(found.weight[~pruned[0].mask].any())


@pytest.mark.parametrize("name", GRIDS)
def test_passes_never_raise_the_error_of_a_row(name: str) -> None:
    problem, grid = problem_of(64, 50), grid_of(name)
    before = torch.full((50,), torch.inf, dtype=torch.float64)
    for passes in range(5):
        (found,) = quantize(problem, dense(problem), grid, passes)
        after = errors(problem, found.weight)
        assert bool((after <= before * (1 + 1e-4)).all())
        before = after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GRIDS)
def test_weights_are_codes_times_scales_that_can_be_stored(name: str, dtype: torch.dtype) -> None:
    problem, grid = problem_of(64, 20), grid_of(name, dtype=dtype)
    (found,) = quantize(problem, dense(problem), grid, 2)
    assert found.scales is not None
    assert torch.equal(found.scales.values.to(dtype).float(), found.scales.values)
    assert found.scales.values.shape == (20, grid.groups(64))
    codes = found.weight / found.scales.spread()
    torch.testing.assert_close(grid.nearest(codes) * found.scales.spread(), found.weight, rtol=0, atol=0)


def best_codes(problem: GroupProblem, scale: Tensor, mask: Tensor, grid: Grid) -> Tensor:
    """The least error of a row over all codes near the optimum on the support, by trying them all."""
    A, target = damped(problem).numpy(), problem.layers[0].weight.double().numpy()
    least = []
    for row in range(len(target)):
        kept = np.flatnonzero(mask[row].numpy())
        free = np.linalg.solve(A[np.ix_(kept, kept)], A[kept] @ target[row]) / float(scale[row])
        choices = [np.unique(np.clip(np.floor(q) + np.arange(-1, 3), grid.lowest, grid.highest)) for q in free]
        codes = np.array(list(product(*choices)))
        weight = np.zeros((len(codes), len(A)))
        weight[:, kept] = codes * float(scale[row])
        missed = weight - target[row]
        least.append(float(np.einsum("ki,ij,kj->k", missed, A, missed).min()))
    return torch.tensor(least, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(4))
def test_it_is_near_the_best_of_all_roundings(seed: int) -> None:
    problem = problem_of(6, 12, seed, tokens=60)
    grid = Grid("int", 4)
    pruned = load_method("admm").solve(problem, parse_pattern("1:3"))
    (found,) = quantize(problem, pruned, grid, 8)
    assert found.scales is not None
    least = best_codes(problem, found.scales.values[:, 0], pruned[0].mask, grid)
    reached = errors(problem, found.weight)
    assert bool((reached >= least * (1 - 1e-4)).all())
    # Of most rows it is the best, and of all together it is near.
    assert float((reached <= least * (1 + 1e-4)).double().mean()) >= 0.5
    assert float(reached.sum()) <= 1.25 * float(least.sum())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_with_exchanges_it_is_near_the_best_of_all_masks_and_roundings(seed: int, method: str) -> None:
    problem, grid = problem_of(6, 12, seed, tokens=60), Grid("int", 4)
    pruned = load_method(method).solve(problem, parse_pattern("1:3"))
    held, free = (quantize(problem, copied(pruned), grid, 8, period=period)[0] for period in (None, 3))
    assert free.scales is not None
    least = torch.full((12,), torch.inf, dtype=torch.float64)
    for out in product(range(3), range(3, 6)):
        mask = torch.ones(12, 6, dtype=torch.bool)
        mask[:, out] = False
        least = least.minimum(best_codes(problem, free.scales.values[:, 0], mask, grid))
    reached = errors(problem, free.weight)
    assert bool((reached >= least * (1 - 1e-4)).all())
    assert float(reached.sum()) <= 1.5 * float(least.sum())
    before = float(errors(problem, held.weight).sum())
    # Masks of SparseGPT may be the best for some seeds; those of Wanda, chosen without the correlations, never are.
    assert float(reached.sum()) <= before if method == "sparsegpt" else float(reached.sum()) < before


def copied(solutions: list[LayerSolution]) -> list[LayerSolution]:
    return [replace(one, weight=one.weight.clone(), mask=one.mask.clone()) for one in solutions]


@pytest.mark.parametrize("pattern", ["2:4", "3:4", "4:8", "1:3"])
@pytest.mark.parametrize("name", ["int4:g32", "fp8"])
def test_exchanges_hold_the_pattern_and_never_raise_the_error_of_a_row(pattern: str, name: str) -> None:
    width = 96
    problem, grid = problem_of(width, 30), grid_of(name, width)
    source = problem.layers[0].weight
    source[:, ::7] = 0
    pruned = load_method("magnitude").solve(problem, parse_pattern(pattern))
    before = torch.full((30,), torch.inf, dtype=torch.float64)
    for passes in range(4):
        (found,) = quantize(problem, copied(pruned), grid, passes, period=parse_pattern(pattern).group)
        after = errors(problem, found.weight)
        assert bool((after <= before * (1 + 1e-4)).all())
        assert parse_pattern(pattern).check(found.mask.float()).violations == 0
        assert not bool(found.weight[~found.mask].any())
        assert not bool(found.weight[source == 0].any())
        assert torch.equal(found.mask, pruned[0].mask) == (passes == 0)
        before = after


def test_groups_that_are_too_wide_keep_their_supports() -> None:
    problem, grid = problem_of(128, 8), grid_of("int8", 128)
    pruned = load_method("magnitude").solve(problem, parse_pattern("32:64"))
    (found,) = quantize(problem, copied(pruned), grid, 2, period=64)
    assert torch.equal(found.mask, pruned[0].mask)


@torch.no_grad()
def test_behind_exchanges_no_single_one_gains_alone() -> None:
    problem, grid = problem_of(16, 8), grid_of("int8", 16)
    pruned = load_method("magnitude").solve(problem, parse_pattern("2:4"))
    (found,) = quantize(problem, pruned, grid, 60, period=4)
    assert found.scales is not None
    reached, A = errors(problem, found.weight), damped(problem)
    for row, (out, into) in product(range(8), product(range(16), range(16))):
        if out // 4 != into // 4 or not found.mask[row, out] or found.mask[row, into]:
            continue
        other = found.weight[row].double().clone()
        other[out] = 0
        slope = A[into] @ (other - problem.layers[0].weight[row])
        scale = float(found.scales.spread()[row, into])
        other[into] = float(grid.nearest(-slope / A[into, into] / scale)) * scale
        missed = other - problem.layers[0].weight[row]
        assert float(missed @ A @ missed) >= float(reached[row]) * (1 - 1e-4)


def test_after_many_passes_no_single_code_can_be_bettered() -> None:
    problem, grid = problem_of(32, 16), grid_of("int4:g32", 32)
    (found,) = quantize(problem, dense(problem), grid, 40)
    assert found.scales is not None
    spread, reached = found.scales.spread(), errors(problem, found.weight)
    for column in range(32):
        for step in (-1, 1):
            other = found.weight.clone()
            other[:, column] = (grid.nearest(other[:, column] / spread[:, column]) + step).clamp(
                grid.lowest, grid.highest
            ) * spread[:, column]
            assert bool((errors(problem, other) >= reached * (1 - 1e-4)).all())


def test_the_sweep_is_gptq_with_zeros_held() -> None:
    """Against the definition: the inverse of what is left of A, eliminated column by column in float64."""
    problem, grid = problem_of(32, 8), grid_of("int8", 32)
    pruned = load_method("admm").solve(problem, parse_pattern("2:4"))
    (found,) = quantize(problem, pruned, grid, 0)
    assert found.scales is not None
    A, weight = damped(problem), pruned[0].weight.double().clone()
    scale, left = found.scales.values[:, 0].double(), list(range(32))
    result = torch.zeros_like(weight)
    for column in A.diagonal().argsort(descending=True).tolist():
        inverse = torch.linalg.inv(A[left][:, left])
        here = left.index(column)
        value = grid.nearest(weight[:, column] / scale) * scale * pruned[0].mask[:, column]
        result[:, column] = value
        weight[:, left] -= torch.outer((weight[:, column] - value) / inverse[here, here], inverse[here])
        left.remove(column)
    taken = errors(problem, result.float()) < errors(
        problem, grid.nearest(pruned[0].weight / scale.float()[:, None]) * scale.float()[:, None]
    )
    assert int(taken.sum()) >= 6
    # One code in float32 may fall to the other side of a half, and others after it.
    assert float(((found.weight - result).abs() < 1e-5)[taken].double().mean()) > 0.98


@pytest.mark.parametrize("name", ["int4:g32", "int4:channel"])
def test_scales_are_the_least_squares_solution_for_the_codes(name: str) -> None:
    problem, grid = problem_of(64, 6), grid_of(name)
    (found,) = quantize(problem, dense(problem), grid, 60)
    assert found.scales is not None
    root = np.linalg.cholesky(damped(problem).numpy()).T
    codes = (found.weight / found.scales.spread()).round().double().view(6, grid.groups(64), -1).numpy()
    target = problem.layers[0].weight.double().numpy()
    for row in range(6):
        design = np.zeros((64, grid.groups(64)))
        for group, part in enumerate(codes[row]):
            design[group * len(part) : (group + 1) * len(part), group] = part
        wanted, *_ = np.linalg.lstsq(root @ design, root @ target[row], rcond=None)
        np.testing.assert_allclose(found.scales.values[row], wanted, rtol=1e-3)


def test_without_tokens_weights_are_rounded() -> None:
    problem = problem_of(32, 4)
    unseen = GroupProblem(problem.layers, InputStats(0, torch.zeros(32, 32)))
    (found,) = quantize(unseen, dense(problem), grid_of("int8", 32), 2)
    torch.testing.assert_close(found.weight, problem.layers[0].weight, atol=0.05, rtol=0)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    problem = problem_of(32, 4)
    problem.stats.gram[5] = problem.stats.gram[:, 5] = 0
    (found,) = quantize(problem, dense(problem), grid_of("int4:g32", 32), 2)
    assert bool(found.weight.isfinite().all())


@pytest.mark.parametrize("sparsity", [None, "2:4", "50%"])
def test_a_permuted_layer_has_its_groups_in_the_order_of_the_file(sparsity: str | None) -> None:
    problem = problem_of(64, 24)
    problem = GroupProblem(problem.layers, problem.stats, (torch.arange(64)[None],))
    recipe = Recipe("admm", permute=sparsity == "2:4", grid_passes=1)
    method = load_method("admm") if sparsity else None
    pattern = parse_pattern(sparsity) if sparsity else None
    found = LayerSolver(method, recipe).solve(problem, pattern, grid_of("int4:g32"))
    (layer,) = found.layers
    assert layer.scales is not None
    order = torch.arange(64) if found.order is None else found.order
    assert torch.equal(layer.scales.group_of[order], torch.arange(64) // 32)
    assert (found.order is not None) == (sparsity == "2:4")
    written = layer.weight[:, order]
    if pattern:
        assert pattern.check(written).violations == 0
    spread = layer.scales.values.repeat_interleave(32, 1)
    torch.testing.assert_close((written / spread).round() * spread, written, rtol=0, atol=0)


def test_it_lowers_the_damage_of_pruning_then_quantising_clearly() -> None:
    problem, grid = problem_of(128, 96), grid_of("int4:g32", 128)
    pruned = load_method("sparsegpt").solve(problem, parse_pattern("2:4"))
    (found,) = quantize(problem, pruned, grid, 4)
    assert float(errors(problem, found.weight).sum()) < 0.8 * float(
        errors(problem, rounded(pruned[0].weight, grid)).sum()
    )


@pytest.mark.parametrize("name", ["int8", "int4:g32"])
def test_small_weights_are_as_precise_with_scales_in_half_precision(name: str) -> None:
    problem = problem_of(64, 8)
    problem = GroupProblem((LayerProblem("layer", problem.layers[0].weight * 1e-4),), problem.stats)
    half, full = (
        quantize(problem, dense(problem), grid_of(name, dtype=dtype), 2)[0] for dtype in (torch.float16, torch.float32)
    )
    assert errors(problem, half.weight.half().float()).sum() < 1.5 * errors(problem, full.weight).sum()
