"""Non-uniform layer-wise allocation: every block gets its own sparsity ratio, with the requested mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor

from llmprune.errors import InputError
from llmprune.pruning.linalg import relative_error
from llmprune.pruning.pattern import SparsityPattern, percent
from llmprune.pruning.problem import GroupProblem, LayerSolution
from llmprune.pruning.recipe import Allocate
from llmprune.streaming.schedule import Group
from llmprune.streaming.stream import BlockStream


class Solver(Protocol):
    """The solver interface that allocation by error needs."""

    def solve_once(self, problem: GroupProblem, pattern: SparsityPattern) -> list[LayerSolution]:
        """The solutions of the method alone."""
        ...


REACH = Fraction(8, 100)
"""How far a block's ratio may be from the mean; for `owl`, where the others are all alike, nearly twice as far."""
OUTLIER = 5.0
DIGITS = 10**4
FINEST = 10**11  # what a pattern's name can say


@dataclass(slots=True)
class BlockStatistics:
    """Statistics of one block of the dense model.

    Args:
        weights: number of weights in the layers to be pruned.
        errors: relative output errors, summed over its layers, at the lowest and the highest ratio it may get.
        outliers: fraction of its weights whose Wanda score exceeds `OUTLIER` times the block's mean.
    """

    weights: int
    errors: tuple[float, float] = (0.0, 0.0)
    outliers: float = 0.0


def allocate(
    stream: BlockStream, pattern: SparsityPattern, rule: Allocate, solver: Solver, step: Callable[[], None]
) -> list[SparsityPattern]:
    """The pattern of every block, with ratios whose mean over all weights is the requested one.

    `owl` spreads densities over a range of `2 REACH` in proportion to the blocks' outlier fractions, wherever their
    mean then lies (Yin et al. 2024, with M = 5 and λ = 0.08). `error` minimises the sum of the layers' relative errors,
    see `by_error`; its curves are those of the method on the dense model's inputs, from `REACH` below the ratio to
    `REACH` above it, between which it stays.

    Args:
        stream: a stream of the dense model, used up.
        pattern: an allocatable pattern with the mean ratio over all weights.
        rule: a name of `RULES`.
        solver: will prune the layers.
        step: called after every block.

    Raises:
        InputError: a block's ratio rounds to none or all of a layer's weights.
    """
    measure, assign = RULES[rule]
    found, shapes = [], []
    for block in stream:
        found.append(measure(stream.groups(block), pattern, solver))
        shapes.append([layer.shape for layer in block.layers.values()])
        step()
    ratios = exact(assign(found, pattern.sparsity), found, pattern.sparsity)
    return [
        _pattern(pattern, ratio, layers, rule) if layers else pattern
        for ratio, layers in zip(ratios, shapes, strict=True)
    ]


def _pattern(
    pattern: SparsityPattern, ratio: Fraction, shapes: list[tuple[int, int]], rule: Allocate
) -> SparsityPattern:
    """The pattern with the ratio of a block whose layers have these shapes."""
    own = pattern.with_ratio(ratio) if 0 < ratio < 1 else None
    problems = [own.mismatch(*shape) for shape in shapes] if own else ["that is nothing, or all"]
    if own is None or any(problems):
        raise InputError(
            f"--allocate {rule} gives a block {percent(ratio)}, and {next(filter(None, problems))}",
            "prune all blocks alike: --allocate uniform",
        )
    return own


def measure_errors(groups: Iterable[Group], pattern: SparsityPattern, solver: Solver) -> BlockStatistics:
    """The errors of a block's layers at the two ends of the range of ratios; the block stays dense."""
    ends = [pattern.with_ratio(ratio) for ratio in bounds(pattern.sparsity)]
    weights, totals = 0, [0.0, 0.0]
    for group in groups:
        problem = group.problem
        weights += sum(layer.weight.numel() for layer in problem.layers)
        totals = [
            total + _error(problem, solver.solve_once(problem, end)) for total, end in zip(totals, ends, strict=True)
        ]
    low, high = totals
    return BlockStatistics(weights, (low, high))


def _error(problem: GroupProblem, solutions: Sequence[LayerSolution]) -> float:
    """Relative errors, summed over the layers of a group."""
    pairs = zip(problem.layers, solutions, strict=True)
    return sum(relative_error(layer.weight, new.weight, problem.stats) for layer, new in pairs)


def measure_outliers(groups: Iterable[Group], pattern: SparsityPattern, solver: Solver) -> BlockStatistics:
    """The fraction of outliers among the Wanda scores of a block's weights; the block stays dense."""
    weights, scores = 0, []
    for group in groups:
        problem = group.problem
        weights += sum(layer.weight.numel() for layer in problem.layers)
        norms = problem.stats.gram.diagonal().sqrt()
        scores += [(layer.weight.abs() * norms).flatten() for layer in problem.layers]
    every = torch.cat(scores) if scores else torch.zeros(1)
    return BlockStatistics(weights, outliers=float((every > OUTLIER * every.mean()).double().mean()))


def bounds(ratio: Fraction) -> tuple[Fraction, Fraction]:
    """The lowest and the highest ratio of a block; closer to the mean where that is near none or all."""
    reach = min(REACH, ratio / 2, (1 - ratio) / 2)
    return ratio - reach, ratio + reach


def by_error(found: Sequence[BlockStatistics], ratio: Fraction) -> list[float]:
    """The ratios `s_b` that minimise `Σ_b E_b(s_b)` while `Σ_b n_b s_b = s Σ_b n_b`.

    Errors rise exponentially, `E_b(s) = exp(a_b + c_b s)`; at the minimum, one more weight costs the same in every
    block, `c_b E_b(s_b) / n_b = μ`, unless its ratio is at an end of the range. μ is found by bisection.
    """
    low, high = map(float, bounds(ratio))
    weights = torch.tensor([block.weights for block in found], dtype=torch.float64)
    first, last = (
        torch.tensor([block.errors[end] for block in found], dtype=torch.float64).clamp(min=1e-12).log()
        for end in (0, 1)
    )
    slope = ((last - first) / (high - low)).clamp(min=1e-6)
    level = (slope / weights.clamp(min=1)).log() + first

    def ratios(price: float) -> Tensor:
        return (low + (price - level) / slope).clamp(low, high)

    cheap, dear = float(level.min()) - 1, float((level + slope * (high - low)).max()) + 1
    for _ in range(100):
        price = (cheap + dear) / 2
        if float(ratios(price) @ weights) < float(ratio) * float(weights.sum()):
            cheap = price
        else:
            dear = price
    return [float(value) for value in ratios(dear)]


def by_outliers(found: Sequence[BlockStatistics], ratio: Fraction) -> list[float]:
    """Ratios whose densities are in proportion to the outlier fractions, `2λ` apart at most, with the requested mean.

    Blocks of which nothing is pruned have no part in it.
    """
    low, high = map(float, bounds(ratio))
    outliers = [block.outliers for block in found if block.weights] or [0.0]
    least, spread = min(outliers), max(outliers) - min(outliers)
    denser = [(b.outliers - least) / spread * (high - low) if spread and b.weights else 0.0 for b in found]
    mean = sum(block.weights * d for block, d in zip(found, denser, strict=True)) / _total(found)
    return [float(ratio) + mean - value for value in denser]


def exact(ratios: Sequence[float], found: Sequence[BlockStatistics], ratio: Fraction) -> list[Fraction]:
    """Ratios rounded to hundredths of a percent; the largest block takes what is missing to the exact mean."""
    rounded = [Fraction(round(value * DIGITS), DIGITS) for value in ratios]
    largest = max(range(len(found)), key=lambda at: found[at].weights)
    missing = ratio * _total(found) - sum(block.weights * value for block, value in zip(found, rounded, strict=True))
    exactly = rounded[largest] + missing / max(found[largest].weights, 1)
    rounded[largest] = Fraction(round(exactly * FINEST), FINEST)
    return rounded


def _total(found: Sequence[BlockStatistics]) -> int:
    return max(sum(block.weights for block in found), 1)


Measure = Callable[[Iterable[Group], SparsityPattern, Solver], BlockStatistics]
Assign = Callable[[Sequence[BlockStatistics], Fraction], list[float]]
RULES: dict[str, tuple[Measure, Assign]] = {
    "error": (measure_errors, by_error),
    "owl": (measure_outliers, by_outliers),
}
"""By name: what is measured of every block, and how ratios follow from it."""
