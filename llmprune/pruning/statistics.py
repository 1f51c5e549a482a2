"""Running second moments of a layer's inputs, in float32 whatever the model's dtype, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmprune.pruning.linalg import ALL, add_gram
from llmprune.pruning.problem import InputStats

HELD_OUT = 0.25
EXACT = 0.05
"""From this fraction of exact zeros on they are the activation's (ReLU: about half); below, GELU's underflow."""


class RunningGram:
    """Accumulates the Gram `XᵀX` over batches of inputs X `(tokens, in)`.

    Args:
        width: number of inputs.
        device: of the inputs.
        zeros: counts how often inputs are zero, or nearly so; None not to.
    """

    def __init__(self, width: int, device: torch.device, zeros: ZeroCounter | None = None) -> None:
        self.tokens = 0
        self._sum = torch.zeros(width, width, device=device)
        self._zeros = zeros

    def add(self, inputs: Tensor, scale: Tensor | None = None) -> None:
        """Add one batch `(..., in)` of any float dtype; `scale (tokens, 1)` multiplies every token's inputs."""
        rows = _rows(inputs, scale)
        self.tokens += len(rows)
        add_gram(self._sum, rows)
        if self._zeros is not None:
            self._zeros.add(_rows(inputs))

    def result(self) -> InputStats:
        """The Gram per token; the sum is consumed."""
        zeros = None if self._zeros is None else self._zeros.fraction(self.tokens)
        return InputStats(self.tokens, _symmetric(self._sum).div_(max(self.tokens, 1)), zero_fraction=zeros)


class ZeroCounter:
    """Counts for how many tokens an input is exactly zero, and for how many it is nearly so (APoZ, Hu et al. 2016).

    Args:
        width: number of inputs.
        threshold: nearly zero is up to this fraction of the root mean square of all inputs in the first batch.
        mean_square: of the inputs `(tokens, in)` in the first batch that are here, if any; called once.
        total: sums numbers over all processes that count, so that all decide alike; called once.
        device: of the inputs.
    """

    def __init__(
        self,
        width: int,
        threshold: float,
        mean_square: Callable[[Tensor], float] | None = None,
        total: Callable[[Sequence[float]], Sequence[float]] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.threshold, self.limit = threshold, -1.0
        self._mean_square = mean_square or (lambda rows: float(rows.square().mean()))
        self._total = total or (lambda values: values)
        self._exact, self._near = torch.zeros(2, width, dtype=torch.int64, device=device)

    def add(self, rows: Tensor) -> None:
        """Count in `(tokens, in)`, as the layer gets them."""
        if self.limit < 0 and len(rows):
            self._fix_limit(rows)
        self._exact += (rows == 0).sum(0)
        self._near += (rows.abs() <= self.limit).sum(0)

    def fraction(self, tokens: int) -> Tensor:
        """The zero fraction of every input, `(in,)`, float64, over this many tokens.

        Of exact zeros where `EXACT` of all entries are (ReLU), else of nearly zero entries.
        """
        if self.limit < 0:  # others may wait for this process's part of the first batch: nothing
            self._fix_limit(torch.zeros(0, device=self._near.device))
        zeros, entries = self._total([float(self._exact.sum()), float(tokens * len(self._exact))])
        counts: Tensor = self._exact if zeros >= EXACT * entries else self._near
        return counts.double() / max(tokens, 1)

    def _fix_limit(self, rows: Tensor) -> None:
        self.limit = self.threshold * self._mean_square(rows) ** 0.5


@dataclass(frozen=True, slots=True)
class ResidualTarget:
    """The regression target of a layer that adds to the residual stream, for the tokens of one batch.

    Args:
        residual_error: E, `(..., out)`: the dense model's residual stream behind the layer less the pruned model's.
        dense_output: Y_d, `(..., out)`: the layer's output in the dense model, without its bias.
    """

    residual_error: Tensor
    dense_output: Tensor


class RunningPair:
    """Accumulates the Gram, of held-out tokens apart; with a dense model's activations, the cross products with these.

    The last quarter of every batch is held out: what is fitted on the rest can be validated on it.

    Args:
        width: number of inputs.
        device: of the inputs.
        zeros: counts how often inputs are zero, or nearly so; None not to.
    """

    def __init__(self, width: int, device: torch.device, zeros: ZeroCounter | None = None) -> None:
        self.fit, self.held, self._zeros = RunningGram(width, device), RunningGram(width, device), zeros
        self._dense: RunningGram | None = None
        self._cross: Tensor | None = None
        self._residual_cross: Tensor | None = None
        self._output_cross: Tensor | None = None
        self._output_energy: Tensor | None = None
        self._matched = True

    def add(
        self,
        inputs: Tensor,
        dense: Tensor | ResidualTarget | None,
        scale: Tensor | None = None,
        fitted: int | None = None,
    ) -> None:
        """Add the inputs of one batch, and what the dense model has for the very same tokens.

        Where tokens were routed differently there is no such thing; then the group is fitted to pruned inputs only.

        Args:
            inputs: of the pruned model, `(..., in)`.
            dense: the dense model's inputs `(..., in)`; or, where the layer adds to the residual stream, its target.
            scale: `(tokens, 1)`, multiplies every token's part of all these; None for 1.
            fitted: how many tokens are not held out; by default three quarters.
        """
        rows = _rows(inputs, scale)
        cut = len(rows) - int(HELD_OUT * len(rows)) if fitted is None else fitted
        self.fit.add(rows[:cut])
        self.held.add(rows[cut:])
        if self._zeros is not None:
            self._zeros.add(_rows(inputs))  # a token's weight makes no input smaller
        if isinstance(dense, ResidualTarget):
            self._add_residual(rows, _rows(dense.residual_error, scale), _rows(dense.dense_output, scale), cut)
        elif dense is None or dense.shape != inputs.shape:
            self._matched = False
        else:
            self._add_cross(rows, _rows(dense, scale), cut)

    def _add_cross(self, rows: Tensor, dense: Tensor, cut: int) -> None:
        if self._dense is None or self._cross is None:
            self._dense = RunningGram(rows.shape[1], rows.device)
            self._cross = rows.new_zeros(2, rows.shape[1], rows.shape[1])
        self._dense.add(dense)
        _add_products(self._cross, rows, dense, cut)

    def _add_residual(self, rows: Tensor, error: Tensor, output: Tensor, cut: int) -> None:
        if self._residual_cross is None or self._output_cross is None or self._output_energy is None:
            self._residual_cross = rows.new_zeros(2, rows.shape[1], error.shape[1])
            self._output_cross = rows.new_zeros(rows.shape[1], error.shape[1])
            self._output_energy = rows.new_zeros(error.shape[1], dtype=torch.float64)
        _add_products(self._residual_cross, rows, error, cut)
        self._output_cross.addmm_(rows.T, output)
        self._output_energy += output.square().sum(0, dtype=torch.float64)

    def result(self) -> InputStats:
        """All moments per token; the sums are consumed."""
        fit, held = self.fit.result(), self.held.result()
        tokens = fit.tokens + held.tokens
        some, apart = max(tokens, 1), InputStats(held.tokens, held.gram)
        zeros = None if self._zeros is None else self._zeros.fraction(tokens)
        stats = InputStats(tokens, fit.gram.lerp_(held.gram, held.tokens / some), zero_fraction=zeros)
        if not self._matched:
            return replace(stats, held=apart if tokens else None)
        if self._residual_cross is not None and self._output_cross is not None and self._output_energy is not None:
            residual_cross, held_cross = _per_token(self._residual_cross, tokens, held.tokens)
            return replace(
                stats,
                held=replace(apart, residual_cross=held_cross),
                residual_cross=residual_cross,
                output_cross=self._output_cross.div_(some),
                output_energy=self._output_energy.div_(some).float(),
            )
        if self._dense is not None and self._cross is not None:
            cross, held_cross = _per_token(self._cross, tokens, held.tokens)
            return replace(stats, held=replace(apart, cross=held_cross), cross=cross, dense=self._dense.result().gram)
        return replace(stats, held=apart if tokens else None)


def output_residual_cross(weights: Tensor, stats: InputStats, rows: slice = ALL) -> Tensor:
    """The cross-covariance of the outputs' residual with the inputs, `M = EᵀX / tokens`, `(out, in)`, some of its rows.

    For a layer that adds to the residual stream E is the error there. For others `E = X_d Wᵀ − X Wᵀ`, so
    `M = W (C − H)ᵀ`. Zero without statistics of the dense model.

    Args:
        weights: W, `(out, in)`.
        stats: of the inputs.
        rows: which outputs.
    """
    if stats.residual_cross is not None:
        return stats.residual_cross.T[rows]
    if stats.cross is None:
        return torch.zeros_like(weights[rows])
    return weights[rows] @ (stats.cross - stats.gram).T


def excluding(stats: InputStats, held: InputStats) -> InputStats:
    """The statistics of the tokens that are not held out: Gram and cross products per token."""
    tokens = stats.tokens - held.tokens

    def rest(every: Tensor | None, apart: Tensor | None) -> Tensor | None:
        return None if every is None or apart is None else torch.lerp(apart, every, stats.tokens / tokens)

    gram = rest(stats.gram, held.gram)
    assert gram is not None
    return InputStats(
        tokens,
        gram,
        rest(stats.cross, held.cross),
        residual_cross=rest(stats.residual_cross, held.residual_cross),
    )


def _rows(values: Tensor, scale: Tensor | None = None) -> Tensor:
    """One row a token, float32, scaled."""
    rows = values.reshape(-1, values.shape[-1]).float()
    return rows if scale is None else rows * scale


def _add_products(sums: Tensor, left: Tensor, right: Tensor, cut: int) -> None:
    """Add `leftᵀ right` of the rows before the cut to `sums[0]`, and of those behind it to `sums[1]`."""
    sums[0].addmm_(left[:cut].T, right[:cut])
    sums[1].addmm_(left[cut:].T, right[cut:])


def _per_token(sums: Tensor, tokens: int, held: int) -> tuple[Tensor, Tensor]:
    """Means over all tokens, and over those held out."""
    return sums[0].add_(sums[1]).div_(tokens), sums[1].div_(max(held, 1))


def _symmetric(lower: Tensor) -> Tensor:
    """A symmetric matrix from its lower triangle, in place."""
    lower.tril_()
    lower += lower.tril(-1).T
    return lower
