"""What a layer should give: the dense model's outputs, as far as the calibration data support it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmprune.linalg import inverse_factor
from llmprune.problem import GroupProblem, InputStats

DAMPING = 0.1


def toward_dense(problem: GroupProblem, damping: float = DAMPING) -> tuple[GroupProblem, list[float]]:
    """Replace every weight by that of the regression on dense outputs, `W* = W + α Δ`, `Δ = W (C − H)ᵀ (H + λI)⁻¹`.

    The full correction (α = 1) over-fits small calibration sets. With Δ fitted on a part of the tokens, the error on
    the held-out rest, `‖X_v (W + α Δ)ᵀ − X_dv Wᵀ‖²`, is a parabola in α; its minimum, cut to [0, 1], is the strength
    of the correction, for each layer on its own. Then Δ is fitted on all tokens. Source zeros stay zero.

    Args:
        problem: a group with cross statistics; one without is returned as it is.
        damping: λ as a fraction of the mean diagonal of H.

    Returns:
        the problem with the new weights, and every layer's α.
    """
    stats, held = problem.stats, problem.stats.held
    if stats.cross is None or held is None or held.cross is None:
        return problem, [0.0] * len(problem.layers)
    rows = torch.cat([layer.weight for layer in problem.layers])
    away = rows @ (held.cross - held.gram).T
    trial = _correction(rows, _without(stats, held), damping)
    gain = (trial * away).sum(1, dtype=torch.float64)
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


def _correction(rows: Tensor, stats: InputStats, damping: float) -> Tensor:
    """`Δ = W (C − H)ᵀ (H + λI)⁻¹`."""
    assert stats.cross is not None
    upper = inverse_factor(stats.gram, damping).upper
    return ((rows @ (stats.cross - stats.gram).T) @ upper.T) @ upper


def _without(stats: InputStats, held: InputStats) -> InputStats:
    """The statistics of the tokens that are not held out."""
    assert stats.cross is not None
    assert held.cross is not None
    tokens = stats.tokens - held.tokens
    weight = stats.tokens / tokens
    return InputStats(tokens, torch.lerp(held.gram, stats.gram, weight), torch.lerp(held.cross, stats.cross, weight))
