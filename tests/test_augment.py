"""Noisy copies: the text itself stays as it is, the share of replaced tokens is what was said, same seed same bytes."""

from __future__ import annotations

import pytest
import torch
from helpers import random_tokens

from llmprune.augment import SHARE, with_noisy_copies

VOCABULARY = 50_000


@pytest.mark.parametrize("copies", [0, 1, 3])
def test_every_window_stands_behind_its_copies(copies: int) -> None:
    tokens = torch.randint(100, (6, 512))
    result = with_noisy_copies(tokens, copies, VOCABULARY)
    assert result.shape == (6 * (copies + 1), 512)
    assert torch.equal(result[copies :: copies + 1], tokens)


def test_the_share_of_replaced_tokens_and_where_they_come_from() -> None:
    tokens = torch.randint(100, (64, 512)) + 1000
    (copy, own) = with_noisy_copies(tokens, 1, VOCABULARY).view(64, 2, 512).unbind(1)
    replaced = (copy != own).double().mean()
    assert float(replaced) == pytest.approx(SHARE, abs=0.01)
    familiar = (copy[copy != own] >= 1000) & (copy[copy != own] < 1100)
    assert float(familiar.double().mean()) == pytest.approx(0.5, abs=0.03)
    assert int(copy.max()) < VOCABULARY


def test_copies_differ_and_the_seed_decides() -> None:
    tokens = random_tokens()
    first, again, other = (with_noisy_copies(tokens, 2, 100, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
