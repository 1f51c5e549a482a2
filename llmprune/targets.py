"""What a layer should give: the dense model's outputs, as far as the calibration data support it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmprune.linalg import inverse_factor
from llmprune.problem import GroupProblem, InputStats

DAMPING = 0.1


def toward_dense(problem: GroupProblem, damping: float = DAMPING) -> tuple[GroupProblem, list[float]]:
    """Replace every weight by that of the regression on dense outputs, `W* = W + α Δ`, `Δ = M (H + λI)⁻¹`.

    M is what the outputs lack, times the inputs: `M = W (C − H)ᵀ` makes a layer give what it gives in the dense model.
    A layer that adds to the residual stream does better to make up for the error E that has come together there,
    `M = EᵀX / tokens`, as far as its inputs can tell.

    The full correction (α = 1) over-fits small calibration sets. With Δ fitted on a part of the tokens, the error on
    the held-out rest is a parabola in α; its minimum, cut to [0, 1], is the strength of the correction, for each layer
    on its own. Then Δ is fitted on all tokens. Source zeros stay zero.

    Args:
        problem: a group with cross statistics; one without is returned as it is.
        damping: λ as a fraction of the mean diagonal of H.

    Returns:
        the problem with the new weights, and every layer's α.
    """
    stats, held = problem.stats, problem.stats.held
    if stats.cross is None or held is None:
        return problem, [0.0] * len(problem.layers)
    rows = torch.cat([layer.weight for layer in problem.layers])
    trial = _correction(rows, without(stats, held), damping)
    gain = (trial * lacking(rows, held)).sum(1, dtype=torch.float64)
    cost = (trial * (trial @ held.gram)).sum(1, dtype=torch.float64)
    sums = zip(problem.split(gain), problem.split(cost), strict=True)
    strengths = [min(max(float(g.sum() / c.sum().clamp(min=1e-30)), 0.0), 1.0) for g, c in sums]
    if not any(strengths):
        return problem, strengths
    parts = problem.split(_correction(rows, stats, damping))
    layers = tuple(
        replace(layer, weight=(layer.weight + strength * delta).mul_(layer.weight != 0))
        for layer, strength, delta in zip(problem.layers, strengths, parts, strict=True)
    )
    return replace(problem, layers=layers), strengths


def lacking(rows: Tensor, stats: InputStats) -> Tensor:
    """M, `(out, in)`: what the outputs lack, times the inputs; zero where they are to be what the layer gives."""
    if stats.missed is not None:
        return stats.missed.T
    if stats.cross is None:
        return torch.zeros_like(rows)
    return rows @ (stats.cross - stats.gram).T


def _correction(rows: Tensor, stats: InputStats, damping: float) -> Tensor:
    """`Δ = M (H + λI)⁻¹`."""
    upper = inverse_factor(stats.gram, damping).upper
    return (lacking(rows, stats) @ upper.T) @ upper


def without(stats: InputStats, held: InputStats) -> InputStats:
    """The statistics of the tokens that are not held out."""
    tokens = stats.tokens - held.tokens

    def rest(every: Tensor | None, apart: Tensor | None) -> Tensor | None:
        return None if every is None or apart is None else torch.lerp(apart, every, stats.tokens / tokens)

    gram = rest(stats.gram, held.gram)
    assert gram is not None
    return InputStats(tokens, gram, rest(stats.cross, held.cross), missed=rest(stats.missed, held.missed))
