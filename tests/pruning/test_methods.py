"""Every method gives exact masks; each is what its formula says, by a slow reference or by brute force."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from fractions import Fraction
from importlib import import_module

import numpy as np
import pytest
import torch
from layer_problems import (
    DAMPING,
    HALF,
    INFORMED,
    NMS,
    OPTIMA,
    SHARES,
    assert_lawful,
    block_quota,
    cut,
    every_method,
    every_pattern,
    gram_of,
    group,
    informed_method,
    keep_largest,
    norm_scale,
    quota,
    refits,
    slow_case,
    solve,
    weight_of,
    with_dead,
)
from torch import Tensor

from llmprune.pruning.linalg import relative_error
from llmprune.pruning.methods import METHODS, load_method
from llmprune.pruning.methods.sparsegpt import SparseGPT
from llmprune.pruning.pattern import NM, SparsityPattern, Unstructured
from llmprune.pruning.problem import InputStats, Status


@every_method
def test_entry_resolves_to_a_frozen_dataclass_with_one_line_of_help(name: str) -> None:
    entry = METHODS[name]
    module, attribute = entry.target.split(":")
    cls = getattr(import_module(module), attribute)
    assert type(load_method(name)) is cls
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    assert cls.__doc__
    assert cls.scope in ("row", "layer")
    assert entry.help.strip() == entry.help
    assert 0 < len(entry.help) < 100
    assert "\n" not in entry.help
    assert load_method(name) == load_method(name)


def test_an_unknown_method_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        load_method("nothing")


def test_the_table_is_read_without_torch() -> None:
    code = "import sys, llmprune.pruning.methods; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@every_method
@every_pattern
@pytest.mark.parametrize("width", [40, 160])
def test_masks_are_exact_and_pruned_weights_are_plus_zero(name: str, pattern: SparsityPattern, width: int) -> None:
    gram = gram_of(width).float()
    weights = [weight_of(rows, width, rows).float() for rows in (8, 3, 17)]
    for solution, weight in zip(load_method(name).solve(group(gram, *weights), pattern), weights, strict=True):
        assert_lawful(solution, weight)
        pruned = cut(~solution.mask, pattern)
        assert (pruned.sum(1) == quota(pattern, pruned.shape[1])).all()
        found = pattern.check(solution.weight)
        assert (found.violations, found.extra_zeros) == (0, 0)
        assert solution.status is Status.OK


@every_method
@pytest.mark.parametrize("scope", ["row", "layer"])
@pytest.mark.parametrize("share", [Fraction(1, 3), HALF, Fraction(617, 1000)], ids=str)
@pytest.mark.parametrize("shape", [(1, 9), (5, 131), (7, 257), (2, 300)], ids=str)
def test_counts_are_exact_at_any_width(name: str, shape: tuple[int, int], share: Fraction, scope: str) -> None:
    pattern = Unstructured(share, scope)
    weight = weight_of(*shape).float()
    solution = solve(name, gram_of(shape[1]).float(), weight, pattern)
    assert_lawful(solution, weight)
    pruned = cut(~solution.mask, pattern)
    assert (pruned.sum(1) == quota(pattern, pruned.shape[1])).all()


@every_method
@every_pattern
def test_layers_of_a_group_are_solved_as_if_alone(name: str, pattern: SparsityPattern) -> None:
    gram = gram_of(160)
    weights = [weight_of(rows, 160, rows) * scale for rows, scale in ((8, 1.0), (1, 20.0), (17, 0.1))]
    for together, weight in zip(load_method(name).solve(group(gram, *weights), pattern), weights, strict=True):
        alone = solve(name, gram, weight, pattern)
        assert torch.equal(together.mask, alone.mask)
        torch.testing.assert_close(together.weight, alone.weight, rtol=1e-9, atol=1e-9)


@every_method
@every_pattern
def test_same_problem_same_bytes_and_the_problem_is_left_alone(name: str, pattern: SparsityPattern) -> None:
    gram, weight = gram_of(160).float(), weight_of(9, 160).float()
    before = gram.clone(), weight.clone()
    first, second = (solve(name, gram, weight, pattern) for _ in range(2))
    assert torch.equal(first.mask, second.mask)
    assert first.weight.numpy().tobytes() == second.weight.numpy().tobytes()
    assert torch.equal(gram, before[0])
    assert torch.equal(weight, before[1])


@every_method
@every_pattern
@pytest.mark.parametrize("sparse", [0.1, 0.5, 0.95])
def test_zeros_of_the_source_stay_zero_and_fill_the_pattern_first(
    name: str, pattern: SparsityPattern, sparse: float
) -> None:
    weight = weight_of(12, 40).float()
    zeros = torch.rand(12, 40, generator=torch.Generator().manual_seed(5)) < sparse
    weight[zeros] = 0.0
    weight[:6][zeros[:6]] = -0.0
    solution = solve(name, gram_of(40).float(), weight, pattern)
    assert_lawful(solution, weight)
    assert not solution.mask[zeros].any()
    pruned, already = cut(~solution.mask, pattern).sum(1), cut(zeros, pattern)
    assert (pruned == np.maximum(already.sum(1), quota(pattern, already.shape[1]))).all()


@every_method
@pytest.mark.parametrize("scope", ["row", "layer"])
def test_zeros_of_the_source_fill_the_pattern_first_wherever_they_are(name: str, scope: str) -> None:
    weight = weight_of(6, 256).float()
    weight[:, :100] = 0.0
    pattern = Unstructured(HALF, scope)
    assert pattern.check(solve(name, gram_of(256).float(), weight, pattern).weight).extra_zeros == 0


@every_method
def test_a_layer_of_zeros_stays_one(name: str) -> None:
    for pattern in (NM(2, 4), *SHARES):
        solution = solve(name, gram_of(16).float(), torch.zeros(4, 16), pattern)
        assert_lawful(solution, solution.weight)
        assert not solution.mask.any()


@every_method
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(HALF, "row"), Unstructured(HALF, "layer")])
def test_equal_scores_go_by_lower_index(name: str, pattern: SparsityPattern) -> None:
    ones = torch.ones(3, 16)
    weight = ones / norm_scale(16) if name == "scaling" else ones
    found = solve(name, torch.eye(16), weight, pattern).mask
    assert torch.equal(found, keep_largest(weight * norm_scale(16) if name == "scaling" else ones, pattern))


@informed_method
@every_pattern
def test_dead_inputs_go_first(name: str, pattern: SparsityPattern) -> None:
    dead = [0, 1, 2, 9, 31, 39]
    weight = weight_of(12, 40).float()
    weight[:, dead] *= 1e3
    solution = solve(name, with_dead(40, dead), weight, pattern)
    assert_lawful(solution, weight)
    at_dead = torch.zeros(12, 40, dtype=torch.bool)
    at_dead[:, dead] = True
    kept, there = cut(solution.mask & at_dead, pattern), cut(at_dead, pattern)
    assert (kept.sum(1) == np.maximum(there.sum(1) - quota(pattern, there.shape[1]), 0)).all()
    assert pattern.check(solution.weight).extra_zeros == 0


@every_method
@every_pattern
@pytest.mark.parametrize("dead", [list(range(40)), list(range(8, 40)), list(range(0, 40, 2))], ids=len)
def test_kept_weights_of_dead_inputs_keep_their_value(name: str, pattern: SparsityPattern, dead: list[int]) -> None:
    weight = weight_of(12, 40).float()
    solution = solve(name, with_dead(40, dead), weight, pattern)
    assert_lawful(solution, weight)
    assert pattern.check(solution.weight).violations == 0
    kept = solution.mask[:, dead]
    assert torch.equal(solution.weight[:, dead][kept], weight[:, dead][kept])


@informed_method
def test_zeros_of_the_source_go_before_dead_inputs(name: str) -> None:
    weight = torch.tensor([[1.0, 0.0, 2.0, 0.0], [1.0, 0.0, 2.0, 3.0]])
    solution = solve(name, with_dead(4, [0]), weight, NM(2, 4))
    assert solution.mask.int().tolist() == [[1, 0, 1, 0], [0, 0, 1, 1]]


@every_method
@every_pattern
def test_without_tokens_magnitude_decides_and_weights_stay(name: str, pattern: SparsityPattern) -> None:
    gram, weights = torch.zeros(40, 40), [weight_of(rows, 40).float() for rows in (6, 9)]
    for solution, weight in zip(
        load_method(name).solve(group(gram, *weights, tokens=0), pattern), weights, strict=True
    ):
        assert_lawful(solution, weight)
        assert solution.status is (Status.NO_INPUT if name in INFORMED else Status.OK)
        score = weight.abs() * norm_scale(40) if name == "scaling" else weight.abs()
        assert torch.equal(solution.mask, keep_largest(score, pattern))
        assert torch.equal(solution.weight, weight * solution.mask)


@every_method
@every_pattern
def test_scaling_the_weights_scales_the_solution(name: str, pattern: SparsityPattern) -> None:
    gram, weight = gram_of(160).float(), weight_of(9, 160).float()
    solution = solve(name, gram, weight, pattern)
    for factor in (4.0, -0.125):
        scaled = solve(name, gram, weight * factor, pattern)
        assert torch.equal(scaled.mask, solution.mask)
        assert torch.equal(scaled.weight, solution.weight * factor)


@every_method
@every_pattern
def test_scaling_the_inputs_changes_nothing(name: str, pattern: SparsityPattern) -> None:
    gram, weight = gram_of(160).float(), weight_of(9, 160).float()
    solution, louder = solve(name, gram, weight, pattern), solve(name, gram * 16, weight, pattern)
    assert torch.equal(louder.mask, solution.mask)
    assert torch.equal(louder.weight, solution.weight)


@every_method
@every_pattern
def test_permuting_the_rows_permutes_the_solution(name: str, pattern: SparsityPattern) -> None:
    gram, weight = gram_of(160), weight_of(9, 160)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    solution, permuted = solve(name, gram, weight, pattern), solve(name, gram, weight[order], pattern)
    assert torch.equal(permuted.mask, solution.mask[order])
    torch.testing.assert_close(permuted.weight, solution.weight[order], rtol=1e-9, atol=1e-9)


@every_pattern
def test_magnitude_keeps_the_largest_weights(pattern: SparsityPattern) -> None:
    weight = weight_of(9, 160).float()
    solution = solve("magnitude", gram_of(160).float(), weight, pattern)
    assert torch.equal(solution.mask, keep_largest(weight.abs(), pattern))
    assert torch.equal(solution.weight, weight * solution.mask)


@every_pattern
def test_wanda_keeps_the_largest_weights_times_input_norms(pattern: SparsityPattern) -> None:
    X = torch.randn(300, 160, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3.0, 160)
    weight = weight_of(9, 160).float()
    solution = solve("wanda", X.T @ X / 300, weight, pattern)
    assert torch.equal(solution.mask, keep_largest(weight.abs() * X.norm(dim=0), pattern))
    assert torch.equal(solution.weight, weight * solution.mask)


def slow_obs(weight: Tensor, gram: Tensor, pattern: SparsityPattern, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """Optimal brain surgeon column by column, by explicit inversion of the Hessian of the columns that remain."""
    G, W = gram.double().numpy(), weight.double().numpy().copy()
    (rows, width), dead, zeros = W.shape, np.diag(G) == 0, W == 0
    H = G + np.diag(dead + damping * np.diag(G).mean())
    inverses = [np.linalg.inv(H[at:, at:]) for at in range(width)]
    block = pattern.m if isinstance(pattern, NM) else 128
    pruned = np.zeros_like(zeros)
    for start in range(0, width, block):
        columns = range(start, min(start + block, width))
        score = np.stack([W[:, at] ** 2 / inverses[at][0, 0] for at in columns], axis=1)
        score[:, dead[columns]] = -1.0
        score[zeros[:, columns]] = -np.inf
        layerwide = isinstance(pattern, Unstructured) and pattern.scope == "layer"
        counted = score.reshape(1, -1) if layerwide else score
        chosen = np.zeros_like(counted, dtype=bool)
        for line, scores in enumerate(counted):
            there = zeros if layerwide else zeros[[line]]
            count = pattern.n if isinstance(pattern, NM) else block_quota(pattern, there, start, columns.stop)
            chosen[line, scores.argsort(kind="stable")[:count]] = True
        pruned[:, columns] = chosen.reshape(rows, -1) | zeros[:, columns]
        for at in columns:
            inverse = inverses[at]
            W[:, at:] -= np.outer(W[:, at] * pruned[:, at] / inverse[0, 0], inverse[0])
            W[pruned[:, at], at] = 0.0
    return W, ~pruned


@slow_case
@pytest.mark.parametrize("damping", [0.01, 0.1])
def test_sparsegpt_is_optimal_brain_surgeon_along_the_columns(
    pattern: SparsityPattern, width: int, damping: float
) -> None:
    gram, weight = gram_of(width), weight_of(11, width)
    (solution,) = SparseGPT(damping).solve(group(gram, weight), pattern)
    expected, mask = slow_obs(weight, gram, pattern, damping)
    assert np.array_equal(solution.mask.numpy(), mask)
    np.testing.assert_allclose(solution.weight.numpy(), expected, rtol=1e-9, atol=1e-9)
    assert not torch.equal(solution.weight, weight * solution.mask)


@slow_case
def test_sparsegpt_is_the_same_surgeon_with_dead_inputs_and_zeros(pattern: SparsityPattern, width: int) -> None:
    gram, weight = gram_of(width), weight_of(11, width)
    dead = [1, width // 2, width - 1]
    gram[dead] = 0
    gram[:, dead] = 0
    weight[torch.rand(11, width, generator=torch.Generator().manual_seed(9)) < 0.2] = 0
    solution = solve("sparsegpt", gram, weight, pattern)
    expected, mask = slow_obs(weight, gram, pattern, DAMPING)
    assert np.array_equal(solution.mask.numpy(), mask)
    np.testing.assert_allclose(solution.weight.numpy(), expected, rtol=1e-9, atol=1e-9)


@slow_case
def test_float32_is_enough_for_sparsegpt(pattern: SparsityPattern, width: int) -> None:
    gram, weight = gram_of(width), weight_of(11, width)
    solution = solve("sparsegpt", gram.float(), weight.float(), pattern)
    expected, mask = slow_obs(weight, gram, pattern, DAMPING)
    assert (solution.mask.numpy() != mask).mean() < 1e-3
    error = relative_error(weight, solution.weight.double(), InputStats(1, gram))
    assert error == pytest.approx(relative_error(weight, torch.from_numpy(expected), InputStats(1, gram)), rel=1e-3)


def test_sparsegpt_of_unrelated_inputs_is_a_choice_without_compensation() -> None:
    diagonal = torch.linspace(0.1, 5.0, 96, dtype=torch.float64)
    weight = weight_of(7, 96)
    for pattern in (*NMS[:3], *SHARES):
        solution = solve("sparsegpt", diagonal.diag(), weight, pattern)
        score = weight.square() * (diagonal + DAMPING * diagonal.mean())
        assert torch.equal(solution.mask, keep_largest(score, pattern))
        assert torch.equal(solution.weight, weight * solution.mask)


def test_sparsegpt_is_optimal_if_all_it_prunes_comes_before_all_it_keeps() -> None:
    gram, weight = gram_of(12), weight_of(5, 12)
    weight[:, :6] *= 1e-3
    solution = solve("sparsegpt", gram, weight, Unstructured(HALF, "row"))
    A = gram + DAMPING * gram.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    assert not solution.mask[:, :6].any()
    expected = torch.linalg.solve(A[6:, 6:], (weight @ A)[:, 6:].T).T
    torch.testing.assert_close(solution.weight[:, 6:], expected, rtol=1e-9, atol=1e-12)


def test_sparsegpt_reports_its_damping_and_says_if_it_was_raised() -> None:
    solution = solve("sparsegpt", gram_of(16), weight_of(4, 16), NM(2, 4))
    assert solution.status is Status.OK
    assert solution.stats == {
        "damping_lambda": pytest.approx(DAMPING * float(gram_of(16).diagonal().mean())),
        "damping_retries": 0.0,
    }
    gram = torch.eye(16)
    gram[3, 9] = gram[9, 3] = 1.5
    raised = solve("sparsegpt", gram, weight_of(4, 16).float(), NM(2, 4))
    assert_lawful(raised, raised.weight)
    assert raised.status is Status.DAMPING_RAISED
    assert raised.stats == {"damping_lambda": pytest.approx(100 * DAMPING), "damping_retries": 2.0}


@pytest.mark.parametrize(("pattern", "supports", "ratio", "hits"), OPTIMA, ids=["2:4", "50%"])
def test_sparsegpt_stays_close_to_the_best_of_all_supports(
    pattern: SparsityPattern, supports: list[tuple[int, ...]], ratio: float, hits: float
) -> None:
    """Over 200 problems of 4 rows of width 8: mean of error / optimum, and how often the support is the best one.

    Measured 2.773 and 0.455 for 2:4, 3.524 and 0.374 for 50 %; the figures may not get worse.
    """
    ratios, hit = [], []
    for seed in range(200):
        gram, weight = gram_of(8, seed), weight_of(4, 8, seed)
        solution = solve("sparsegpt", gram, weight, pattern)
        A = (gram + DAMPING * gram.diagonal().mean() * torch.eye(8)).numpy()
        errors = refits(A, weight.numpy(), supports)
        D = (solution.weight - weight).numpy()
        reached = ((D @ A) * D).sum(1)
        chosen = [supports.index(tuple(row.nonzero().flatten().tolist())) for row in solution.mask]
        refit, best = errors[chosen, range(4)], errors.min(0)
        assert (reached >= refit * (1 - 1e-9)).all()
        assert (refit >= best).all()
        ratios.extend(reached / best)
        hit.extend(refit == best)
    assert np.mean(ratios) < ratio
    assert np.mean(hit) > hits


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(HALF, "row")], ids=["2:4", "50%"])
def test_sparsegpt_beats_wanda_beats_magnitude_on_average(pattern: SparsityPattern) -> None:
    def mean_error(name: str) -> float:
        problems = [(gram_of(64, seed).float(), weight_of(32, 64, seed).float()) for seed in range(10)]
        return float(
            np.mean([relative_error(w, solve(name, g, w, pattern).weight, InputStats(1, g)) for g, w in problems])
        )

    sparsegpt, wanda, magnitude = map(mean_error, ("sparsegpt", "wanda", "magnitude"))
    assert sparsegpt < wanda < magnitude
