"""Calibration text with random tokens in it: the dense model's answer is known for any text, also for a spoilt one."""

from __future__ import annotations

import torch
from torch import Tensor


def with_noise(tokens: Tensor, share: float, vocabulary: int, seed: int = 0) -> Tensor:
    """Replace a share of the tokens by random ones, each drawn evenly from the whole vocabulary.

    A short calibration text holds few of a vocabulary's tokens, in few combinations, and layers that are fitted to it
    one after another learn its errors by heart: what they make up for is much less on other text. Random tokens show
    the layers inputs that they would not see otherwise, at no price: what the dense model makes of them is as good a
    target as any. In the text around them, every position has another past than in the text itself.

    Args:
        tokens: `(samples, length)`, int64.
        share: how many are replaced (fraction).
        vocabulary: number of token ids.
        seed: of the replacements.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens.shape, generator=generator) < share
    return torch.where(chosen, torch.randint(vocabulary, tokens.shape, generator=generator), tokens)
