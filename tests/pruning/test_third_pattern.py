"""A pattern is one class: methods, permutation, schedule and checks take those that this file defines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch
from layer_problems import DAMPING, assert_lawful, every_method, gram_of, group, solve, weight_of, with_dead
from torch import Tensor

from llmprune.pruning.layer_solver import LayerSolver
from llmprune.pruning.linalg import relative_error
from llmprune.pruning.methods import load_method
from llmprune.pruning.parallel import RowSharding
from llmprune.pruning.pattern import NM, PatternCheck, PatternScope, Scope, SparsityPattern, Unstructured, percent
from llmprune.pruning.permutation import choose
from llmprune.pruning.problem import GroupProblem, LayerProblem
from llmprune.pruning.recipe import Recipe

HALF = Fraction(1, 2)


@dataclass(frozen=True, slots=True)
class RatioPerGroup(SparsityPattern):
    """A ratio of every `span` consecutive inputs of a row."""

    ratio: Fraction
    span: int = 16

    @property
    def name(self) -> str:
        return f"{percent(self.ratio)} of {self.span}"

    @property
    def sparsity(self) -> Fraction:
        return self.ratio

    @property
    def scope(self) -> PatternScope:
        return "group"

    @property
    def group(self) -> int:
        return self.span

    @classmethod
    def parse(cls, text: str, scope: PatternScope) -> None:
        return None

    def describe(self) -> str:
        return self.name

    def count(self, size: int) -> int:
        return int(self.ratio * size + HALF)

    def with_ratio(self, ratio: Fraction) -> RatioPerGroup:
        return RatioPerGroup(ratio, self.span)


@dataclass(frozen=True, slots=True)
class Blocks(SparsityPattern):
    """A ratio of the blocks of `height` rows by `breadth` inputs, pruned together; or N of every M of a block row."""

    ratio: Fraction
    scope: PatternScope = "layer"
    height: int = 4
    breadth: int = 1
    span: int | None = None

    @property
    def name(self) -> str:
        return f"{percent(self.ratio)} of {self.height}x{self.breadth} blocks"

    @property
    def sparsity(self) -> Fraction:
        return self.ratio

    @property
    def group(self) -> int | None:
        return self.span

    @property
    def unit(self) -> tuple[int, int]:
        return self.height, self.breadth

    @classmethod
    def parse(cls, text: str, scope: PatternScope) -> None:
        return None

    def describe(self) -> str:
        return self.name

    def count(self, size: int) -> int:
        return int(self.ratio * size + HALF)

    def with_ratio(self, ratio: Fraction) -> Blocks:
        return Blocks(ratio, self.scope, self.height, self.breadth, self.span)


@dataclass(frozen=True, slots=True)
class VNM(SparsityPattern):
    """V:N:M (VENOM, Castro et al. 2023): of every V rows by M inputs all but 4 columns are pruned, and 2 of these 4."""

    v: int = 4
    m: int = 8

    @property
    def name(self) -> str:
        return f"{self.v}:2:{self.m}"

    @property
    def sparsity(self) -> Fraction:
        return 1 - Fraction(2, self.m)

    @property
    def scope(self) -> PatternScope:
        return "group"

    @property
    def group(self) -> int:
        return self.m

    @property
    def elementwise(self) -> bool:
        return False

    @property
    def rows_independent(self) -> bool:
        return False

    @property
    def permutable(self) -> bool:
        return False

    @classmethod
    def parse(cls, text: str, scope: PatternScope) -> None:
        return None

    def describe(self) -> str:
        return self.name

    def count(self, size: int) -> int:
        return size - 2 * size // self.m

    def with_ratio(self, ratio: Fraction) -> VNM:
        return VNM(self.v, min(m for m in range(5, self.m + 1) if 1 - Fraction(2, m) >= ratio))

    def steps(self, count: int) -> list[SparsityPattern]:
        return [self]

    def mismatch(self, rows: int, width: int) -> str:
        return "" if rows % self.v == width % self.m == 0 else f"{rows}x{width} is not made of {self.v}x{self.m}"

    def _tiles(self, score: Tensor) -> Tensor:
        return score.reshape(len(score) // self.v, self.v, -1, self.m)

    def project(self, score: Tensor) -> Tensor:
        tiles = self._tiles(score)
        kept = torch.zeros_like(tiles, dtype=torch.bool)
        marked = tiles == -torch.inf
        worth = tiles.masked_fill(marked, 0).sum(1, keepdim=True).masked_fill(marked.all(1, keepdim=True), -torch.inf)
        columns = worth.topk(4, dim=-1).indices.sort(-1).values.expand(-1, self.v, -1, -1)
        inner = tiles.gather(-1, columns)
        best = NM(2, 4).project(inner.reshape(len(score), -1)).view_as(inner)
        return kept.scatter(-1, columns, best).view_as(score)

    def check(self, weight: Tensor) -> PatternCheck:
        tiles = self._tiles(weight) != 0
        columns = tiles.any(1).sum(-1)
        missing = (columns - 4).clamp(min=0).sum() + (tiles.sum(-1) - 2).clamp(min=0).sum()
        required = weight.numel() - 2 * weight.numel() // self.m
        return PatternCheck(weight.numel(), int((weight == 0).sum()), required, int(missing))


THIRD = [
    RatioPerGroup(Fraction(3, 8)),
    Blocks(HALF),
    Blocks(Fraction(3, 4), "row"),
    Blocks(HALF, "layer", 2, 4),
    Blocks(HALF, "group", 4, 1, 8),
    VNM(),
]
every_third = pytest.mark.parametrize("pattern", THIRD, ids=lambda p: f"{p.name}-{p.scope}")
ROWS, WIDTH = (8, 4, 16), 160


def zeros_of(mask: Tensor, pattern: SparsityPattern) -> int:
    """The number of pruned weights that the pattern asks for, counted by hand."""
    return int(pattern.sparsity * mask.numel())


@every_third
def test_projection_is_exact_and_the_best(pattern: SparsityPattern) -> None:
    """No support that another score projects to keeps more."""
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(8, 48, generator=generator)
    mask = pattern.project(score)
    assert int((~mask).sum()) == zeros_of(mask, pattern)
    found = pattern.check(score * mask)
    assert (found.violations, found.extra_zeros, found.zeros) == (0, 0, zeros_of(mask, pattern))
    assert pattern.check(score).violations > 0
    if not isinstance(pattern, VNM):  # whose greedy choice of columns is not the best
        others = [pattern.project(torch.rand(8, 48, generator=generator)) for _ in range(200)]
        assert float((score * mask).sum()) > max(float((score * other).sum()) for other in others)


def test_units_are_pruned_whole_and_zeros_fill_them_first() -> None:
    score = torch.rand(8, 6, generator=torch.Generator().manual_seed(0))
    mask = Blocks(HALF).project(score)
    tiles = mask.view(2, 4, 6)
    assert torch.equal(tiles.all(1), tiles.any(1))
    score[4:, 5] = -torch.inf
    score[0, 0] = -torch.inf
    mask = Blocks(Fraction(1, 12)).project(score)
    assert (~mask).nonzero().tolist() == [[row, 5] for row in range(4, 8)]


def test_a_pattern_says_what_it_does_not_fit() -> None:
    assert "6 rows" in Blocks(HALF).mismatch(6, 8)
    assert "10 inputs" in Blocks(HALF, "layer", 2, 4).mismatch(4, 10)
    assert "12 inputs" in RatioPerGroup(HALF).mismatch(4, 12)
    assert "rounds to 0" in Blocks(Fraction(1, 100)).mismatch(8, 8)
    assert "rounds to 0" in Blocks(Fraction(1, 100), "row").mismatch(400, 8)
    assert not any(pattern.mismatch(8, 48) for pattern in THIRD)


def test_what_a_pattern_declares() -> None:
    """`group` and `unit` say the rest."""
    assert [pattern.rows_independent for pattern in THIRD] == [True, False, False, False, False, False]
    assert [pattern.permutable for pattern in THIRD] == [True, False, False, False, True, False]
    assert [pattern.multiple_of for pattern in THIRD] == [16, 1, 1, 4, 8, 8]
    assert [pattern.nm for pattern in THIRD] == [(6, 16), None, None, None, None, None]
    assert (NM(2, 4).nm, Unstructured(HALF).nm) == ((2, 4), None)
    assert (NM(2, 4).allocatable, Unstructured(HALF).allocatable) == (False, True)


@every_method
@every_third
def test_masks_of_every_method_are_exact(name: str, pattern: SparsityPattern) -> None:
    gram = gram_of(WIDTH).float()
    weights = [weight_of(rows, WIDTH, rows).float() for rows in ROWS]
    solutions = load_method(name).solve(group(gram, *weights), pattern)
    for solution, weight in zip(solutions, weights, strict=True):
        assert_lawful(solution, weight)
        assert int((~solution.mask).sum()) == zeros_of(solution.mask, pattern)
        assert pattern.check(solution.weight).violations == 0
        assert torch.equal(solve(name, gram, weight, pattern).mask, solution.mask)


@every_method
@every_third
def test_dead_inputs_and_zeros_of_the_source_leave_masks_valid(name: str, pattern: SparsityPattern) -> None:
    gram, weight = with_dead(WIDTH, [0, 1, 2, 3, 4, 5, 6, 40]), weight_of(8, WIDTH).float()
    weight[:, 90:] *= torch.rand(8, WIDTH - 90, generator=torch.Generator().manual_seed(1)) > 0.4
    solution = solve(name, gram, weight, pattern)
    assert_lawful(solution, weight)
    assert not (solution.mask & (weight == 0)).any()
    assert pattern.check(solution.weight).violations == 0


@every_third
def test_methods_that_compensate_do_better_than_magnitude(pattern: SparsityPattern) -> None:
    errors = {}
    for name in ("magnitude", "sparsegpt", "admm"):
        pruned = []
        for seed in range(4):
            gram, weight = gram_of(WIDTH, seed).float(), weight_of(8, WIDTH, seed).float()
            stats = group(gram, weight).stats
            pruned.append(relative_error(weight, solve(name, gram, weight, pattern).weight, stats))
        errors[name] = math.fsum(pruned)
    assert errors["admm"] < errors["sparsegpt"] < 0.8 * errors["magnitude"]


@pytest.mark.parametrize("pattern", [Blocks(HALF), Blocks(HALF, "group", 4, 1, 8), VNM()], ids=lambda p: p.name)
def test_sparsegpt_projects_a_group_when_the_sweep_reaches_it(pattern: SparsityPattern) -> None:
    gram, weight = gram_of(48), weight_of(8, 48)
    H = gram.numpy() + DAMPING * np.diag(gram.numpy()).mean() * np.eye(48)
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    W, kept, block = weight.numpy().copy(), np.ones((8, 48), dtype=bool), pattern.group or 48
    for start in range(0, 48, block):
        part = slice(start, start + block)
        score = torch.from_numpy(W[:, part] ** 2 / np.diag(U)[part] ** 2)
        kept[:, part] = pattern.project(score).numpy()
        for at in range(start, start + block):
            pruned = np.where(kept[:, at], 0, W[:, at])
            W[:, at:] -= np.outer(pruned / U[at, at], U[at, at:])
    solution = solve("sparsegpt", gram, weight, pattern)
    assert np.array_equal(solution.mask.numpy(), kept)
    np.testing.assert_allclose(solution.weight.numpy(), W * kept, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "admm"])
@every_third
def test_all_stages_of_a_layer_take_it(name: str, pattern: SparsityPattern) -> None:
    """Nested steps, permutation where the pattern is permutable, and the refit."""
    weight = weight_of(8, 48).float()
    problem = GroupProblem(
        (LayerProblem("layer", weight),), group(gram_of(48).float(), weight).stats, (torch.arange(48)[None],)
    )
    recipe = Recipe(name, permute=True, steps=2, refit=True, ridge=0.1)
    found = LayerSolver(load_method(name), recipe).solve(problem, pattern)
    (solution,) = found.layers
    assert_lawful(solution, weight)
    assert pattern.permutable or found.order is None
    inputs = torch.arange(48) if found.order is None else found.order
    assert pattern.check(solution.weight[:, inputs]).violations == 0


@pytest.mark.parametrize("pattern", [RatioPerGroup(HALF, 8), Blocks(HALF, "group", 4, 1, 8)], ids=lambda p: p.name)
def test_a_permutation_keeps_more(pattern: SparsityPattern) -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(8, 48, generator=generator) * torch.randn(48, generator=generator).exp()
    order = choose(score, pattern, [torch.arange(48)[None]])
    assert torch.equal(order.sort().values, torch.arange(48))

    def retained(values: Tensor) -> float:
        return float((values * pattern.project(values)).sum())

    assert retained(score[:, order]) > retained(score)


@pytest.mark.parametrize("scope", ["row", "layer"])
def test_steps_rise_to_the_pattern(scope: Scope) -> None:
    steps = Blocks(Fraction(3, 4), scope).steps(3)
    assert [step.sparsity for step in steps] == [Fraction(1, 4), HALF, Fraction(3, 4)]
    assert {step.unit for step in steps} == {(4, 1)}


def test_layers_whose_rows_depend_on_each_other_are_not_cut_among_processes() -> None:
    problem = group(gram_of(48), weight_of(8, 48))
    pieces = RowSharding().pieces(problem, Blocks(HALF))
    assert [(layer, rows.stop - rows.start) for layer, rows, _ in pieces] == [(0, 8)]
