"""The choice of experts and the refit of the others, against scores by hand and the joint normal equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmprune import InputError
from llmprune.pruning.experts import EXPERT_CRITERIA, load_expert_criterion, refit
from llmprune.pruning.experts.problem import Choice, ExpertUse, is_massive, super_experts
from llmprune.pruning.experts.refit import RefitProblem

EXPERTS, TOKENS, OUT, INNER, ACTIVE = 4, 300, 5, 6, 2


def use(**values: Any) -> ExpertUse:
    zeros = torch.zeros(6, dtype=torch.float64)
    fields = {"tokens": zeros + 1, "output": zeros, "largest": zeros, "massive": False}
    fields |= dict.fromkeys(("inputs", "columns"), zeros[:, None])
    return ExpertUse(**{**fields, "loss_without": lambda gone: zeros, **values})


def choice(count: int, groups: int = 1, guarded: tuple[int, ...] = ()) -> Choice:
    mask = torch.zeros(6, dtype=torch.bool)
    mask[list(guarded)] = True
    return Choice(count, groups, mask)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_reap_takes_the_mean_over_an_experts_own_tokens() -> None:
    found = use(tokens=doubles(1, 10, 5, 0, 2, 4), output=doubles(3, 5, 5, 0, 8, 8))
    kept = load_expert_criterion("reap").select(found, choice(3))
    assert kept.tolist() == [0, 4, 5]  # means 3, 0.5, 1, 0, 4, 2


def test_wanda_sums_products_of_norms_over_the_inputs() -> None:
    columns = torch.tensor([[1.0, 2], [3, 1], [5, 0], [1, 1], [0, 9], [2, 2]], dtype=torch.float64)
    inputs = torch.tensor([[2.0, 2], [1, 1], [0, 7], [9, 0], [3, 1], [1, 0]], dtype=torch.float64)
    kept = load_expert_criterion("wanda").select(use(columns=columns, inputs=inputs), choice(3))
    assert kept.tolist() == [0, 3, 4]  # 6, 4, 0, 9, 9, 2


def test_as_many_go_from_every_group_and_none_that_is_guarded() -> None:
    found = use(tokens=doubles(1, 2, 3, 4, 5, 6))
    frequency = load_expert_criterion("frequency")
    assert frequency.select(found, choice(2)).tolist() == [2, 3, 4, 5]
    assert frequency.select(found, choice(2, groups=2)).tolist() == [1, 2, 4, 5]
    assert frequency.select(found, choice(2, guarded=(0,))).tolist() == [0, 3, 4, 5]
    assert frequency.select(use(), choice(2)).tolist() == [2, 3, 4, 5]  # ties by lower index


def test_leave_one_out_takes_its_losses_anew() -> None:
    """Experts 0 and 1 stand in for each other: either may go, not both."""

    def loss(gone: Tensor) -> Tensor:
        values = doubles(1, 1, 5, 3, 9, 9)
        if gone[:2].any():
            values[:2] = 100
        return values.masked_fill(gone, torch.inf)

    assert load_expert_criterion("obs").select(use(loss_without=loss), choice(2)).tolist() == [1, 2, 4, 5]


def test_a_criterion_has_no_options() -> None:
    for name in EXPERT_CRITERIA:
        with pytest.raises(InputError, match="no option 'alpha'"):
            load_expert_criterion(name, {"alpha": "1"})


def test_super_experts_are_told_from_the_median_expert_of_a_massive_block() -> None:
    largest = doubles(1, 2, 3, 1, 2, 50)
    assert super_experts(use(largest=largest, massive=True)).nonzero().flatten().tolist() == [5]
    assert not super_experts(use(largest=largest)).any()
    assert not super_experts(use(largest=largest, massive=True, tokens=doubles(0, 0, 0, 0, 0, 0))).any()
    assert is_massive(2000, 1.0)
    assert not is_massive(500, 1.0)
    assert not is_massive(90, 0.001)


def mixture(seed: int = 0, noise: float = 0.0) -> tuple[RefitProblem, list[Tensor], list[Tensor]]:
    """A mixture with random routing, its target a linear map of the gated inputs, and noise."""
    generator = torch.Generator().manual_seed(seed)
    rows = [(torch.rand(TOKENS, generator=generator) < ACTIVE / EXPERTS).nonzero().flatten() for _ in range(EXPERTS)]
    inputs = [torch.randn(len(tokens), INNER, generator=generator) for tokens in rows]
    target = noise * torch.randn(TOKENS, OUT, generator=generator)
    for tokens, z in zip(rows, inputs, strict=True):
        target.index_add_(0, tokens, z @ torch.randn(INNER, OUT, generator=generator))
    held_out = torch.arange(TOKENS) >= TOKENS - 60
    problem = RefitProblem(EXPERTS, (OUT, INNER), lambda e: (rows[e], inputs[e]), target, held_out)
    return problem, rows, inputs


def test_the_sweeps_reach_the_joint_least_squares_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refit, "RIDGES", (0.3,))
    monkeypatch.setattr(refit, "SWEEPS", 200)
    problem, rows, inputs = mixture(noise=0.5)
    found = refit.refit(problem)
    wide = torch.zeros(TOKENS, EXPERTS * INNER, dtype=torch.float64)
    ridge = torch.zeros(EXPERTS * INNER, dtype=torch.float64)
    for expert, (tokens, z) in enumerate(zip(rows, inputs, strict=True)):
        columns = slice(expert * INNER, (expert + 1) * INNER)
        wide[tokens, columns] = z.double()
        diagonal = z.double().square().sum(0)
        ridge[columns] = 0.3 * (diagonal + refit.SCALE_FLOOR * diagonal.mean())
    joint = torch.linalg.solve(wide.T @ wide + ridge.diag(), wide.T @ problem.residual.double()).T
    assert torch.allclose(torch.cat(list(found.changes), 1).double(), joint, atol=1e-5)


def test_a_target_that_can_be_reached_is() -> None:
    problem, rows, inputs = mixture()
    found = refit.refit(problem)
    left = problem.residual.clone()
    for tokens, z, change in zip(rows, inputs, found.changes, strict=True):
        left.index_add_(0, tokens, z @ change.T, alpha=-1)
    assert found.ridge == min(refit.RIDGES)
    assert float(left.square().sum()) < 0.02 * float(problem.residual.square().sum())


def test_noise_is_not_fitted() -> None:
    problem, rows, inputs = mixture()
    noise = torch.randn(TOKENS, OUT, generator=torch.Generator().manual_seed(5))
    few = [tokens[:4] for tokens in rows]
    bare = RefitProblem(EXPERTS, (OUT, INNER), lambda e: (few[e], inputs[e][:4]), noise, problem.held_out)
    found = refit.refit(bare)
    assert found.ridge == torch.inf
    assert not any(change.any() for change in found.changes)


def test_an_expert_without_tokens_stays_as_it_is() -> None:
    problem, rows, inputs = mixture()
    empty = (rows[0][:0], inputs[0][:0])
    some = RefitProblem(
        EXPERTS, (OUT, INNER), lambda e: (rows[e], inputs[e]) if e else empty, problem.residual, problem.held_out
    )
    found = refit.refit(some)
    assert not found.changes[0].any()
    assert all(change.any() for change in found.changes[1:])
