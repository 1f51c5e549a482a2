"""Criteria of whole blocks against a search over all subsets."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from llmprune import InputError
from llmprune.pruning.blocks import BLOCK_CRITERIA, load_block_criterion
from llmprune.pruning.blocks.problem import BlockUse


def use_of(blocks: int, longest: int, seed: int) -> BlockUse:
    generator = torch.Generator().manual_seed(seed)
    errors = torch.rand(blocks, longest, generator=generator, dtype=torch.float64)
    for block in range(blocks):
        errors[block, max(blocks - block, 0) :] = math.inf
    errors[0] = math.inf
    return BlockUse(torch.rand(blocks, generator=generator, dtype=torch.float64), errors)


def runs_of(removed: tuple[int, ...]) -> list[list[int]]:
    runs: list[list[int]] = []
    for block in removed:
        if runs and runs[-1][-1] == block - 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("count", "longest"), [(1, 1), (2, 2), (3, 2), (4, 4), (6, 3)])
def test_repair_finds_the_least_sum_of_all_subsets(count: int, longest: int, seed: int) -> None:
    use = use_of(9, longest, seed)

    def total(removed: tuple[int, ...]) -> float:
        runs = runs_of(removed)
        if any(len(run) > longest for run in runs):
            return math.inf
        return sum(float(use.repaired[run[0], len(run) - 1]) for run in runs)

    found = load_block_criterion("repair").select(use, count)
    assert len(found) == count
    assert found == tuple(sorted(found))
    assert total(found) == pytest.approx(min(map(total, combinations(range(1, 9), count))))


def test_influence_removes_those_with_the_least_but_never_the_first() -> None:
    use = BlockUse(torch.tensor([0.0, 0.4, 0.1, 0.3, 0.2]), torch.empty(5, 1))
    assert load_block_criterion("influence").select(use, 2) == (2, 4)


@pytest.mark.parametrize("name", BLOCK_CRITERIA)
def test_criteria_have_no_options(name: str) -> None:
    with pytest.raises(InputError):
        load_block_criterion(name, {"alpha": "1"})
