"""Few tokens lean on many: as far as leaving one out at a time says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmprune.pruning.problem import InputStats
from llmprune.pruning.shrinkage import QuarticSum, pseudo_tokens, shrunk
from llmprune.pruning.statistics import excluding

WIDTH, EVERY = 6, 4000


def drawn(tokens: int, seed: int, spread: float = 1.0) -> Tensor:
    """Tokens of a kind of text: of different sizes, some inputs large, correlated."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) * torch.logspace(0, 2, WIDTH)
    generator.manual_seed(1000 + seed)
    return spread * torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64) @ mixing


def stats_of(rows: Tensor) -> InputStats:
    return InputStats(len(rows), rows.T @ rows / max(len(rows), 1))


def quartic_of(rows: Tensor, pooled: InputStats) -> float:
    total = QuarticSum(pooled.gram.float())
    for part in rows.split(7):
        total.add(part)
    return total.value


def left_out_loss(rows: Tensor, pooled: Tensor, weight: float) -> float:
    """The loss J of the docstring, token by token."""
    scale = pooled.diagonal().rsqrt()
    rows, pooled = rows * scale, scale * pooled * scale[:, None]
    rest = torch.stack([torch.cat([rows[:at], rows[at + 1 :]]) for at in range(len(rows))])
    estimates = (1 - weight) * rest.mT @ rest / (len(rows) - 1) + weight * pooled
    return float((estimates - rows[:, :, None] * rows[:, None]).square().sum())


@pytest.mark.parametrize("tokens", [2, 5, 30])
def test_the_pseudo_tokens_minimise_the_loss_on_tokens_left_out(tokens: int) -> None:
    pooled = stats_of(torch.cat([drawn(EVERY // 4, seed) for seed in range(4)]))
    rows = drawn(tokens, 1)
    count = pseudo_tokens(stats_of(rows), pooled, quartic_of(rows, pooled))
    grid = torch.linspace(0, 1, 501, dtype=torch.float64)
    best = float(grid[torch.tensor([left_out_loss(rows, pooled.gram, float(w)) for w in grid]).argmin()])
    assert 0 < count <= pooled.tokens
    assert count / (tokens - 1 + count) == pytest.approx(best, abs=0.5 / (tokens - 1 + count) + 2e-3)


def test_many_tokens_outweigh_the_pooled_ones_and_few_do_not() -> None:
    pooled = stats_of(torch.cat([drawn(EVERY // 4, seed) for seed in range(4)]))
    weights = []
    for tokens in (3, 30, 300, 3000):
        rows = drawn(tokens, 1)
        weights.append(pseudo_tokens(stats_of(rows), pooled, quartic_of(rows, pooled)) / tokens)
    assert weights == sorted(weights, reverse=True)
    assert weights[0] > 1 > 0.05 > weights[-1]


def test_an_expert_like_all_others_gets_the_pooled_gram() -> None:
    rows = drawn(EVERY, 1)
    pooled = stats_of(rows)
    count = pseudo_tokens(stats_of(rows[:20]), pooled, quartic_of(rows[:20], pooled))
    assert count > 200


@pytest.mark.parametrize("tokens", [0, 1])
def test_an_unseen_expert_gets_the_pooled_statistics(tokens: int) -> None:
    pooled, rows = stats_of(drawn(EVERY, 1)), drawn(tokens, 2)
    found = shrunk(stats_of(rows), pooled, quartic_of(rows, pooled))
    assert found.tokens - found.pooled == tokens
    assert found.pooled == EVERY
    expected = (rows.T @ rows + EVERY * pooled.gram) / (EVERY + tokens)
    assert torch.allclose(found.gram, expected, rtol=1e-6)


def test_what_is_held_out_stays_the_experts_own_and_the_rest_has_the_pooled_tokens() -> None:
    rows, dense, every = drawn(40, 1), drawn(40, 3), drawn(EVERY, 2)
    cut = 30
    own = InputStats(
        40, rows.T @ rows / 40, rows.T @ dense / 40,
        dense.T @ dense / 40,
        InputStats(10, rows[cut:].T @ rows[cut:] / 10, rows[cut:].T @ dense[cut:] / 10),
    )  # fmt: skip
    pooled = InputStats(EVERY, every.T @ every / EVERY, every.T @ every / EVERY, every.T @ every / EVERY)
    found = shrunk(own, pooled, quartic_of(rows, pooled))
    count = found.pooled
    assert found.held is own.held
    assert found.held is not None
    rest = excluding(found, found.held)
    assert rest.tokens == cut + count
    for value, mine, other in ((rest.gram, rows, rows), (rest.cross, rows, dense)):
        expected = (mine[:cut].T @ other[:cut] + count * pooled.gram) / (cut + count)
        assert torch.allclose(value, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    every, rows = drawn(EVERY, 2), drawn(9, 1)
    every[:, 2] = rows[:, 2] = 0
    pooled = stats_of(every)
    found = shrunk(stats_of(rows), pooled, quartic_of(rows, pooled))
    assert bool(torch.isfinite(found.gram).all())
    assert bool((found.gram[2] == 0).all())
