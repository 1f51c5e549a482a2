"""Calibration text with random tokens in it: the dense model's answer is known for any text, also for a spoilt one."""

from __future__ import annotations

import torch
from torch import Tensor


def with_noise(tokens: Tensor, share: float, vocabulary: int, seed: int = 0) -> Tensor:
    """Replace a share of the tokens by random ones that the text does not hold.

    A short calibration text holds few of a large vocabulary's tokens, in few combinations, and layers that are fitted
    to it one after another learn its errors by heart: what they make up for is much less on other text. Foreign tokens
    show the layers inputs that they would not see otherwise, at no price: what the dense model makes of them is as good
    a target as any. Where a draw from the vocabulary gives a token that the text does hold, the text stays as it is; so
    a text that holds most of a small vocabulary is hardly changed.

    Args:
        tokens: `(samples, length)`, int64.
        share: how many are drawn anew (fraction).
        vocabulary: number of token ids.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens.shape, generator=generator) < share
    drawn = torch.randint(vocabulary, tokens.shape, generator=generator)
    held = torch.zeros(vocabulary, dtype=torch.bool)
    held[tokens] = True
    return torch.where(chosen & ~held[drawn], drawn, tokens)
