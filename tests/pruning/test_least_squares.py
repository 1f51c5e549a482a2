"""The refit is the least-squares solution on its support, by dense solves and by scipy; it never hurts."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from layer_problems import every_method, every_pattern, gram_of, group, weight_of, with_dead
from torch import Tensor

from llmprune.errors import NumericalError
from llmprune.pruning.least_squares import refit
from llmprune.pruning.methods import load_method
from llmprune.pruning.pattern import NM, Unstructured
from llmprune.pruning.problem import GroupProblem, LayerSolution, Status, masked

DAMPING = 0.01
HALF = Unstructured(Fraction(1, 2), "row")


def hessian(gram: Tensor, damping: float = DAMPING) -> np.ndarray:
    H = gram.double().numpy()
    return H + np.diag(damping * np.diag(H).mean() + (np.diag(H) == 0))


def objective(problem: GroupProblem, solutions: list[LayerSolution], damping: float = DAMPING) -> np.ndarray:
    """Damped error of every row of a group, float64."""
    A = hessian(problem.stats.gram, damping)
    rows = [(s.weight.double() - p.weight.double()).numpy() for s, p in zip(solutions, problem.layers, strict=True)]
    return np.concatenate([((D @ A) * D).sum(1) for D in rows])


def dense(weight: np.ndarray, mask: np.ndarray, A: np.ndarray) -> np.ndarray:
    """The exact optimum on a support, by one dense solve a row."""
    best = np.zeros_like(weight)
    for row, (target, kept) in enumerate(zip(weight, mask, strict=True)):
        best[row, kept] = np.linalg.solve(A[np.ix_(kept, kept)], (A @ target)[kept])
    return best


def random_support(weight: Tensor, share: float = 0.5, seed: int = 0) -> LayerSolution:
    return masked(weight, torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < share)


@every_method
@every_pattern
def test_any_methods_weights_become_the_best_on_their_mask(name: str, pattern: NM | Unstructured) -> None:
    problem = group(gram_of(40), *(weight_of(rows, 40, rows) for rows in (5, 12)))
    solutions = load_method(name).solve(problem, pattern)
    for layer, before, after in zip(
        problem.layers, solutions, refit(problem, solutions, iterations=200, tolerance=1e-12), strict=True
    ):
        assert torch.equal(after.mask, before.mask)
        assert (after.status, after.stats) == (before.status, before.stats)
        best = dense(layer.weight.numpy(), before.mask.numpy(), hessian(problem.stats.gram))
        np.testing.assert_allclose(after.weight.numpy(), best, rtol=1e-8, atol=1e-9)
        assert not after.weight[~after.mask].any()
        assert not torch.signbit(after.weight[~after.mask]).any()


@pytest.mark.parametrize("iterations", [1, 2, 3, 7])
def test_every_step_is_that_of_scipys_conjugate_gradients(iterations: int) -> None:
    weight = weight_of(9, 64)
    problem, start = group(gram_of(64), weight), random_support(weight)
    (solution,) = refit(problem, [start], iterations=iterations, tolerance=0)
    A = hessian(problem.stats.gram)
    for row in range(9):
        kept = start.mask[row].numpy()
        part = A[np.ix_(kept, kept)]
        found, _ = scipy.sparse.linalg.cg(
            part,
            (A @ weight[row].numpy())[kept],
            x0=start.weight[row].numpy()[kept],
            rtol=0,
            maxiter=iterations,
            M=np.diag(1 / np.diag(part)),
        )
        np.testing.assert_allclose(solution.weight[row].numpy()[kept], found, rtol=1e-9, atol=1e-11)


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tokens", [7, 200])
def test_the_objective_never_rises_and_more_steps_never_hurt(name: str, dtype: torch.dtype, tokens: int) -> None:
    problem = group(gram_of(64, tokens=tokens).to(dtype), weight_of(20, 64).to(dtype))
    slack = 1 + (1e-12 if dtype == torch.float64 else 1e-5)
    solutions = load_method(name).solve(problem, NM(2, 4))
    before = objective(problem, solutions)
    for iterations in (0, 1, 2, 4, 8, 16, 32, 64):
        after = objective(problem, refit(problem, solutions, iterations=iterations, tolerance=0))
        assert (after <= before * slack).all()
        before = after


@pytest.mark.parametrize("damping", [0.001, 0.03, 0.3])
@pytest.mark.parametrize("tokens", [5, 300])
def test_float32_reaches_the_optimum(damping: float, tokens: int) -> None:
    gram, weight = gram_of(160, tokens=tokens), weight_of(30, 160)
    start = random_support(weight.float())
    problem = group(gram.float(), weight.float())
    solutions = refit(problem, [start], damping, iterations=300, tolerance=1e-6)
    best = dense(weight.numpy(), start.mask.numpy(), hessian(gram, damping))
    D = best - weight.numpy()
    np.testing.assert_allclose(
        objective(problem, solutions, damping), ((D @ hessian(gram, damping)) * D).sum(1), rtol=2e-4
    )


def test_rows_do_not_know_of_each_other() -> None:
    gram = gram_of(64)
    weights = [weight_of(5, 64, 1), weight_of(3, 64, 2) * 1e-6, torch.zeros(2, 64, dtype=torch.float64)]
    starts = [random_support(weight, share) for weight, share in zip(weights, (0.5, 0.02, 0.5), strict=True)]
    together = refit(group(gram, *weights), starts)
    for weight, start, solution in zip(weights, starts, together, strict=True):
        (alone,) = refit(group(gram, weight), [start])
        torch.testing.assert_close(solution.weight, alone.weight, rtol=1e-10, atol=0)
    rows = [
        refit(group(gram, w[None]), [masked(w, m[None])])[0].weight
        for w, m in zip(weights[0], starts[0].mask, strict=True)
    ]
    torch.testing.assert_close(torch.cat(rows), together[0].weight, rtol=1e-10, atol=0)


def test_a_row_is_done_when_its_residual_is_small() -> None:
    weight = weight_of(20, 160)
    problem, start = group(gram_of(160), weight), random_support(weight)
    A = hessian(problem.stats.gram)
    scale, kept = np.diag(A) ** -0.5, start.mask.numpy()
    size = np.linalg.norm((weight.numpy() @ A) * scale * kept, axis=1)
    for tolerance in (1e-2, 1e-4):
        (solution,) = refit(problem, [start], iterations=500, tolerance=tolerance)
        residual = ((weight - solution.weight).numpy() @ A) * scale * kept
        reached = np.linalg.norm(residual, axis=1) / size
        assert (reached <= tolerance * (1 + 1e-6)).all()
        assert (reached > tolerance / 30).all()


def test_what_is_best_already_stays_as_it_is() -> None:
    weight = weight_of(9, 64).float()
    problem = group(gram_of(64).float(), weight)
    (once,) = refit(problem, [random_support(weight)], iterations=200)
    (twice,) = refit(problem, [once], iterations=200)
    assert torch.equal(once.weight, twice.weight)
    everything = masked(weight, torch.ones_like(weight, dtype=torch.bool))
    assert torch.equal(refit(problem, [everything])[0].weight, weight)


def test_weights_of_dead_inputs_keep_their_value() -> None:
    dead = [0, 3, 17, 39]
    weight = weight_of(12, 40).float()
    start = random_support(weight)
    (solution,) = refit(group(with_dead(40, dead), weight), [start])
    assert torch.equal(solution.weight[:, dead], start.weight[:, dead])
    assert not torch.equal(solution.weight, start.weight)
    (solution,) = refit(group(torch.zeros(40, 40), weight), [start])
    assert torch.equal(solution.weight, start.weight)


def test_without_tokens_nothing_changes() -> None:
    weight = weight_of(6, 16).float()
    start = LayerSolution(weight, torch.ones_like(weight, dtype=torch.bool), Status.NO_INPUT)
    assert refit(group(torch.zeros(16, 16), weight, tokens=0), [start]) == [start]


def test_same_bytes_and_nothing_it_was_given_changes() -> None:
    gram, weight = gram_of(64).float(), weight_of(300, 64).float()
    start = random_support(weight)
    before = gram.clone(), weight.clone(), start.weight.clone(), start.mask.clone()
    first, second = (refit(group(gram, weight), [start])[0].weight.numpy().tobytes() for _ in range(2))
    assert first == second
    assert all(map(torch.equal, before, (gram, weight, start.weight, start.mask)))


def test_an_indefinite_gram_gives_finite_weights_and_no_rise() -> None:
    gram = torch.eye(16)
    gram[3, 9] = gram[9, 3] = 1.5
    weight = weight_of(8, 16).float()
    start = random_support(weight, 0.9)
    problem = group(gram, weight)
    (solution,) = refit(problem, [start])
    assert torch.isfinite(solution.weight).all()
    assert (objective(problem, [solution]) <= objective(problem, [start]) + 1e-5).all()


def test_a_broken_gram_is_a_numerical_error() -> None:
    weight = weight_of(8, 16).float()
    gram = gram_of(16).float()
    gram[2, 2] = torch.nan
    with pytest.raises(NumericalError):
        refit(group(gram, weight), [random_support(weight)])
