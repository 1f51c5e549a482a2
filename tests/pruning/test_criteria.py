"""Every criterion is what its formula says: by brute force, a slow reference, or scikit-learn on the design matrix."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmprune.errors import NumericalError
from llmprune.pruning.criteria import CRITERIA, Criterion, load_criterion
from llmprune.pruning.criteria.lasso import JITTER_RETRIES, Lasso, _path, _solve, at_count, design_gram
from llmprune.pruning.criteria.obs import OBS, Search
from llmprune.pruning.criteria.problem import RemovalProblem
from llmprune.pruning.criteria.reconstruct import DEFAULT_RIDGE, RIDGE_GRID, SCALE_FLOOR, least_squares, reconstruct
from llmprune.pruning.linalg import ridge_of
from llmprune.pruning.problem import GroupProblem, InputStats, LayerProblem, LayerSolution, Status, UnitRemoval
from llmprune.pruning.recipe import Recipe
from llmprune.pruning.statistics import EXACT, RunningGram, RunningPair, ZeroCounter
from llmprune.pruning.structured_solver import StructuredSolver

DAMPING = OBS().damping


def remove(
    criterion: Criterion, problem: GroupProblem, units: Tensor, count: int, **recipe: Any
) -> tuple[LayerSolution, Tensor]:
    """The solution of a layer that loses inputs, and the kept inputs."""
    solver = StructuredSolver(criterion, Recipe("", **recipe))
    found = solver.solve(replace(problem, removal=UnitRemoval(units, count)), None)
    assert found.order is not None
    return found.layers[0], found.order


GRAM_ONLY = [name for name in CRITERIA if name not in {"scaling", "apoz"}]
SHAPES = {"channels": (1, 12, 1), "heads": (1, 4, 3), "query heads": (2, 3, 2)}


def inputs_of(width: int, seed: int, tokens: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(width, dtype=torch.float64)
    mixing = mixing + 0.8 * torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    scale = torch.randn(width, generator=generator, dtype=torch.float64).mul(0.5).exp()
    return torch.randn(tokens or 4 * width, width, generator=generator, dtype=torch.float64) @ mixing * scale


def problem_of(shape: tuple[int, int, int] = (1, 12, 1), seed: int = 0, rows: int = 5) -> RemovalProblem:
    width = shape[0] * shape[1] * shape[2]
    X = inputs_of(width, seed)
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)
    return RemovalProblem(weight, X.T @ X / len(X), torch.arange(width).view(shape))


def damped(problem: RemovalProblem) -> Tensor:
    eye = torch.eye(len(problem.gram), dtype=torch.float64)
    return problem.gram + ridge_of(problem.gram, DAMPING) * eye


def ridged(problem: RemovalProblem, ridge: float = DEFAULT_RIDGE) -> Tensor:
    scale = problem.gram.diagonal()
    return problem.gram + ridge * torch.diag(scale + SCALE_FLOOR * scale.mean())


def refitted(problem: RemovalProblem, kept: Tensor, matrix: Tensor | None = None) -> Tensor:
    """The best weights, one row at a time by numpy."""
    A = (damped(problem) if matrix is None else matrix).numpy()
    at = kept.numpy()
    weight = np.zeros(problem.weight.shape)
    for row, target in zip(weight, problem.weight.numpy(), strict=True):
        row[at] = np.linalg.solve(A[np.ix_(at, at)], (A @ target)[at])
    return torch.from_numpy(weight)


def loss(problem: RemovalProblem, kept: Tensor) -> float:
    change = refitted(problem, kept) - problem.weight
    return float((change @ damped(problem) * change).sum())


def all_choices(problem: RemovalProblem, count: int) -> list[Tensor]:
    """Every way to remove `count` units of every pool."""
    pools, units, _ = problem.units.shape
    choices = [torch.zeros(0, units, dtype=torch.bool)]
    for _ in range(pools):
        rows = []
        for going in combinations(range(units), count):
            row = torch.zeros(1, units, dtype=torch.bool)
            row[0, list(going)] = True
            rows.append(row)
        choices = [torch.cat([choice, row]) for choice in choices for row in rows]
    return choices


@pytest.mark.parametrize("name", CRITERIA)
def test_an_entry_resolves_and_has_one_line_of_help(name: str) -> None:
    module, attribute = CRITERIA[name].target.split(":")
    assert type(load_criterion(name)) is getattr(import_module(module), attribute)
    assert 0 < len(CRITERIA[name].help) < 100


def test_the_table_is_read_without_torch() -> None:
    code = "import sys, llmprune.pruning.criteria; raise SystemExit('torch' in sys.modules or 'sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", GRAM_ONLY)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_exactly_so_many_go_from_every_pool(name: str, shape: tuple[int, int, int]) -> None:
    for count in range(1, shape[1]):
        problem = problem_of(shape, seed=count)
        removed = load_criterion(name).select(problem, count).removed
        assert removed.shape == shape[:2]
        assert (removed.sum(1) == count).all()
        assert len(problem.kept(removed)) == problem.weight.shape[1] - count * shape[0] * shape[2]


@pytest.mark.parametrize("seed", range(3))
def test_least_squares_is_the_optimum_row_by_row(seed: int) -> None:
    problem = problem_of(seed=seed)
    kept = torch.tensor([0, 2, 3, 7, 8, 11])
    weight, retries = least_squares(problem.weight, problem.gram, kept)
    assert retries == 0
    assert torch.allclose(weight, refitted(problem, kept, ridged(problem))[:, kept], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_greedy_removal_is_greedy_by_brute_force(shape: tuple[int, int, int]) -> None:
    """Each unit that goes is the one whose absence, with the rest fitted anew, costs least; pools fill up."""
    count = max(shape[1] // 2, 1)
    for seed in range(3):
        problem = problem_of(shape, seed)
        removed = torch.zeros(shape[:2], dtype=torch.bool)
        for _ in range(count * shape[0]):
            options = []
            for pool, unit in (~removed & (removed.sum(1, keepdim=True) < count)).nonzero().tolist():
                trial = removed.clone()
                trial[pool, unit] = True
                options.append((loss(problem, problem.kept(trial)), pool, unit))
            _, pool, unit = min(options)
            removed[pool, unit] = True
        search = Search(problem, DAMPING)
        added = search.remove(count, count if shape[2] > 1 or shape[0] > 1 else 1)
        assert torch.equal(search.removed, removed)
        kept = problem.kept(removed)
        assert added == pytest.approx(loss(problem, kept), rel=1e-9)
        assert torch.allclose(search.weight, refitted(problem, kept), rtol=1e-8, atol=1e-10)
        inverse = torch.linalg.inv(damped(problem)[kept][:, kept])
        assert torch.allclose(search.inverse[kept][:, kept], inverse, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("count", [2, 4, 6])
@pytest.mark.parametrize("seed", range(4))
def test_obs_is_near_the_best_of_all_subsets(seed: int, count: int) -> None:
    problem = problem_of(seed=seed)
    losses = sorted(loss(problem, problem.kept(choice)) for choice in all_choices(problem, count))
    found = loss(problem, problem.kept(OBS().select(problem, count).removed))
    assert found <= 1.1 * losses[0]


@pytest.mark.parametrize("seed", range(4))
def test_swaps_never_do_harm_and_end_where_no_swap_helps(seed: int) -> None:
    problem = problem_of(seed=seed)
    plain = OBS(swaps=0).select(problem, 5).removed
    swapped = OBS(swaps=64).select(problem, 5).removed
    assert loss(problem, problem.kept(swapped)) <= loss(problem, problem.kept(plain)) + 1e-12


def test_a_swap_finds_the_way_back_from_a_bad_choice() -> None:
    problem = problem_of(seed=1)
    search = Search(problem, DAMPING)
    worst = torch.tensor([loss(problem, problem.kept(choice)) for choice in all_choices(problem, 1)]).topk(4).indices
    search._drop(worst[None])  # four channels that are dear
    before = loss(problem, problem.kept(search.removed))
    while search.swap(1):
        after = loss(problem, problem.kept(search.removed))
        assert after < before
        before = after
    best = min(loss(problem, problem.kept(choice)) for choice in all_choices(problem, 4))
    assert before <= 1.1 * best
    assert torch.allclose(search.weight, refitted(problem, problem.kept(search.removed)), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("count", [44, 60, 72])
@pytest.mark.parametrize("factor", [1e-9, 1e-3, 1.0, 1e3, 1e9])
def test_obs_removes_dead_inputs_first_whatever_the_unit_of_the_inputs(factor: float, count: int) -> None:
    """60 of 172 channels are always zero, with the largest weights of all."""
    problem = problem_of((1, 172, 1))
    dead = torch.randperm(172, generator=torch.Generator().manual_seed(1)) < 60
    live = (~dead).double()
    weight = torch.where(dead, 100.0, 1.0) * problem.weight
    gram = problem.gram * live * live[:, None]
    chosen = [OBS().select(replace(problem, weight=weight, gram=gram * c**2), count).removed[0] for c in (1.0, factor)]
    assert torch.equal(chosen[0], chosen[1])
    assert int((chosen[0] & dead).sum()) == min(count, 60)


@pytest.mark.parametrize("pools", [1, 2])
def test_obs_counts_only_the_live_inputs_of_a_head(pools: int) -> None:
    """What dead inputs are worth does not matter: the choice is that with their weights at zero."""
    problem = problem_of((pools, 4, 3))
    live = (torch.arange(12 * pools) % 4 != 0).double()
    dead = replace(problem, gram=problem.gram * live * live[:, None] * 1e-6)
    without = replace(dead, weight=dead.weight * live)
    assert torch.equal(OBS().select(dead, 2).removed, OBS().select(without, 2).removed)


@pytest.mark.parametrize("width", [96, 300])
def test_removing_blocks_at_a_time_is_nearly_as_good_as_one_by_one(width: int) -> None:
    problem = problem_of((1, width, 1), rows=32)
    losses = []
    for block in (1, width // 24):
        search = Search(problem, DAMPING)
        search.remove(width // 3, block)
        losses.append(loss(problem, problem.kept(search.removed)))
    assert losses[1] <= 1.02 * losses[0]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_lassos_gram_is_that_of_the_explicit_design(shape: tuple[int, int, int]) -> None:
    width = shape[0] * shape[1] * shape[2]
    X, problem = inputs_of(width, 3), problem_of(shape, 3)
    columns = [(X[:, unit] @ problem.weight[:, unit].T).flatten() for unit in problem.units.flatten(0, 1)]
    design = torch.stack(columns, 1) / len(X) ** 0.5
    assert torch.allclose(design_gram(problem), design.T @ design, rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_path_is_scikit_learns_on_the_explicit_design(seed: int) -> None:
    from sklearn.linear_model import lars_path, lars_path_gram

    X, problem = inputs_of(12, seed), problem_of(seed=seed)
    columns = [(X[:, at : at + 1] @ problem.weight[:, at : at + 1].T).flatten() for at in range(12)]
    design = torch.stack(columns, 1)
    target = (X @ problem.weight.T).flatten()
    _, _, explicit = lars_path(design.numpy(), target.numpy(), method="lasso")
    gram = design_gram(problem) * len(X)
    _, _, ours = lars_path_gram(gram.sum(1).numpy(), gram.numpy(), n_samples=design.shape[0], method="lasso")
    assert ours.shape == explicit.shape
    assert np.abs(ours - explicit).max() < 1e-10
    for count in (3, 6):
        removed = load_criterion("lasso").select(problem, count).removed
        at = next(step for step in range(explicit.shape[1]) if (explicit[:, step] != 0).sum() == 12 - count)
        assert (removed[0].numpy() == (explicit[:, at] == 0)).all()


@pytest.mark.parametrize("seed", range(4))
def test_coefficients_between_two_knots_are_scikit_learns_on_the_explicit_design(seed: int) -> None:
    from sklearn.linear_model import lars_path

    X, problem = inputs_of(12, seed), problem_of(seed=seed)
    design = torch.stack([(X[:, at : at + 1] @ problem.weight[:, at : at + 1].T).flatten() for at in range(12)], 1)
    target = (X @ problem.weight.T).flatten()
    alphas, _, path = lars_path(design.numpy(), target.numpy(), method="lasso")
    products = design_gram(problem)
    for at in range(len(alphas) - 1):
        alpha = (alphas[at] + alphas[at + 1]) / 2 * len(target) / len(X)
        found = _solve(products, products.sum(1), alpha, torch.ones(12, dtype=torch.float64), None)
        assert np.abs(found.beta.numpy() - (path[:, at] + path[:, at + 1]) / 2).max() < 1e-8


@pytest.mark.parametrize("seed", range(3))
def test_the_active_set_settles_for_any_right_hand_side(seed: int) -> None:
    """With alike columns and coefficients of both signs too: the conditions of the optimum hold."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(90, 60, generator=generator, dtype=torch.float64)
    mixed += 2 * torch.randn(90, 1, generator=generator, dtype=torch.float64)
    products, target = mixed.T @ mixed, mixed.T @ torch.randn(90, generator=generator, dtype=torch.float64)
    for share in (0.01, 0.1, 0.5):
        alpha = share * float(target.abs().max())
        found = _solve(products, target, alpha, torch.ones(60, dtype=torch.float64), None)
        pull = target - products @ found.beta
        assert torch.allclose(pull[found.signs != 0], alpha * found.signs[found.signs != 0], rtol=1e-6)
        assert float(pull.abs().max()) <= alpha * (1 + 1e-6)


@pytest.mark.parametrize("width", [200, 400])
def test_the_search_takes_the_set_of_the_path(width: int) -> None:
    problem = problem_of((1, width, 1), seed=5, rows=40)
    products = design_gram(problem)
    for kept in (width // 2, 3 * width // 4):
        score = at_count(products, products.sum(1), kept)
        path = _path(products, products.sum(1), kept)
        first = next(step for step in path if int((step != 0).sum()) >= kept)
        assert torch.equal(score.topk(kept).indices.sort().values, first.nonzero().flatten())


@pytest.mark.parametrize("shape", [(1, 24, 1), (1, 40, 1), (1, 16, 2), (2, 6, 3)], ids=str)
@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (2, 4), (8, 3)])
def test_the_lasso_chooses_where_few_tokens_leave_its_gram_without_full_rank(
    shape: tuple[int, int, int], tokens: int, rows: int
) -> None:
    width = math.prod(shape)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        X = torch.randn(tokens, width, generator=generator)
        weight = torch.randn(rows, width, generator=generator, dtype=torch.float64)
        problem = RemovalProblem(weight, X.T @ X / tokens, torch.arange(width).view(shape))
        for count in (shape[1] // 4, shape[1] // 2):
            assert (load_criterion("lasso").select(problem, count).removed.sum(1) == count).all()


def fail_to_factor(monkeypatch: pytest.MonkeyPatch, failures: Iterator[bool]) -> None:
    cholesky = torch.linalg.cholesky_ex

    def cholesky_or_not(matrix: Tensor) -> Any:
        lower, info = cholesky(matrix)
        return lower, torch.ones_like(info) if next(failures, False) else info

    monkeypatch.setattr("torch.linalg.cholesky_ex", cholesky_or_not)


@pytest.mark.parametrize("name", ["lasso", "obs"])
def test_a_choice_that_took_a_larger_diagonal_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the first two of them fail; the choice is that of the third."""
    given, raised = problem_of(), {"lasso": Lasso(jitter=1e-6), "obs": OBS(damping=1.0)}[name]
    problem = GroupProblem((LayerProblem("mlp.down", given.weight.float()),), InputStats(64, given.gram.float()))
    quiet, expected = remove(raised, problem, given.units, 5)
    failures = iter([True, True])
    if name == "lasso":

        def at_count_or_not(*args: Any) -> Tensor:
            if next(failures, False):
                raise NumericalError("does not settle", "")
            return at_count(*args)

        monkeypatch.setattr("llmprune.pruning.criteria.lasso.at_count", at_count_or_not)
    else:
        fail_to_factor(monkeypatch, failures)
    solution, kept = remove(load_criterion(name), problem, given.units, 5)
    assert torch.equal(kept, expected)
    assert (solution.status, solution.stats["choice_retries"]) == (Status.DAMPING_RAISED, 2.0)
    assert quiet.status is Status.OK
    assert "choice_retries" not in quiet.stats


def test_a_fit_between_two_steps_that_took_a_larger_ridge_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem_of()
    problem = GroupProblem((LayerProblem("mlp.down", given.weight.float()),), InputStats(64, given.gram.float()))
    fail_to_factor(monkeypatch, iter([True]))
    solution, _ = remove(load_criterion("wanda"), problem, given.units, 6, steps=2)
    assert solution.status is Status.DAMPING_RAISED
    assert solution.stats["choice_retries"] == 1.0
    assert "compensation_retries" not in solution.stats


def test_a_lasso_that_settles_with_no_jitter_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The jitter is raised tenfold each time, and so often, and no more."""
    tried = []

    def unsettled(products: Tensor, *_: object) -> Tensor:
        tried.append(float(products.diagonal().mean()) - 1)
        raise NumericalError("does not settle", "")

    monkeypatch.setattr("llmprune.pruning.criteria.lasso.at_count", unsettled)
    with pytest.raises(NumericalError, match="does not settle"):
        load_criterion("lasso").select(problem_of(), 3)
    assert tried == pytest.approx([1e-8 * 10**retries for retries in range(JITTER_RETRIES + 1)], rel=1e-6)


@pytest.mark.parametrize("count", [2, 4, 6])
def test_the_lasso_with_a_refit_is_among_the_best_of_all_subsets(count: int) -> None:
    ranks = []
    for seed in range(6):
        problem = problem_of(seed=seed)
        losses = sorted(loss(problem, problem.kept(choice)) for choice in all_choices(problem, count))
        found = loss(problem, problem.kept(load_criterion("lasso").select(problem, count).removed))
        ranks.append(np.searchsorted(losses, found * (1 - 1e-9)) / len(losses))
    assert np.mean(ranks) < 0.05


def test_simple_scores_by_hand() -> None:
    weight = torch.tensor([[3.0, 1.0, 2.0, 0.5], [4.0, 1.0, 0.0, 0.5]], dtype=torch.float64)
    gram = torch.diag(torch.tensor([0.01, 4.0, 1.0, 100.0], dtype=torch.float64))
    problem = RemovalProblem(
        weight, gram, torch.arange(4).view(1, 4, 1),
        scale=torch.tensor([0.5, -0.1, 2.0, -3.0]), zero_fraction=torch.tensor([0.2, 0.1, 0.9, 0.0]),
    )  # fmt: skip
    first = {name: int(load_criterion(name).select(problem, 1).removed[0].int().argmax()) for name in CRITERIA}
    assert first == {"magnitude": 3, "wanda": 0, "obd": 0, "obs": 2, "lasso": 0, "scaling": 1, "apoz": 2}


def test_obd_ranks_single_channels_as_wanda_does() -> None:
    problem = problem_of((1, 40, 1))
    assert torch.equal(
        load_criterion("obd").select(problem, 13).removed, load_criterion("wanda").select(problem, 13).removed
    )


def test_zeros_are_counted_exactly_where_they_are_a_real_share() -> None:
    rows = torch.tensor([[0.0, 1.0, -2.0], [0.0, 0.0, 3.0]])
    count = ZeroCounter(3, 0.1)
    count.add(rows)
    assert count.fraction(2).tolist() == [1.0, 0.5, 0.0]
    smooth = ZeroCounter(3, 0.1)
    smooth.add(rows + 0.01)
    assert smooth.fraction(2).tolist() == [1.0, 0.5, 0.0]


def unactivated() -> Tensor:
    """What comes before an activation: channels that differ in how often they are negative."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(500, 12, generator=generator) + torch.linspace(-1.5, 1.5, 12)


def test_behind_relu_the_share_is_that_of_exact_zeros() -> None:
    rows = unactivated().relu()
    count = ZeroCounter(12, 0.5)
    count.add(rows)
    assert torch.equal(count.fraction(500), (rows == 0).double().mean(0))


def test_a_few_saturated_entries_of_gelu_do_not_decide_how_zeros_are_counted() -> None:
    """They are exact zeros: alone they would leave all other channels with a count of none."""
    before = unactivated()
    before[:20, 7] = -9.0
    rows = torch.nn.functional.gelu(before)
    assert 0 < int((rows == 0).sum()) < EXACT * rows.numel()
    count = ZeroCounter(12, 0.05)
    count.add(rows)
    near = (rows.abs() <= count.limit).double().mean(0)
    assert torch.equal(count.fraction(500), near)
    assert len(near.unique()) > 6


@pytest.mark.parametrize("zeros", [0.0, 1.0])
def test_how_zeros_are_counted_is_decided_over_all_processes(zeros: float) -> None:
    """The other processes have a hundred times the entries, all of them zero or none."""
    for rows in (unactivated().relu(), unactivated()):
        count = ZeroCounter(12, 0.05, total=lambda own: [own[0] + zeros * 100 * own[1], 101 * own[1]])
        count.add(rows)
        expected = rows == 0 if zeros else rows.abs() <= count.limit
        assert torch.equal(count.fraction(500), expected.double().mean(0))


@pytest.mark.parametrize("kind", [RunningGram, RunningPair])
def test_a_tokens_weight_makes_its_inputs_no_quieter(kind: type[RunningGram | RunningPair]) -> None:
    rows = unactivated()
    count = ZeroCounter(12, 0.05)
    running = kind(12, rows.device, count)
    scale = torch.linspace(0.01, 10, 500)[:, None]
    if isinstance(running, RunningPair):
        running.add(rows, None, scale)
    else:
        running.add(rows, scale)
    assert count.limit == pytest.approx(0.05 * float(rows.square().mean()) ** 0.5)
    assert torch.equal(running.result().zero_fraction, (rows.abs() <= count.limit).double().mean(0))


def test_who_has_no_tokens_takes_part_in_the_sum_that_fixes_the_limit() -> None:
    """Else the other processes would wait for it."""
    asked = []

    def mean_square(rows: torch.Tensor) -> float:
        asked.append(rows.numel())
        return 4.0

    count = ZeroCounter(3, 0.1, mean_square)
    assert count.fraction(0).tolist() == [0.0, 0.0, 0.0]
    assert asked == [0]
    assert count.limit == pytest.approx(0.2)


def test_zeros_of_the_source_stay_zero() -> None:
    given = problem_of(rows=16)
    holes = torch.rand(given.weight.shape, generator=torch.Generator().manual_seed(3)) < 0.3
    weight = given.weight.masked_fill(holes, 0).float()
    problem = GroupProblem((LayerProblem("sink", weight),), InputStats(100, given.gram.float()))
    fitted, kept = remove(load_criterion("wanda"), problem, given.units, 5)
    bare, same = remove(load_criterion("wanda"), problem, given.units, 5, compensate=False)
    assert torch.equal(kept, same)
    assert not fitted.weight[holes].any()
    A = ridged(given).numpy()
    for row, source in zip(fitted.weight.double().numpy(), weight.double().numpy(), strict=True):
        at = [int(j) for j in kept if source[j] != 0]
        best = np.linalg.solve(A[np.ix_(at, at)], (A @ source)[at])
        assert np.abs(row[at] - best).max() < 1e-3
    assert not torch.equal(fitted.weight, bare.weight)


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
@pytest.mark.parametrize("compensate", [True, False])
def test_steps_are_nested_and_end_at_the_count(steps: int, compensate: bool) -> None:
    given = problem_of()
    problem = GroupProblem((LayerProblem("sink", given.weight.float()),), InputStats(100, given.gram.float()))
    solution, kept = remove(load_criterion("wanda"), problem, given.units, 5, steps=steps, compensate=compensate)
    assert len(kept) == 7
    assert torch.equal(solution.mask.all(0).nonzero().flatten(), kept)
    assert not solution.weight[:, ~solution.mask[0]].any()
    if not compensate:
        assert torch.equal(solution.weight[:, kept], problem.layers[0].weight[:, kept])


def test_a_singular_gram_raises_the_damping_and_says_so() -> None:
    """With a tiny negative eigenvalue, as float32 sums have them, the factor fails at first; it is no plain failure."""
    gram = torch.ones(8, 8, dtype=torch.float64) - 1e-3 * torch.eye(8, dtype=torch.float64)
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, retries = least_squares(weight, gram, torch.arange(6), ridge=1e-4)
    assert retries == 2
    assert bool(torch.isfinite(found).all())
    with pytest.raises(NumericalError, match="stay singular"):
        least_squares(weight, 5 * torch.ones_like(gram) - 4 * torch.eye(8), torch.arange(6), ridge=1e-9)


def test_a_ridge_that_had_to_be_raised_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out tokens would judge another ridge than it is said to be; with none left, the usual one is taken."""
    given = problem_of()
    gram = given.gram.float()
    stats = InputStats(64, gram, held=InputStats(16, gram))  # all alike: the least ridge fits best
    kept = torch.arange(given.weight.shape[1] - 5)
    assert reconstruct(given.weight, stats, kept).ridge == RIDGE_GRID[0]
    fail_to_factor(monkeypatch, iter([True, False] * len(RIDGE_GRID)))
    fit = reconstruct(given.weight, stats, kept)
    assert (fit.ridge, fit.retries) == (DEFAULT_RIDGE, 0)
