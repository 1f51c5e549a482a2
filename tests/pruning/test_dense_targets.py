"""The correction towards dense outputs is the ridge regression's, as strong as held-out tokens say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from llmprune.pruning.dense_targets import TARGET_DAMPING, DenseTarget, dense_targets
from llmprune.pruning.linalg import relative_error
from llmprune.pruning.problem import GroupProblem, LayerProblem
from llmprune.pruning.statistics import RunningPair

WIDTH = 12


def pair(tokens: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Dense inputs, pruned inputs that are a linear image of them plus noise, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(tokens, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator)
    image = torch.eye(WIDTH) + 0.2 * torch.randn(WIDTH, WIDTH, generator=generator)
    pruned = dense @ image + noise * torch.randn(tokens, WIDTH, generator=generator)
    return dense, pruned, torch.randn(5, WIDTH, generator=generator)


def problem_of(dense: Tensor, pruned: Tensor, *weights: Tensor) -> GroupProblem:
    running = RunningPair(WIDTH, torch.device("cpu"))
    running.add(pruned, dense)
    layers = tuple(LayerProblem(f"l{number}", weight) for number, weight in enumerate(weights))
    return GroupProblem(layers, running.result())


def correction(dense: Tensor, pruned: Tensor, weight: Tensor) -> np.ndarray:
    """argmin over Δ of ‖X_p(W + Δ)ᵀ − X_d Wᵀ‖² / tokens + λ‖Δ‖², by least squares on stacked rows."""
    X, Y, W = (value.double().numpy() for value in (pruned, dense, weight))
    ridge = TARGET_DAMPING * (X * X).mean()
    rows = np.concatenate([X / np.sqrt(len(X)), np.sqrt(ridge) * np.eye(WIDTH)])
    right = np.concatenate([(Y - X) @ W.T / np.sqrt(len(X)), np.zeros((WIDTH, len(W)))])
    return np.asarray(np.linalg.lstsq(rows, right, rcond=None)[0].T)


@pytest.mark.parametrize("noise", [0.1, 1.0, 3.0])
def test_the_correction_is_ridge_regression_with_the_best_strength_on_held_out_tokens(noise: float) -> None:
    dense, pruned, weight = pair(80, noise)
    goal = dense_targets(problem_of(dense, pruned, weight))
    (strength,) = goal.strengths
    trial = correction(dense[:60], pruned[:60], weight)
    X, Y = pruned[60:].double().numpy(), dense[60:].double().numpy()

    def missed(alpha: float) -> float:
        return float(np.square(X @ (weight.numpy() + alpha * trial).T - Y @ weight.numpy().T).sum())

    best = min(np.linspace(0, 1, 2001), key=missed)
    assert strength == pytest.approx(best, abs=2e-3)
    expected = weight.numpy() + strength * correction(dense, pruned, weight)
    np.testing.assert_allclose(goal.problem.layers[0].weight, expected, rtol=1e-3, atol=1e-4)


def test_the_correction_lowers_the_error_on_new_tokens() -> None:
    dense, pruned, weight = pair(400, 0.3)
    goal = dense_targets(problem_of(dense[:200], pruned[:200], weight))
    unseen = problem_of(dense[200:], pruned[200:], weight).stats
    assert relative_error(weight, goal.problem.layers[0].weight, unseen) < 0.5 * relative_error(weight, weight, unseen)


def test_what_cannot_be_learnt_is_left_alone() -> None:
    """With as many tokens as inputs, the regression fits noise: it must not make things worse on new tokens."""
    worse = []
    for seed in range(20):
        dense, _, weight = pair(400, 0.0, seed)
        noisy = dense + 2 * torch.randn(dense.shape, generator=torch.Generator().manual_seed(seed))
        goal = dense_targets(problem_of(dense[:16], noisy[:16], weight))
        unseen = problem_of(dense[16:], noisy[16:], weight).stats
        worse.append(
            relative_error(weight, goal.problem.layers[0].weight, unseen) / relative_error(weight, weight, unseen)
        )
    assert np.mean(worse) < 1.02


def test_each_layer_has_its_own_strength() -> None:
    dense, pruned, weight = pair(80, 1.0)
    other = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(5))
    goal = dense_targets(problem_of(dense, pruned, weight, other))
    for layer, strength, alone in zip(goal.problem.layers, goal.strengths, (weight, other), strict=True):
        single = dense_targets(problem_of(dense, pruned, alone))
        assert strength == pytest.approx(single.strengths[0], rel=1e-4)
        assert torch.allclose(layer.weight, single.problem.layers[0].weight, rtol=1e-4, atol=1e-5)


def test_zeros_of_the_source_stay_zero() -> None:
    dense, pruned, weight = pair(80, 0.3)
    weight[:, 3] = 0
    goal = dense_targets(problem_of(dense, pruned, weight))
    assert bool((goal.problem.layers[0].weight[:, 3] == 0).all())


def test_without_a_pair_nothing_changes() -> None:
    dense, pruned, weight = pair(80, 0.3)
    running = RunningPair(WIDTH, torch.device("cpu"))
    running.add(pruned, None)
    problem = GroupProblem((LayerProblem("l", weight),), running.result())
    assert dense_targets(problem) == DenseTarget(problem, (0.0,))
    equal = problem_of(dense, dense, weight)
    assert dense_targets(equal).strengths == (0.0,)
