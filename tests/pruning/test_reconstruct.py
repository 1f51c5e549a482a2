"""What is left of a layer is the best that explicit regressions on stacked rows find, judged on held-out tokens."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from llmprune.pruning.criteria.reconstruct import DEFAULT_RIDGE, RIDGE_GRID, SCALE_FLOOR, Fit, on_support, reconstruct
from llmprune.pruning.problem import InputStats
from llmprune.pruning.statistics import HELD_OUT, ResidualTarget, RunningPair

WIDTH, OUT, KEPT = 12, 5, torch.tensor([0, 1, 3, 4, 6, 7, 9, 11])
Array = np.ndarray


def texts(tokens: int, seed: int, alike: float) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, what the stream behind the layer lacks, and a weight; the more alike, the more can be made up for."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, 4, generator=generator) @ torch.randn(4, WIDTH, generator=generator)
    X = alike * shared + torch.randn(tokens, WIDTH, generator=generator)
    E = 0.3 * X @ torch.randn(WIDTH, OUT, generator=generator) + torch.randn(tokens, OUT, generator=generator)
    return X, E, torch.randn(OUT, WIDTH, generator=generator)


def stats_of(X: Tensor, E: Tensor | None) -> InputStats:
    running = RunningPair(WIDTH, torch.device("cpu"))
    running.add(X, None if E is None else ResidualTarget(E, E))
    return running.result()


def scale_of(X: Array) -> Array:
    square = np.square(X).mean(0)
    return np.asarray(square + SCALE_FLOOR * square.mean())


def regression(X: Array, E: Array, W: Array, ridge: float, strength: float) -> Array:
    """argmin over W̃ on the kept inputs of ‖X_S W̃ᵀ − X Wᵀ − αE‖² / tokens + r Σ_j D_jj ‖W̃_j − W_j‖²."""
    kept, root = KEPT.numpy(), np.sqrt(ridge * scale_of(X))
    rows = np.concatenate([X[:, kept] / np.sqrt(len(X)), np.diag(root[kept])])
    right = np.concatenate([(X @ W.T + strength * E) / np.sqrt(len(X)), root[kept][:, None] * W.T[kept]])
    return np.asarray(np.linalg.lstsq(rows, right, rcond=None)[0].T)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(("tokens", "alike"), [(24, 0.1), (60, 1.0), (600, 3.0)])
def test_ridge_and_strength_do_best_on_held_out_tokens(tokens: int, alike: float, dense: bool) -> None:
    X, E, weight = texts(tokens, tokens, alike)
    fit = reconstruct(weight.double(), stats_of(X, E if dense else None), KEPT)
    x, e, w = (value.double().numpy() for value in (X, E if dense else 0 * E, weight))
    cut = tokens - int(HELD_OUT * tokens)

    def missed(ridge: float, strength: float) -> float:
        found = regression(x[:cut], e[:cut], w, ridge, strength)
        return float(np.square(x[cut:][:, KEPT.numpy()] @ found.T - x[cut:] @ w.T - e[cut:]).sum())

    strengths = np.linspace(0, 1, 401) if dense else [0.0]
    ridge, strength = min(itertools.product(RIDGE_GRID, strengths), key=lambda pair: missed(*pair))
    assert fit.ridge == ridge
    assert fit.strength == pytest.approx(strength, abs=3e-3)
    np.testing.assert_allclose(fit.weight, regression(x, e, w, ridge, fit.strength), rtol=1e-3, atol=1e-4)


def test_more_tokens_support_more_of_a_fit() -> None:
    ridges = [
        reconstruct(texts(n, 3, 2.0)[2].double(), stats_of(texts(n, 3, 2.0)[0], None), KEPT).ridge for n in (20, 4000)
    ]
    assert ridges[0] > ridges[1] == min(RIDGE_GRID)


def test_without_held_out_tokens_the_ridge_is_the_default() -> None:
    X, _, weight = texts(50, 0, 1.0)
    for stats in (InputStats(50, X.T @ X / 50), stats_of(X[:3], None)):
        assert reconstruct(weight.double(), stats, KEPT).ridge == DEFAULT_RIDGE


@pytest.mark.parametrize("strength", [0.0, 0.4])
def test_a_support_of_its_own_for_every_row(strength: float) -> None:
    X, E, weight = texts(200, 1, 1.0)
    stats, W = stats_of(X, E), weight.double()
    support = torch.rand(W.shape, generator=torch.Generator().manual_seed(2)) < 0.6
    rows = torch.tensor([0, 2, 3])
    found = on_support(W, stats, Fit(W[:, KEPT], 0.1, strength), W, support, rows)
    x, e, w = (value.double().numpy() for value in (X, E[:, rows], weight[rows]))
    root = np.sqrt(0.1 * scale_of(x))
    for row, target, error, keeps in zip(found.numpy(), w, e.T, support[rows].numpy(), strict=True):
        left = np.concatenate([x[:, keeps] / np.sqrt(len(x)), np.diag(root[keeps])])
        right = np.concatenate([(x @ target + strength * error) / np.sqrt(len(x)), root[keeps] * target[keeps]])
        np.testing.assert_allclose(row[keeps], np.linalg.lstsq(left, right, rcond=None)[0], rtol=1e-3, atol=1e-4)
        assert not row[~keeps].any()


def test_an_input_met_on_held_out_tokens_only_does_no_harm() -> None:
    X, E, weight = texts(40, 5, 1.0)
    X[:30, 0] = 0
    X[:, 1] = 0
    fit = reconstruct(weight.double(), stats_of(X * 1e3, E), KEPT)
    assert fit.retries == 0
    assert bool(torch.isfinite(fit.weight).all())
    assert torch.allclose(fit.weight[:, 1], weight.double()[:, 1])
