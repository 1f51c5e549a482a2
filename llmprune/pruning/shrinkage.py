"""Shrinkage of the statistics of few tokens towards those of many: experts that see little text of their own."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmprune.pruning.problem import InputStats


class QuarticSum:
    """The sum over tokens of `‖D x‖⁴`, with `D = diag(T)^(−½)`: the spread of single tokens around their Gram.

    Args:
        pooled: T, `(in, in)`.
    """

    def __init__(self, pooled: Tensor) -> None:
        self.value = 0.0
        self._inverse = _inverse_scale(pooled)

    def add(self, inputs: Tensor) -> None:
        """Add tokens `(tokens, in)`."""
        squares = (inputs.float() * self._inverse).square().sum(-1, dtype=torch.float64)
        self.value += float(squares.square().sum())


def pseudo_tokens(stats: InputStats, pooled: InputStats, quartic: float) -> int:
    """How many tokens the pooled Gram counts for beside an expert's own.

    With the n tokens x of an expert, their Gram S and the pooled Gram T, all on the scale on which `diag T = 1`, the
    estimate is `(n S + k T) / (n + k)`. Each token in turn is held out and predicted from the rest: with `P = x xᵀ`,

        `J(λ) = Σ ‖(1 − λ) S₋ₓ + λ T − P‖²`,  `S₋ₓ = (n S − P) / (n − 1)`,  `λ = k / (n − 1 + k)`.

    The minimum follows from `Σ (S − P) = 0`: with the variance of a single token `V = (Σ ‖x‖⁴ − n ‖S‖²) / (n − 1)`,

        `k = V / (‖S − T‖² − V / n)`.

    The denominator estimates how far the expert's true Gram is from the pooled one: `V / n` of the distance is noise.
    So k does not depend on n, many tokens outweigh it, and an expert of few tokens gets the pooled solution. It is the
    estimator of Ledoit and Wolf (2004), with another target than a multiple of the identity.

    Args:
        stats: of the n tokens.
        pooled: of the tokens of all experts.
        quartic: `Σ ‖D x‖⁴`, see `QuarticSum`.

    Returns:
        k, rounded, at most the number of pooled tokens; all of these where S and T cannot be told apart.
    """
    n, most = stats.tokens, pooled.tokens
    if n < 2:
        return most
    inverse = _inverse_scale(pooled.gram).double()
    own, target = ((inverse * part.gram.double()).mul_(inverse[:, None]) for part in (stats, pooled))
    variance = max(quartic - n * float(own.square().sum()), 0.0) / (n - 1)
    distance = float((own - target).square().sum()) - variance / n
    return min(round(variance / distance), most) if distance * most > variance else most


def shrunk(stats: InputStats, pooled: InputStats, quartic: float) -> InputStats:
    """The statistics of an expert with those of all tokens counted as `pseudo_tokens` more.

    Held-out tokens stay the expert's own: what is fitted with the help of all tokens is validated on these.

    Args:
        stats: of the expert's tokens.
        pooled: of all tokens, as they would be if they came to it.
        quartic: see `pseudo_tokens`.
    """
    count = pseudo_tokens(stats, pooled, quartic)
    if not count:
        return stats
    weight, tokens = count / (stats.tokens + count), stats.tokens + count

    def mean(own: Tensor | None, every: Tensor | None) -> Tensor | None:
        if stats.tokens == 0:
            return every
        return None if own is None or every is None else torch.lerp(own, every, weight)

    gram, cross, dense, zeros = (
        mean(getattr(stats, name), getattr(pooled, name)) for name in ("gram", "cross", "dense", "zero_fraction")
    )
    assert gram is not None
    held = (
        stats.held
        if cross is not None or stats.cross is None
        else replace(stats.held, cross=None)
        if stats.held
        else None
    )
    return replace(
        stats, tokens=tokens, gram=gram, cross=cross, dense=dense, zero_fraction=zeros, held=held, pooled=count
    )


def _inverse_scale(gram: Tensor) -> Tensor:
    """`diag(T)^(−½)`, 0 for inputs that are always zero, `(in,)`."""
    diagonal = gram.diagonal()
    return torch.where(diagonal > 0, diagonal.clamp(min=torch.finfo(diagonal.dtype).tiny).rsqrt(), 0.0)
