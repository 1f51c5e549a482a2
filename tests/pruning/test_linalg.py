"""The factor is the factor of the inverse; the error is the error of the outputs."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from llmprune.errors import NumericalError
from llmprune.pruning.linalg import MAX_RETRIES, inverse_factor, output_energy, relative_error
from llmprune.pruning.problem import InputStats

DTYPES = [(torch.float64, 1e-9), (torch.float32, 2e-3)]
DAMPINGS = [0.001, 0.01, 0.1]


def inputs(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Correlated inputs of uneven scale, float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    scale = torch.randn(width, generator=generator, dtype=torch.float64).mul(0.7).exp()
    return torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mixing * scale


def gram_of(X: Tensor) -> Tensor:
    return X.T @ X / len(X)


def indefinite(lowest: float, width: int = 6) -> Tensor:
    """A "Gram" of unit diagonal whose smallest eigenvalue is `lowest`."""
    gram = torch.eye(width, dtype=torch.float64)
    gram[1, 4] = gram[4, 1] = 1 - lowest
    return gram


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("width", [1, 2, 13, 64, 200])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_factor_is_scipys_cholesky_of_the_inverse(
    width: int, damping: float, dtype: torch.dtype, tolerance: float
) -> None:
    gram = gram_of(inputs(3 * width, width)).to(dtype)
    factor = inverse_factor(gram, damping)
    H = gram.double().numpy()
    inverse = np.linalg.inv(H + damping * np.diag(H).mean() * np.eye(width))
    expected = scipy.linalg.cholesky(inverse, lower=False)
    assert factor.upper.dtype == dtype
    assert factor.retries == 0
    assert factor.ridge == pytest.approx(damping * np.diag(H).mean())
    U = factor.upper.double().numpy()
    np.testing.assert_allclose(U, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    np.testing.assert_allclose(U.T @ U, inverse, rtol=0, atol=tolerance * np.abs(inverse).max())


@pytest.mark.parametrize("width", [1, 5, 130])
def test_factor_is_upper_triangular_with_a_positive_diagonal(width: int) -> None:
    upper = inverse_factor(gram_of(inputs(2 * width, width)).float(), 0.01).upper
    assert torch.equal(upper, upper.triu())
    assert (upper.diagonal() > 0).all()
    assert torch.isfinite(upper).all()


def test_trailing_blocks_factor_the_inverse_of_the_trailing_gram() -> None:
    gram = gram_of(inputs(60, 20))
    factor = inverse_factor(gram, 0.01)
    H = (gram + factor.ridge * torch.eye(20, dtype=torch.float64)).numpy()
    for at in range(20):
        U = factor.upper[at:, at:].numpy()
        np.testing.assert_allclose(U.T @ U, np.linalg.inv(H[at:, at:]), rtol=1e-8, atol=1e-10)


def test_fewer_tokens_than_inputs_are_enough() -> None:
    gram = gram_of(inputs(5, 64)).float()
    factor = inverse_factor(gram, 0.01)
    H = gram.double() + factor.ridge * torch.eye(64)
    U = factor.upper.double()
    assert factor.retries == 0
    torch.testing.assert_close(U.T @ U @ H, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dead", [[0], [7], [2, 3, 5]])
def test_dead_inputs_are_apart_from_the_others(dead: list[int]) -> None:
    X = inputs(40, 8)
    X[:, dead] = 0
    factor = inverse_factor(gram_of(X), 0.01)
    mean = float(gram_of(X).diagonal().mean())
    assert factor.ridge == pytest.approx(0.01 * mean)
    H = gram_of(X).numpy() + factor.ridge * np.eye(8)
    H[dead, dead] += 1
    np.testing.assert_allclose(factor.upper.numpy(), scipy.linalg.cholesky(np.linalg.inv(H)), rtol=1e-9, atol=1e-12)
    alone = factor.upper.clone()
    alone.diagonal()[dead] = 0
    assert not alone[dead].any()
    assert not alone[:, dead].any()


def test_dead_inputs_do_not_change_the_factor_of_the_live_ones_but_through_the_mean() -> None:
    X = inputs(40, 6)
    padded = torch.cat([X, torch.zeros(40, 6, dtype=torch.float64)], dim=1)
    alive, both = inverse_factor(gram_of(X), 0.01), inverse_factor(gram_of(padded), 0.02)
    torch.testing.assert_close(both.upper[:6, :6], alive.upper, rtol=1e-12, atol=1e-12)


def test_all_inputs_dead_is_not_an_error() -> None:
    factor = inverse_factor(torch.zeros(4, 4), 0.01)
    assert torch.equal(factor.upper, torch.eye(4))
    assert (factor.ridge, factor.retries) == (0.0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("lowest", "retries"), [(0.0, 0), (-0.005, 0), (-0.05, 1), (-0.5, 2), (-5.0, 3)])
def test_damping_is_raised_just_as_often_as_needed_and_recorded(
    lowest: float, retries: int, dtype: torch.dtype
) -> None:
    gram = indefinite(lowest).to(dtype)
    factor = inverse_factor(gram, 0.01)
    assert factor.retries == retries <= MAX_RETRIES
    assert factor.ridge == pytest.approx(0.01 * 10**retries)
    H = gram.double() + factor.ridge * torch.eye(6)
    U = factor.upper.double()
    torch.testing.assert_close(U.T @ U, torch.linalg.inv(H), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(U / U[0, 0], torch.eye(6, dtype=torch.float64), atol=1e-2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [(0, 0), (3, 3), (1, 4), (0, 5)])
def test_a_broken_gram_is_a_numerical_error(value: float, at: tuple[int, int]) -> None:
    gram = indefinite(0.5, 64).float()
    gram[at] = gram[at[::-1]] = value
    with pytest.raises(NumericalError):
        inverse_factor(gram, 0.01)


def test_no_factor_after_the_last_raise_is_a_numerical_error_with_a_hint() -> None:
    with pytest.raises(NumericalError) as caught:
        inverse_factor(indefinite(-50.0), 0.01)
    assert "10" in caught.value.message
    assert "calibration" in caught.value.hint
    assert caught.value.exit_code == 1


def test_factor_leaves_the_gram_alone() -> None:
    gram = indefinite(-0.5)
    before = gram.clone()
    inverse_factor(gram, 0.01)
    assert torch.equal(gram, before)


@pytest.mark.parametrize("seed", range(5))
def test_relative_error_is_that_of_the_outputs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    X = inputs(50, 24, seed)
    W = torch.randn(10, 24, generator=generator, dtype=torch.float64)
    new = W * (torch.rand(10, 24, generator=generator) > 0.5)
    energy = (X @ W.T).square().sum() / len(X)
    error = (X @ (new - W).T).square().sum() / (X @ W.T).square().sum()
    assert output_energy(W, gram_of(X)) == pytest.approx(float(energy), rel=1e-12)
    assert relative_error(W, new, InputStats(1, gram_of(X))) == pytest.approx(float(error), rel=1e-12)
    single = relative_error(W.float(), new.float(), InputStats(1, gram_of(X).float()))
    assert single == pytest.approx(float(error), rel=1e-5)


def test_relative_error_is_zero_for_no_change_and_one_for_nothing_left() -> None:
    gram = gram_of(inputs(30, 12)).float()
    W = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    assert relative_error(W, W.clone(), InputStats(1, gram)) == 0.0
    assert relative_error(W, torch.zeros_like(W), InputStats(1, gram)) == 1.0


def test_relative_error_of_a_layer_without_output_is_zero() -> None:
    W = torch.ones(3, 4)
    assert relative_error(W, W * 0.5, InputStats(1, torch.zeros(4, 4))) == 0.0
    assert relative_error(torch.zeros(3, 4), torch.zeros(3, 4), InputStats(1, torch.eye(4))) == 0.0


def test_relative_error_is_never_negative() -> None:
    for seed in range(40):
        X = inputs(3, 64, seed)
        W, change = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        unseen = change - change @ torch.linalg.pinv(X) @ X
        assert relative_error(W.float(), (W + 0.1 * unseen).float(), InputStats(1, gram_of(X).float())) >= 0


def test_errors_are_pure() -> None:
    W, new, gram = torch.ones(3, 4), torch.zeros(3, 4), gram_of(inputs(9, 4)).float()
    before = W.clone(), new.clone(), gram.clone()
    relative_error(W, new, InputStats(1, gram))
    assert all(torch.equal(old, now) for old, now in zip(before, (W, new, gram), strict=True))
