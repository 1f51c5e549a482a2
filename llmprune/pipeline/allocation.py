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
from llmprune.pruning.pattern import Scope, SparsityPattern, Unstructured, percent
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
"""How far a block's share may be from the mean; for `owl`, where the others are all alike, nearly twice as far."""
OUTLIER = 5.0
DIGITS = 10**4
FINEST = 10**11  # what a pattern's name can say


@dataclass(slots=True)
class Survey:
    """Statistics of one block of the dense model.

    Args:
        weights: number of weights that are pruned from.
        errors: relative output errors, summed over its layers, at the lowest and the highest share it may get.
        outliers: share of its weights whose Wanda score exceeds `OUTLIER` times the block's mean.
    """

    weights: int
    errors: tuple[float, float] = (0.0, 0.0)
    outliers: float = 0.0


def allocate(
    stream: BlockStream, pattern: Unstructured, kind: Allocate, solver: Solver, step: Callable[[], None]
) -> list[Unstructured]:
    """The pattern of every block, with ratios whose mean over all weights is the requested one.

    `owl` spreads densities over a range of `2 REACH` in proportion to the blocks' outlier shares, wherever their mean
    then lies (Yin et al. 2024, with M = 5 and λ = 0.08). `error` minimises the sum of the layers' relative errors, see
    `by_error`; its curves are those of the method on the dense model's inputs, from `REACH` below the share to `REACH`
    above it, between which it stays.

    Args:
        stream: a stream of the dense model, used up.
        pattern: the share to be reached on average over all weights.
        kind: `error` or `owl`.
        solver: will prune the layers.
        step: called after every block.

    Raises:
        InputError: a block's share rounds to none or all of a layer's weights.
    """
    curve = Curve(solver, pattern.scope, bounds(pattern.ratio)) if kind == "error" else None
    found, shapes = [], []
    for block in stream:
        found.append(_survey(stream.groups(block), curve))
        shapes.append([layer.shape for layer in block.layers.values()])
        step()
    shares = (by_error if kind == "error" else by_outliers)(found, pattern.ratio)
    own = exact(shares, found, pattern.ratio)
    return [
        _pattern(share, pattern.scope, layers, kind) if layers else pattern
        for share, layers in zip(own, shapes, strict=True)
    ]


def _pattern(share: Fraction, scope: Scope, shapes: list[tuple[int, int]], kind: Allocate) -> Unstructured:
    """The pattern of a block whose layers have these shapes."""
    pattern = Unstructured(share, scope) if 0 < share < 1 else None
    problems = [pattern.mismatch(*shape) for shape in shapes] if pattern else ["that is nothing, or all"]
    if pattern is None or any(problems):
        raise InputError(
            f"--allocate {kind} gives a block {percent(share)}, and {next(filter(None, problems))}",
            "prune all blocks alike: --allocate uniform",
        )
    return pattern


@dataclass(frozen=True, slots=True)
class Curve:
    """How the error of layers rises with the share that goes: by a method, at the lowest and the highest share."""

    solver: Solver
    scope: Scope
    ends: tuple[Fraction, Fraction]

    def errors(self, problem: GroupProblem) -> tuple[float, float]:
        """The relative errors at both ends, summed over the layers of a group."""
        low, high = (self._error(problem, Unstructured(share, self.scope)) for share in self.ends)
        return low, high

    def _error(self, problem: GroupProblem, pattern: Unstructured) -> float:
        pairs = zip(problem.layers, self.solver.solve_once(problem, pattern), strict=True)
        return sum(relative_error(layer.weight, new.weight, problem.stats) for layer, new in pairs)


def _survey(groups: Iterable[Group], curve: Curve | None) -> Survey:
    """Look at the groups of a block, which stays dense: at its errors, or at its outliers."""
    weights, scores, errors = 0, [], (0.0, 0.0)
    for group in groups:
        problem = group.problem
        weights += sum(layer.weight.numel() for layer in problem.layers)
        if curve is None:
            norms = problem.stats.gram.diagonal().sqrt()
            scores += [(layer.weight.abs() * norms).flatten() for layer in problem.layers]
        else:
            low, high = curve.errors(problem)
            errors = errors[0] + low, errors[1] + high
    every = torch.cat(scores) if scores else torch.zeros(1)
    return Survey(weights, errors, float((every > OUTLIER * every.mean()).double().mean()))


def bounds(share: Fraction) -> tuple[Fraction, Fraction]:
    """The lowest and the highest share of a block; closer to the mean where that is near none or all."""
    reach = min(REACH, share / 2, (1 - share) / 2)
    return share - reach, share + reach


def by_error(found: Sequence[Survey], share: Fraction) -> list[float]:
    """The shares `s_b` that minimise `Σ_b E_b(s_b)` while `Σ_b n_b s_b = s Σ_b n_b`.

    Errors rise exponentially, `E_b(s) = exp(a_b + c_b s)`; at the minimum, one more weight costs the same in every
    block, `c_b E_b(s_b) / n_b = μ`, unless its share is at an end of the range. μ is found by bisection.
    """
    low, high = map(float, bounds(share))
    weights = torch.tensor([survey.weights for survey in found], dtype=torch.float64)
    first, last = (
        torch.tensor([survey.errors[end] for survey in found], dtype=torch.float64).clamp(min=1e-12).log()
        for end in (0, 1)
    )
    slope = ((last - first) / (high - low)).clamp(min=1e-6)
    level = (slope / weights.clamp(min=1)).log() + first

    def shares(price: float) -> Tensor:
        return (low + (price - level) / slope).clamp(low, high)

    cheap, dear = float(level.min()) - 1, float((level + slope * (high - low)).max()) + 1
    for _ in range(100):
        price = (cheap + dear) / 2
        if float(shares(price) @ weights) < float(share) * float(weights.sum()):
            cheap = price
        else:
            dear = price
    return [float(value) for value in shares(dear)]


def by_outliers(found: Sequence[Survey], share: Fraction) -> list[float]:
    """Densities in proportion to the outlier shares, `2λ` apart at most, shifted to the mean that is asked for.

    Blocks of which nothing is pruned have no part in it.
    """
    low, high = map(float, bounds(share))
    outliers = [survey.outliers for survey in found if survey.weights] or [0.0]
    least, spread = min(outliers), max(outliers) - min(outliers)
    denser = [(s.outliers - least) / spread * (high - low) if spread and s.weights else 0.0 for s in found]
    mean = sum(survey.weights * d for survey, d in zip(found, denser, strict=True)) / _total(found)
    return [float(share) + mean - value for value in denser]


def exact(shares: Sequence[float], found: Sequence[Survey], share: Fraction) -> list[Fraction]:
    """Shares rounded to hundredths of a percent; the largest block takes what is missing to the exact mean."""
    rounded = [Fraction(round(value * DIGITS), DIGITS) for value in shares]
    largest = max(range(len(found)), key=lambda at: found[at].weights)
    missing = share * _total(found) - sum(survey.weights * value for survey, value in zip(found, rounded, strict=True))
    exactly = rounded[largest] + missing / max(found[largest].weights, 1)
    rounded[largest] = Fraction(round(exactly * FINEST), FINEST)
    return rounded


def _total(found: Sequence[Survey]) -> int:
    return max(sum(survey.weights for survey in found), 1)
