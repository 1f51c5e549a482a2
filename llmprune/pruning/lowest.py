"""Selection of the lowest scores: exact counts, ties by lower index."""

from __future__ import annotations

import torch
from torch import Tensor

FEW = 32
"""Up to so many comparisons a column, an insertion is faster than a selection."""


def lowest(score: Tensor, count: int | Tensor, dim: int = -1) -> Tensor:
    """Mask of the `count` lowest entries along `dim`; of equal scores the lower index comes first.

    Args:
        score: any shape, no NaN.
        count: between 0 and the size of `dim`; a tensor that broadcasts (size 1 along `dim`) gives every line its own.
        dim: the dimension to choose along.
    """
    if isinstance(count, Tensor):
        ordered = score.sort(dim=dim).values
        kth = ordered.gather(dim, (count - 1).clamp(min=0)).masked_fill(count == 0, -torch.inf)
        wanted = int(count.sum())
    elif count:
        kth = kth_lowest(score, count, dim)
        wanted = count * (score.numel() // score.shape[dim])
    else:
        return torch.zeros_like(score, dtype=torch.bool)
    mask = score <= kth
    if int(mask.sum()) == wanted:
        return mask
    below = score < kth
    ties = mask & ~below
    room = count - below.sum(dim, keepdim=True)
    return below | (ties & (ties.cumsum(dim) <= room))


def kth_lowest(score: Tensor, count: int, dim: int = -1) -> Tensor:
    """The `count`-th lowest entry along `dim`, which keeps size 1; fast for a short first dimension."""
    if dim == 0 and count * len(score) <= FEW:
        return _kth_row(score, count)
    return score.kthvalue(count, dim=dim, keepdim=True).values


def _kth_row(score: Tensor, count: int) -> Tensor:
    """The `count`-th lowest of a few rows, elementwise, by insertion: far faster than a selection per column."""
    lowest_rows: list[Tensor] = []
    for row in score:
        rising = row
        for at, held in enumerate(lowest_rows):
            lowest_rows[at], rising = torch.minimum(held, rising), torch.maximum(held, rising)
        if len(lowest_rows) < count:
            lowest_rows.append(rising)
    return lowest_rows[-1][None]
