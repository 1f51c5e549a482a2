"""The stages around a method: nested steps, a refit that never hurts, an order of the inputs that the file undoes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from helpers import chosen, random_tokens, reload, save_tiny, skeleton_of, stream_through, whole_logits
from layer_problems import gram_of, group, weight_of
from torch import Tensor

from llmprune.pruning.layer_solver import LayerSolver, with_ridge
from llmprune.pruning.linalg import relative_error
from llmprune.pruning.methods import load_method
from llmprune.pruning.methods.magnitude import Magnitude
from llmprune.pruning.pattern import NM, Scope, SparsityPattern, parse_pattern
from llmprune.pruning.problem import GroupProblem, InputStats, LayerProblem, LayerSolution, Status
from llmprune.pruning.recipe import Recipe

WIDTH = 32
CLASSES = (torch.arange(WIDTH)[None],)


def problem(seed: int = 0) -> GroupProblem:
    return group(gram_of(WIDTH, seed).float(), weight_of(8, WIDTH, seed).float())


def missed(given: GroupProblem, solutions: list[LayerSolution], damping: float = 0.0) -> float:
    gram = given.stats.gram.double()
    stats = InputStats(1, gram + damping * gram.diagonal().mean() * torch.eye(len(gram)))
    pairs = zip(given.layers, solutions, strict=True)
    return sum(relative_error(old.weight.double(), new.weight.double(), stats) for old, new in pairs)


Solved = tuple[list[LayerSolution], Tensor | None]


def solve(
    solver: LayerSolver, given: GroupProblem, pattern: SparsityPattern, classes: tuple[Tensor, ...] = ()
) -> Solved:
    """The solutions of the layers, and the order of their inputs."""
    found = solver.solve(replace(given, classes=classes), pattern)
    return found.layers, found.order


@dataclass(frozen=True, slots=True)
class Spy:
    """Magnitude, but it remembers what it was given, and its masks."""

    scope: ClassVar[Scope] = "row"
    needs: ClassVar[frozenset[str]] = frozenset()

    given: list[Tensor] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)

    def solve(self, problem: GroupProblem, pattern: SparsityPattern) -> list[LayerSolution]:
        self.given.append(problem.layers[0].weight)
        solutions = Magnitude().solve(problem, pattern)
        self.masks.append(solutions[0].mask)
        return solutions


@pytest.mark.parametrize("spec", ["2:4", "50%", "6:8"])
def test_steps_are_nested_and_end_in_the_pattern(spec: str) -> None:
    pattern, spy = parse_pattern(spec, "row"), Spy()
    solutions, _ = solve(LayerSolver(spy, Recipe("magnitude", steps=3, refit=True)), problem(), pattern)
    assert len(spy.masks) == len(pattern.steps(3)) > 1
    assert all(bool((after <= before).all()) for before, after in zip(spy.masks, spy.masks[1:], strict=False))
    assert pattern.check(solutions[0].weight).violations == 0


def test_between_steps_the_weights_are_the_best_on_their_mask() -> None:
    """Those of the last step are left to the method, unless a refit is asked for."""
    spy, pattern, whole = Spy(), parse_pattern("60%", "row"), with_ridge(problem(), 1.0)
    (solution,), _ = solve(LayerSolver(spy, Recipe("magnitude", steps=3)), whole, pattern)
    gram, target = whole.stats.gram.double(), whole.layers[0].weight.double()
    A = gram + 0.01 * gram.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64)
    for weight, mask in zip(spy.given[1:], spy.masks, strict=False):
        for new, old, kept in zip(weight.double(), target, mask, strict=True):
            best = torch.linalg.solve(A[kept][:, kept], (A @ old)[kept])
            torch.testing.assert_close(new[kept], best, rtol=1e-2, atol=1e-2 * float(old.abs().max()))
            assert not new[~kept].any()
    assert torch.equal(solution.weight, spy.given[-1] * spy.masks[-1])


LAWS = ["2:4", "4:8", "50%", "70%"]


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("spec", LAWS)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "admm"])
def test_a_refit_never_raises_the_error_and_keeps_the_mask(method: str, spec: str, ridge: float) -> None:
    pattern = parse_pattern(spec, "row")
    for seed in range(5):
        given = with_ridge(problem(seed), ridge)
        plain, _ = solve(LayerSolver(load_method(method), Recipe(method)), given, pattern)
        fitted, _ = solve(LayerSolver(load_method(method), Recipe(method, refit=True)), given, pattern)
        assert torch.equal(plain[0].mask, fitted[0].mask)
        assert missed(given, fitted, 0.01) <= missed(given, plain, 0.01) * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize("ridge", [0.1, 1.0])
def test_a_ridge_is_noise_of_its_own_on_every_input(ridge: float) -> None:
    """With a refit, every row is ridge regression on its mask, here by plain least squares on stacked rows."""
    given = problem()
    (solution,), _ = solve(LayerSolver(load_method("wanda"), Recipe("wanda", ridge=ridge, refit=True)), given, NM(2, 4))
    gram = given.stats.gram.double()
    damping = 0.01 * (1 + ridge) * gram.diagonal().mean()  # the refit's own
    rows = [torch.linalg.cholesky(gram).T, (ridge * gram.diagonal() + damping).sqrt().diag()]
    stacked = torch.cat(rows)
    for old, new, mask in zip(given.layers[0].weight.double(), solution.weight.double(), solution.mask, strict=True):
        best = torch.linalg.lstsq(stacked[:, mask], stacked @ old).solution
        torch.testing.assert_close(new[mask], best, rtol=1e-2, atol=1e-2 * float(old.abs().max()))


def test_no_ridge_changes_nothing() -> None:
    given = problem()
    assert with_ridge(given, 0.0) is given


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "admm"])
def test_an_order_of_the_inputs_holds_the_pattern_and_lowers_the_error(method: str) -> None:
    solver, errors = LayerSolver(load_method(method), Recipe(method, permute=True)), []
    for seed in range(10):
        given = problem(seed)
        plain, nothing = solve(solver, given, NM(2, 4))
        moved, order = solve(solver, given, NM(2, 4), CLASSES)
        assert nothing is None
        assert order is not None
        assert NM(2, 4).check(moved[0].weight[:, order]).violations == 0
        assert bool((moved[0].weight[~moved[0].mask] == 0).all())
        errors.append(missed(given, moved) / missed(given, plain))
    assert sum(errors) / len(errors) < 0.97


def test_inputs_that_stay_where_they_are_are_not_called_permuted() -> None:
    solver = LayerSolver(load_method("wanda"), Recipe("wanda", permute=True))
    alone = tuple(torch.tensor([[number]]) for number in range(WIDTH))
    (solution,), order = solve(solver, problem(), NM(2, 4), alone)
    assert order is None
    assert "permuted" not in solution.stats


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("spec", LAWS)
def test_no_stage_of_admm_raises_the_loss(spec: str, ridge: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the projection to its two steps of conjugate gradients to the refit."""
    for seed in range(5):
        given, losses = with_ridge(problem(seed), ridge), []
        for steps, more in ((0, False), (1, False), (2, False), (2, True)):
            monkeypatch.setattr("llmprune.pruning.methods.admm.POLISH_STEPS", steps)
            found, _ = solve(
                LayerSolver(load_method("admm"), Recipe("admm", refit=more)), given, parse_pattern(spec, "row")
            )
            losses.append(missed(given, found, 0.01))
        assert all(after <= before * (1 + 1e-6) for before, after in pairwise(losses)), losses
        assert losses[-1] < losses[0]


def test_scales_move_with_their_inputs() -> None:
    given = problem()
    (solution,), order = solve(
        LayerSolver(load_method("scaling"), Recipe("scaling", permute=True)), given, NM(2, 4), CLASSES
    )
    assert order is not None
    assert given.stats.scale is not None
    score = (given.layers[0].weight.abs() * given.stats.scale.abs().float())[:, order].view(8, -1, 4)
    kept = solution.mask[:, order].view(8, -1, 4)
    assert bool((score.masked_fill(~kept, torch.inf).amin(2) >= score.masked_fill(kept, 0).amax(2)).all())


def test_unstructured_patterns_need_no_order() -> None:
    solver = LayerSolver(load_method("wanda"), Recipe("wanda", permute=True))
    assert solve(solver, problem(), parse_pattern("50%", "row"), CLASSES)[1] is None


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3", "opt", "gpt_neox", "falcon", "qwen2"])
def test_what_is_written_in_a_new_order_computes_what_the_stream_computed(model_type: str, tmp_path: Path) -> None:
    save_tiny(model_type, tmp_path, tokenizer=False)
    skeleton, tokens = skeleton_of(tmp_path), random_tokens()
    stream = stream_through(skeleton, tokens, batch_tokens=48, chosen=chosen(skeleton), dense_stream=True, permute=True)
    solver = LayerSolver(load_method("sparsegpt"), Recipe("sparsegpt", targets="dense", permute=True))
    plain, moved = reload(tmp_path), 0
    for block in stream:
        sinks = []
        for one in stream.groups(block):
            solution = solver.solve(one.problem, NM(2, 4))
            order = solution.order
            one.write(solution.layers, order)
            if order is not None and not torch.equal(order, torch.arange(len(order))):
                sinks.append(f"{one.refs[0].name}.weight")
        before = {name: block.changed[name] for name in sinks}
        list(block.export())
        moved += sum(not torch.equal(before[name], block.changed[name]) for name in sinks)
        for name, tensor in block.changed.items():
            plain.get_parameter(name).data.copy_(tensor)
        for ref in block.layers.values():
            stored = block.changed[f"{ref.name}.weight"]
            assert NM(2, 4).check(stored.T if ref.transposed else stored).violations == 0
    assert moved
    seen: list[Tensor] = []
    plain.get_submodule(skeleton.block_name(len(stream) - 1)).register_forward_hook(
        lambda _, args, output: seen.append(output if isinstance(output, Tensor) else output[0])
    )
    whole_logits(plain, tokens)
    hidden = torch.cat([batch.hidden for batch in stream.inputs.batches])
    assert torch.allclose(torch.cat(seen), hidden, rtol=1e-3, atol=1e-4)


def test_early_steps_that_would_prune_nothing_are_left_out() -> None:
    spy = Spy()
    given = problem()
    pattern = parse_pattern("0.4%", "layer")
    solutions, _ = solve(LayerSolver(spy, Recipe("magnitude", steps=5)), given, pattern)
    assert len(spy.masks) < 5
    assert pattern.check(solutions[0].weight).violations == 0
    plain, _ = solve(LayerSolver(load_method("admm"), Recipe("admm", steps=5)), given, pattern)
    assert pattern.check(plain[0].weight).violations == 0


@pytest.mark.parametrize(
    ("recipe", "figure"), [({"targets": "dense"}, "target_retries"), ({"permute": True}, "order_retries")]
)
def test_dampings_that_stages_around_a_method_had_to_raise_are_told(recipe: dict[str, object], figure: str) -> None:
    """A Gram that is not positive definite, as only rounding can make it; wanda alone needs no factor of it."""
    gram = torch.eye(16)
    gram[3, 9] = gram[9, 3] = 1.5
    held = InputStats(20, gram, cross=torch.eye(16))
    stats = InputStats(80, gram, cross=torch.eye(16), dense=torch.eye(16), held=held)
    problem = GroupProblem((LayerProblem("layer", weight_of(4, 16).float()),), stats)
    solver = LayerSolver(load_method("wanda"), Recipe("wanda", **recipe))  # type: ignore[arg-type]
    (solution,), _ = solve(solver, problem, NM(2, 4), (torch.arange(16)[None],))
    assert solution.stats[figure] >= 1
    assert solution.status is Status.DAMPING_RAISED
    (plain,), _ = solve(LayerSolver(load_method("wanda"), Recipe("wanda")), problem, NM(2, 4))
    assert plain.status is Status.OK
    assert figure not in plain.stats
