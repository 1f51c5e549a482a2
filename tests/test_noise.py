"""Noise: the share of replaced tokens is what was said, all ids can come, same seed same bytes."""

from __future__ import annotations

import pytest
import torch

from llmprune.noise import with_noise

VOCABULARY = 1000
TOKENS = torch.randint(VOCABULARY, (64, 512), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("share", [0.0, 0.15, 1.0])
def test_the_share_of_replaced_tokens(share: float) -> None:
    noisy = with_noise(TOKENS, share, VOCABULARY)
    assert noisy.shape == TOKENS.shape
    assert float((noisy != TOKENS).double().mean()) == pytest.approx(share * (1 - 1 / VOCABULARY), abs=0.01)


def test_replacements_come_evenly_from_the_whole_vocabulary() -> None:
    counts = with_noise(TOKENS, 1.0, VOCABULARY).flatten().bincount(minlength=VOCABULARY)
    mean = TOKENS.numel() / VOCABULARY
    assert len(counts) == VOCABULARY
    assert float((counts - mean).square().mean()) == pytest.approx(mean, rel=0.2)


def test_the_seed_decides() -> None:
    first, again, other = (with_noise(TOKENS, 0.2, VOCABULARY, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
