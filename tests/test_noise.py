"""Noise: only tokens that the text does not hold, in the share that was said; same seed, same bytes."""

from __future__ import annotations

import pytest
import torch

from llmprune.noise import with_noise

VOCABULARY = 1000


def text(held: int) -> torch.Tensor:
    """A text that holds the first ids of the vocabulary."""
    return torch.randint(held, (64, 512), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("held", [10, 500, 1000])
@pytest.mark.parametrize("share", [0.0, 0.15, 1.0])
def test_the_share_of_replaced_tokens_falls_with_what_the_text_holds(share: float, held: int) -> None:
    tokens = text(held)
    noisy = with_noise(tokens, share, VOCABULARY)
    assert noisy.shape == tokens.shape
    assert float((noisy != tokens).double().mean()) == pytest.approx(share * (1 - held / VOCABULARY), abs=0.01)


def test_replacements_come_evenly_from_what_the_text_lacks() -> None:
    noisy = with_noise(text(500), 1.0, VOCABULARY)
    counts = noisy[noisy != text(500)].bincount(minlength=VOCABULARY)
    mean = float(counts[500:].double().mean())
    assert not counts[:500].any()
    assert float((counts[500:] - mean).square().mean()) == pytest.approx(mean, rel=0.3)


def test_the_seed_decides() -> None:
    first, again, other = (with_noise(text(100), 0.2, VOCABULARY, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
