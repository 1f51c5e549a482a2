"""An order never loses, moves only what may move, and comes close to the best partition of all."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from llmprune.pruning.linalg import relative_error
from llmprune.pruning.methods import load_method
from llmprune.pruning.pattern import NM
from llmprune.pruning.permutation import SALIENCY_DAMPING, SWEEPS, choose, saliency
from llmprune.pruning.problem import GroupProblem, InputStats, LayerProblem

PATTERNS = [NM(2, 4), NM(1, 4), NM(3, 4), NM(4, 8), NM(1, 2), NM(2, 3)]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)


def score_of(rows: int, width: int, seed: int = 0) -> Tensor:
    """Squared weights times squares of inputs of uneven scale."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(width, generator=generator).mul(0.7).exp()
    return (torch.randn(rows, width, generator=generator) * scale).square()


def free(width: int) -> list[Tensor]:
    return [torch.arange(width)[None]]


def heads(groups: int, copies: int, width: int) -> list[Tensor]:
    """One class for every value head, shared by `copies` query heads."""
    return list(torch.arange(groups * copies * width).view(groups, copies, width))


def assert_lawful(order: Tensor, score: Tensor, classes: list[Tensor], pattern: NM) -> None:
    """A permutation within the classes, the same for all copies, that keeps no less."""
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(score.shape[1]))
    movable = torch.zeros(score.shape[1], dtype=torch.bool)
    for slots in classes:
        movable[slots.flatten()] = True
        inverse = {at: column for column, at in enumerate(slots[0].tolist())}
        moved = [inverse[at] for at in order[slots[0]].tolist()]
        assert torch.equal(order[slots], slots[:, moved])
    assert torch.equal(order[~movable], torch.arange(score.shape[1])[~movable])
    assert retained(score[:, order].float(), pattern) >= retained(score.float(), pattern) * (1 - 1e-12)


def retained(score: Tensor, pattern: NM) -> float:
    """What the pattern keeps of the scores, group by group."""
    total = 0.0
    for row in score.double().tolist():
        for start in range(0, len(row), pattern.m):
            total += sum(sorted(row[start : start + pattern.m])[pattern.n :])
    return total


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("chunk", [1, 3, 512])
@every_pattern
def test_an_order_is_lawful_and_keeps_more(pattern: NM, chunk: int, seed: int) -> None:
    score = score_of(16, 48, seed)
    order = choose(score, pattern, free(48), chunk=chunk)
    assert_lawful(order, score, free(48), pattern)
    assert retained(score[:, order], pattern) > retained(score, pattern)


@pytest.mark.parametrize(("groups", "copies"), [(4, 1), (2, 2), (1, 4), (3, 3)])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8)], ids=lambda p: p.name)
def test_heads_stay_apart_and_copies_together(pattern: NM, groups: int, copies: int) -> None:
    classes = heads(groups, copies, 16)
    score = score_of(10, groups * copies * 16)
    order = choose(score, pattern, classes)
    assert_lawful(order, score, classes, pattern)
    assert retained(score[:, order], pattern) > retained(score, pattern)


def test_a_class_scattered_over_whole_groups_moves_and_the_others_stay() -> None:
    slots = torch.tensor([[17, 2, 16, 0, 1, 18, 3, 19]])
    score = score_of(8, 24, 3)
    order = choose(score, NM(2, 4), [slots])
    assert_lawful(order, score, [slots], NM(2, 4))
    assert set(order[[0, 1, 2, 3]].tolist()) != {0, 1, 2, 3}


@pytest.mark.parametrize(
    "slots",
    [
        torch.arange(12).view(2, 6),
        torch.arange(1, 9)[None],
        torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 12, 13, 10, 11, 14, 15]]),
        torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7]]),
        torch.arange(10)[None],
        torch.arange(4)[None],
    ],
    ids=["straddling heads", "off the groups", "copies cut differently", "shared groups", "indivisible", "one group"],
)
def test_a_class_that_the_groups_do_not_fit_keeps_its_order(slots: Tensor) -> None:
    assert torch.equal(choose(score_of(6, 16), NM(2, 4), [slots]), torch.arange(16))


@pytest.mark.parametrize("score", [torch.zeros(4, 16), torch.ones(4, 16)], ids=["zeros", "ones"])
def test_nothing_to_gain_is_the_identity(score: Tensor) -> None:
    assert torch.equal(choose(score, NM(2, 4), free(16)), torch.arange(16))


def test_an_order_that_is_the_best_already_stays() -> None:
    score = torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(1, 4)
    assert torch.equal(choose(score, NM(2, 4), free(16)), torch.arange(16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_float_dtype_will_do(dtype: torch.dtype) -> None:
    score = score_of(12, 32).to(dtype)
    assert_lawful(choose(score, NM(2, 4), free(32)), score, free(32), NM(2, 4))


@every_pattern
def test_a_sweep_more_never_keeps_less(pattern: NM) -> None:
    score = score_of(12, 48, 7)
    kept = [retained(score[:, choose(score, pattern, free(48), sweeps=n, chunk=5)], pattern) for n in range(6)]
    assert all(after >= before * (1 - 1e-12) for before, after in pairwise(kept))


def test_same_score_same_order_and_nothing_is_touched() -> None:
    score = score_of(20, 64)
    before, state = score.clone(), torch.get_rng_state()
    assert torch.equal(choose(score, NM(2, 4), free(64)), choose(score, NM(2, 4), free(64)))
    assert torch.equal(score, before)
    assert torch.equal(torch.get_rng_state(), state)


def partitions(items: tuple[int, ...], size: int) -> Iterator[list[tuple[int, ...]]]:
    """All ways to cut the items into groups."""
    if not items:
        yield []
        return
    for rest in combinations(items[1:], size - 1):
        left = tuple(item for item in items[1:] if item not in rest)
        for others in partitions(left, size):
            yield [(items[0], *rest), *others]


@pytest.mark.parametrize(
    ("pattern", "width", "first", "share", "hits"),
    [(NM(2, 4), 8, 0.80, 0.89, 0.69), (NM(1, 3), 9, 0.88, 0.99, 0.93), (NM(2, 4), 12, 0.83, 0.96, 0.44)],
    ids=["2:4 of 8", "1:3 of 9", "2:4 of 12"],
)
def test_an_order_comes_close_to_the_best_partition(
    pattern: NM, width: int, first: float, share: float, hits: float
) -> None:
    """Over 60 problems of 6 rows: the share of the possible gain that is reached, and how often all of it.

    Measured: shares of 0.802, 0.882, 0.834 with the default sweeps, and 0.897, 0.998, 0.963 with 16, which hit the best
    partition in shares of 0.700, 0.933, 0.450 of the problems; the figures may not get worse.
    """
    ways = [[at for group in way for at in group] for way in partitions(tuple(range(width)), pattern.m)]
    gains, hit = [], []
    for seed in range(60):
        score = score_of(6, width, seed)
        kept = score[:, ways].double().view(6, len(ways), -1, pattern.m)
        best = float(kept.sort(-1).values[..., pattern.n :].sum((0, 2, 3)).max())
        start = retained(score, pattern)
        orders = [choose(score, pattern, free(width), sweeps=sweeps) for sweeps in (SWEEPS, 16)]
        reached = [retained(score[:, order], pattern) for order in orders]
        assert start * (1 - 1e-12) <= reached[0] <= reached[1] * (1 + 1e-12) <= best * (1 + 2e-12)
        gains.append([(total - start) / max(best - start, 1e-12) for total in reached])
        hit.append(reached[1] >= best * (1 - 1e-9))
    assert np.mean(gains, axis=0)[0] > first
    assert np.mean(gains, axis=0)[1] > share
    assert np.mean(hit) > hits


def gram_of(width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    scale = torch.randn(width, generator=generator, dtype=torch.float64).mul(0.7).exp()
    X = torch.randn(4 * width, width, generator=generator, dtype=torch.float64) @ mixing * scale
    return X.T @ X / len(X)


def test_saliency_lies_between_wanda_and_obs() -> None:
    gram, weight = gram_of(12, 0), score_of(5, 12).sqrt().double()
    H = gram.numpy()
    inverse = np.linalg.inv(H + SALIENCY_DAMPING * np.diag(H).mean() * np.eye(12)).diagonal()
    wanda, obs = weight.numpy() ** 2 * H.diagonal(), weight.numpy() ** 2 / inverse
    np.testing.assert_allclose(saliency(weight, gram)[0], np.sqrt(wanda * obs), rtol=1e-9)


def test_inputs_that_are_always_zero_are_worth_nothing() -> None:
    gram = gram_of(8, 0)
    gram[3], gram[:, 3] = 0, 0
    worth = saliency(torch.ones(2, 8, dtype=torch.float64), gram)[0]
    assert not worth[:, 3].any()
    assert (worth[:, [0, 1, 2, 4, 5, 6, 7]] > 0).all()
    assert torch.equal(choose(saliency(torch.ones(2, 8), torch.zeros(8, 8))[0], NM(2, 4), free(8)), torch.arange(8))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_layers_lose_less_in_the_order_that_is_chosen(method: str) -> None:
    ratios = []
    for seed in range(8):
        gram = gram_of(64, seed).float()
        weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))
        order = choose(saliency(weight, gram)[0], NM(2, 4), free(64))
        error = []
        for at in (torch.arange(64), order):
            problem = GroupProblem((LayerProblem("layer", weight[:, at]),), InputStats(100, gram[at][:, at]))
            (solution,) = load_method(method).solve(problem, NM(2, 4))
            error.append(relative_error(weight[:, at], solution.weight, InputStats(1, gram[at][:, at])))
        ratios.append(error[1] / error[0])
    assert max(ratios) < 1
    assert np.mean(ratios) < 0.9
