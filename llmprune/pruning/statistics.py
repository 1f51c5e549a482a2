"""Running statistics of a layer's inputs, in float32 whatever the model's dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmprune.pruning.linalg import add_gram
from llmprune.pruning.problem import InputStats

HELD_OUT = 0.25
EXACT = 0.05
"""From this share of exact zeros on they are what the activation gives (ReLU: about half); below, GELU's underflow."""


class RunningGram:
    """Accumulates `XᵀX` over batches of inputs.

    Args:
        width: number of inputs.
        device: where the inputs come from.
        quiet: counts how often inputs are nearly zero; None not to.
    """

    def __init__(self, width: int, device: torch.device, quiet: QuietCount | None = None) -> None:
        self.tokens = 0
        self._sum = torch.zeros(width, width, device=device)
        self._quiet = quiet

    def add(self, inputs: Tensor, scale: Tensor | None = None) -> None:
        """Take in one batch `(..., in)` of any float dtype; `scale (tokens, 1)` multiplies every token's."""
        rows = _rows(inputs, scale)
        self.tokens += len(rows)
        add_gram(self._sum, rows)
        if self._quiet is not None:
            self._quiet.add(_rows(inputs))

    def result(self) -> InputStats:
        """The Gram per token; the sum is used up."""
        quiet = None if self._quiet is None else self._quiet.share(self.tokens)
        return InputStats(self.tokens, _whole(self._sum).div_(max(self.tokens, 1)), quiet=quiet)


class QuietCount:
    """Counts for how many tokens an input is exactly zero, and for how many it is nearly so.

    Args:
        width: number of inputs.
        epsilon: nearly zero is up to this share of the root mean square of all inputs in the first batch.
        mean_square: of the inputs in the first batch, from those that are here, if any; called once.
        total: sums numbers over all processes that count, so that they all come to the same; called once.
        device: where the inputs come from.
    """

    def __init__(
        self,
        width: int,
        epsilon: float,
        mean_square: Callable[[Tensor], float] | None = None,
        total: Callable[[Sequence[float]], Sequence[float]] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.epsilon, self.limit = epsilon, -1.0
        self._mean_square = mean_square or (lambda rows: float(rows.square().mean()))
        self._total = total or (lambda values: values)
        self._exact, self._near = torch.zeros(2, width, dtype=torch.int64, device=device)

    def add(self, rows: Tensor) -> None:
        """Take in `(tokens, in)`, as the layer gets them."""
        if self.limit < 0 and len(rows):
            self._fix_limit(rows)
        self._exact += (rows == 0).sum(0)
        self._near += (rows.abs() <= self.limit).sum(0)

    def share(self, tokens: int) -> Tensor:
        """The share of tokens, `(in,)`: of exact zeros where `EXACT` of all entries are (ReLU), else of nearly zero."""
        if self.limit < 0:  # others may be waiting for what this process has of the first batch: nothing
            self._fix_limit(torch.zeros(0, device=self._near.device))
        zeros, entries = self._total([float(self._exact.sum()), float(tokens * len(self._exact))])
        counts: Tensor = self._exact if zeros >= EXACT * entries else self._near
        return counts.double() / max(tokens, 1)

    def _fix_limit(self, rows: Tensor) -> None:
        self.limit = self.epsilon * self._mean_square(rows) ** 0.5


@dataclass(frozen=True, slots=True)
class Landing:
    """What a layer that adds to the residual stream leaves there, for the tokens of one batch.

    Args:
        missed: `(..., out)`, what the stream lacks behind the layer.
        given: `(..., out)`, the layer's output in the dense model, without its bias.
    """

    missed: Tensor
    given: Tensor


class RunningPair:
    """Accumulates the Gram, a part of the tokens apart; with a dense model's activations, the products with these too.

    The last quarter of every batch is held out: what is fitted on the rest can be judged on it.

    Args:
        width: number of inputs.
        device: where the inputs come from.
        quiet: counts how often inputs are nearly zero; None not to.
    """

    def __init__(self, width: int, device: torch.device, quiet: QuietCount | None = None) -> None:
        self.fit, self.held, self._quiet = RunningGram(width, device), RunningGram(width, device), quiet
        self._dense: RunningGram | None = None
        self._cross: Tensor | None = None
        self._missed: Tensor | None = None
        self._given: Tensor | None = None
        self._energy: Tensor | None = None
        self._matched = True

    def add(
        self,
        inputs: Tensor,
        dense: Tensor | Landing | None,
        scale: Tensor | None = None,
        fitted: int | None = None,
    ) -> None:
        """Take in the inputs `(..., in)` of one batch, and what the dense model has for the very same tokens.

        Where tokens were routed differently there is no such thing; then the group is fitted to pruned inputs only.

        Args:
            inputs: of the pruned model.
            dense: the dense model's inputs `(..., in)`; or what lands, where the layer adds to the residual stream.
            scale: `(tokens, 1)`, multiplies every token's part of all these; None for 1.
            fitted: how many tokens are not held out; by default three quarters.
        """
        rows = _rows(inputs, scale)
        cut = len(rows) - int(HELD_OUT * len(rows)) if fitted is None else fitted
        self.fit.add(rows[:cut])
        self.held.add(rows[cut:])
        if self._quiet is not None:
            self._quiet.add(_rows(inputs))  # a token's weight makes no input quieter
        if isinstance(dense, Landing):
            self._land(rows, _rows(dense.missed, scale), _rows(dense.given, scale), cut)
        elif dense is None or dense.shape != inputs.shape:
            self._matched = False
        else:
            self._cross_with(rows, _rows(dense, scale), cut)

    def _cross_with(self, rows: Tensor, dense: Tensor, cut: int) -> None:
        if self._dense is None or self._cross is None:
            self._dense = RunningGram(rows.shape[1], rows.device)
            self._cross = rows.new_zeros(2, rows.shape[1], rows.shape[1])
        self._dense.add(dense)
        _add_products(self._cross, rows, dense, cut)

    def _land(self, rows: Tensor, missed: Tensor, given: Tensor, cut: int) -> None:
        if self._missed is None or self._given is None or self._energy is None:
            self._missed = rows.new_zeros(2, rows.shape[1], missed.shape[1])
            self._given = rows.new_zeros(rows.shape[1], missed.shape[1])
            self._energy = rows.new_zeros(missed.shape[1], dtype=torch.float64)
        _add_products(self._missed, rows, missed, cut)
        self._given.addmm_(rows.T, given)
        self._energy += given.square().sum(0, dtype=torch.float64)

    def result(self) -> InputStats:
        """Statistics per token; the sums are used up."""
        fit, held = self.fit.result(), self.held.result()
        tokens = fit.tokens + held.tokens
        some, apart = max(tokens, 1), InputStats(held.tokens, held.gram)
        quiet = None if self._quiet is None else self._quiet.share(tokens)
        stats = InputStats(tokens, fit.gram.lerp_(held.gram, held.tokens / some), quiet=quiet)
        if not self._matched:
            return replace(stats, held=apart if tokens else None)
        if self._missed is not None and self._given is not None and self._energy is not None:
            missed, missed_held = _per_token(self._missed, tokens, held.tokens)
            apart = replace(apart, missed=missed_held)
            return replace(
                stats, held=apart, missed=missed, given=self._given.div_(some), energy=self._energy.div_(some).float()
            )
        if self._dense is not None and self._cross is not None:
            cross, cross_held = _per_token(self._cross, tokens, held.tokens)
            return replace(stats, held=replace(apart, cross=cross_held), cross=cross, dense=self._dense.result().gram)
        return replace(stats, held=apart if tokens else None)


def _rows(values: Tensor, scale: Tensor | None = None) -> Tensor:
    """One row a token, float32, scaled."""
    rows = values.reshape(-1, values.shape[-1]).float()
    return rows if scale is None else rows * scale


def _add_products(sums: Tensor, left: Tensor, right: Tensor, cut: int) -> None:
    """`leftᵀ right` of the rows before the cut, and of those behind it."""
    sums[0].addmm_(left[:cut].T, right[:cut])
    sums[1].addmm_(left[cut:].T, right[cut:])


def _per_token(sums: Tensor, tokens: int, held: int) -> tuple[Tensor, Tensor]:
    """Means over all tokens, and over those held out."""
    return sums[0].add_(sums[1]).div_(tokens), sums[1].div_(max(held, 1))


def _whole(lower: Tensor) -> Tensor:
    """A symmetric matrix from its lower triangle, in place."""
    lower.tril_()
    lower += lower.tril(-1).T
    return lower
