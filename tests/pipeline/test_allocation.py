"""Shares of blocks: the mean is exact, the sum of errors is the lowest there is, outliers are spared."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from helpers import chosen, random_tokens, save_tiny, skeleton_of, stream_through
from hypothesis import given
from hypothesis import strategies as st
from layer_problems import gram_of, group, weight_of
from scipy.optimize import minimize
from torch import Tensor

from llmprune.errors import InputError
from llmprune.pipeline.allocation import (
    REACH,
    BlockStatistics,
    allocate,
    bounds,
    by_error,
    by_outliers,
    exact,
    measure_errors,
)
from llmprune.pruning.layer_solver import LayerSolver
from llmprune.pruning.linalg import relative_error
from llmprune.pruning.methods import load_method
from llmprune.pruning.pattern import Unstructured
from llmprune.pruning.recipe import Allocate, Recipe
from llmprune.streaming.schedule import Group

surveys = st.lists(
    st.builds(
        BlockStatistics,
        st.integers(1, 10**6),
        st.tuples(st.floats(1e-6, 0.4), st.floats(0.4, 1.0)),
        st.floats(0, 1),
    ),
    min_size=1,
    max_size=12,
)
shares = st.fractions(Fraction(1, 50), Fraction(49, 50), max_denominator=1000)


@given(surveys, shares, st.booleans())
def test_the_mean_is_the_share_that_was_asked_for(found: list[BlockStatistics], share: Fraction, error: bool) -> None:
    given_shares = (by_error if error else by_outliers)(found, share)
    low, high = bounds(share)
    result = exact(given_shares, found, share)
    total = sum(survey.weights for survey in found)
    count = sum(survey.weights * value for survey, value in zip(found, result, strict=True))
    assert abs(count - share * total) < Fraction(1, 100)
    if error:
        assert all(float(low) <= value <= float(high) for value in given_shares)
    else:
        assert max(given_shares) - min(given_shares) <= float(high - low) * (1 + 1e-9)


def test_equal_blocks_have_exactly_the_mean() -> None:
    found = [BlockStatistics(100, (0.1 + 0.01 * at, 0.2 + 0.03 * at), at / 10) for at in range(7)]
    for share in (Fraction(7, 10), Fraction(1, 3), Fraction(6667, 10000)):
        result = exact(by_error(found, share), found, share)
        assert abs(sum(result) - 7 * share) <= Fraction(1, 10**11)
    assert sum(exact(by_outliers(found, Fraction(7, 10)), found, Fraction(7, 10))) == Fraction(49, 10)


def test_the_sum_of_errors_is_the_lowest_that_scipy_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    low, high = map(float, bounds(Fraction(7, 10)))

    def total(values: object, first: Tensor, last: Tensor) -> float:
        return float((first * (last / first) ** ((torch.as_tensor(values) - low) / (high - low))).sum())

    def missing(values: object, weights: Tensor) -> float:
        return float((torch.as_tensor(values) - 0.7) @ weights)

    for _ in range(5):
        first = torch.rand(6, generator=generator).double() * 0.1 + 0.01
        last = first * (1.5 + torch.rand(6, generator=generator).double())
        weights = torch.randint(1, 5, (6,), generator=generator).double()
        found = [BlockStatistics(int(n), (float(a), float(b))) for n, a, b in zip(weights, first, last, strict=True)]
        mean = {"type": "eq", "fun": missing, "args": (weights,)}
        options = {"ftol": 1e-12}
        best = minimize(total, [0.7] * 6, (first, last), bounds=[(low, high)] * 6, constraints=[mean], options=options)
        assert total(by_error(found, Fraction(7, 10)), first, last) <= best.fun * (1 + 1e-6)


def test_blocks_with_more_outliers_stay_denser() -> None:
    found = [BlockStatistics(10, outliers=value) for value in (0.01, 0.03, 0.02)]
    first, second, third = by_outliers(found, Fraction(7, 10))
    assert second < third < first
    assert first - second == pytest.approx(2 * float(REACH))
    assert by_outliers([BlockStatistics(10), BlockStatistics(30)], Fraction(7, 10)) == [0.7, 0.7]


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "admm"])
def test_the_errors_of_a_block_are_those_of_the_method(name: str) -> None:
    problem = group(gram_of(24), weight_of(6, 24), weight_of(10, 24, 1))
    ends, method = bounds(Fraction(7, 10)), load_method(name)
    expected = [
        sum(relative_error(layer.weight, masked.weight, problem.stats) for layer, masked in zip(*pair, strict=True))
        for pair in ((problem.layers, method.solve(problem, Unstructured(share))) for share in ends)
    ]
    one = Group(problem, (), lambda *_: [])
    solver = LayerSolver(method, Recipe("admm"))
    found = measure_errors([one], Unstructured(Fraction(7, 10)), solver)
    assert found.errors == pytest.approx(expected)
    assert found.weights == sum(layer.weight.numel() for layer in problem.layers)


SOLVER = LayerSolver(load_method("admm"), Recipe("admm"))


@pytest.mark.parametrize("kind", ["error", "owl"])
def test_a_model_s_blocks_get_their_shares(kind: Allocate, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, tokenizer=False)
    skeleton = skeleton_of(tmp_path)
    stream = stream_through(skeleton, random_tokens(16), chosen=chosen(skeleton))
    steps: list[int] = []
    patterns = allocate(stream, Unstructured(Fraction(7, 10)), kind, SOLVER, lambda: steps.append(1))
    assert len(patterns) == len(steps) == len(skeleton.blocks)
    assert sum(pattern.ratio for pattern in patterns) == Fraction(7, 10) * len(patterns)
    assert len({pattern.ratio for pattern in patterns}) > 1


def test_a_share_that_prunes_nothing_is_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, tokenizer=False)
    skeleton = skeleton_of(tmp_path)
    stream = stream_through(skeleton, random_tokens(16), chosen=chosen(skeleton))
    with pytest.raises(InputError, match="rounds to 0"):
        allocate(stream, Unstructured(Fraction(1, 200), "row"), "owl", SOLVER, lambda: None)


def test_a_block_that_stays_dense_has_no_part_in_the_range() -> None:
    blocks = [BlockStatistics(100, outliers=0.01 + 0.002 * number) for number in range(4)]
    alone, beside = (by_outliers(found, Fraction(7, 10)) for found in (blocks, [BlockStatistics(0), *blocks]))
    assert beside[1:] == pytest.approx(alone)
    assert max(alone) - min(alone) == pytest.approx(2 * float(REACH))


def test_a_share_of_nothing_is_refused_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path, tokenizer=False)
    skeleton = skeleton_of(tmp_path)
    monkeypatch.setattr("llmprune.pipeline.allocation.exact", lambda shares, *_: [Fraction(0)] * len(shares))
    stream = stream_through(skeleton, random_tokens(16), chosen=chosen(skeleton))
    with pytest.raises(InputError, match="--allocate owl gives a block 0 %, and that is nothing"):
        allocate(stream, Unstructured(Fraction(1, 2)), "owl", SOLVER, lambda: None)
