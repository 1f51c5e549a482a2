"""More calibration text out of the same: the dense model's answer is known for any text, also for a spoilt one."""

from __future__ import annotations

import torch
from torch import Tensor

SHARE = 0.3


def with_noisy_copies(tokens: Tensor, copies: int, vocabulary: int, seed: int = 0) -> Tensor:
    """Put noisy copies of every window before it, in which `SHARE` of the tokens are replaced by random ones.

    A layer that is fitted to what the dense model gives learns the errors of a short calibration text by heart. A copy
    has other errors, but much the same inputs. Half of the replacements are drawn from the calibration
    text itself, so that common tokens stay common; half from the whole vocabulary, most of which no short text holds.

    Args:
        tokens: `(samples, length)`, int64.
        copies: how many of each window.
        vocabulary: number of token ids.
        seed: of the replacements.

    Returns:
        `(samples * (copies + 1), length)`, the copies of a window right before it.
    """
    generator = torch.Generator().manual_seed(seed)
    windows = []
    for _ in range(copies):
        familiar = tokens.flatten()[torch.randint(tokens.numel(), tokens.shape, generator=generator)]
        foreign = torch.randint(vocabulary, tokens.shape, generator=generator)
        chance = torch.rand(tokens.shape, generator=generator)
        windows.append(torch.where(chance < SHARE / 2, familiar, torch.where(chance < SHARE, foreign, tokens)))
    return torch.stack([*windows, tokens], dim=1).flatten(0, 1)
