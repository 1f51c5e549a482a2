"""Statistics of the inputs of a group of layers: batches, dense targets, token weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmprune.errors import InputError, PruneError
from llmprune.model.blocks import LayerRef
from llmprune.pruning.problem import InputStats
from llmprune.pruning.statistics import ResidualTarget, RunningGram, RunningPair, ZeroCounter
from llmprune.runtime.memory import mmap_large_allocations
from llmprune.runtime.process_group import SINGLE, ProcessGroup
from llmprune.streaming.batch import Batch
from llmprune.streaming.hooks import Observation


@dataclass(frozen=True, slots=True)
class StatisticsOptions:
    """Options of the statistics, the same for all blocks.

    Args:
        dense_targets: whether they are taken against the dense model's activations.
        token_weights: whether tokens are weighted by the inverse norm of the residual stream.
        zero_threshold: fraction of the root mean square up to which an input of a layer that loses inputs counts as
            zero; None where zeros are not counted.
        channel_scales: whether the learned scale of every input of a layer that loses inputs is wanted.
        left_out: numbers of the batches that are left out.
        shrink: whether statistics of experts are shrunk towards those of all tokens.
        group: the processes that have the other windows of the batches.
    """

    dense_targets: bool = False
    token_weights: bool = False
    zero_threshold: float | None = None
    channel_scales: bool = False
    left_out: frozenset[int] = frozenset()
    shrink: bool = False
    group: ProcessGroup = SINGLE


class GroupStatistics:
    """Running statistics of layers that share their input tensor.

    Args:
        options: how they are taken.
        layers: the layers.
        device: of their inputs.
        removed: whether inputs are to be removed.
        bias: of the first layer, `(out,)`; None for none.
    """

    def __init__(
        self,
        options: StatisticsOptions,
        layers: Sequence[LayerRef],
        device: torch.device,
        removed: bool = False,
        bias: Tensor | None = None,
    ) -> None:
        self.options, self.names, self.bias = options, [layer.name for layer in layers], bias
        self._first, self._routed = False, layers[0].expert is not None
        width = layers[0].shape[1]
        limit = options.zero_threshold if removed else None
        with mmap_large_allocations():
            total = options.group.sum
            zeros = None if limit is None else ZeroCounter(width, limit, self._mean_square, total, device)
            self._running = (RunningPair if options.dense_targets or removed else RunningGram)(width, device, zeros)

    def add(self, batch: Batch, seen: Observation, dense: Observation | None) -> None:
        """Add the observations of a batch.

        Args:
            batch: the batch.
            seen: of the pruned model.
            dense: of the dense model; None where it is not streamed.
        """
        if batch.shard.batch in self.options.left_out:
            return
        self._first = batch.shard.batch == 0
        gap = batch.added_behind()
        if gap is not None and dense is not None and dense.residual is not None:
            # What adds to the stream also compensates for the blocks that are removed behind it.
            wanted = dense.residual + gap.to(dense.residual.device).view_as(dense.residual)
            dense = replace(dense, residual=wanted)
        residual = dense.residual if dense is not None and dense.residual is not None else seen.residual
        weighted = (self.options.token_weights or gap is not None) and residual is not None
        scale = inverse_residual_norm(residual) if weighted and residual is not None else None
        if isinstance(self._running, RunningGram):
            self._running.add(seen.inputs, scale)
            return
        # Rows that were picked from the batch (routed tokens) are not the same ones in both models.
        whole = not self._routed and seen.inputs.numel() // seen.inputs.shape[-1] == batch.tokens.numel()
        if dense is None or not whole or dense.inputs.shape != seen.inputs.shape:
            self._running.add(seen.inputs, None, scale, batch.fitted if whole else None)
            return
        self._running.add(seen.inputs, self._residual_target(seen, dense) or dense.inputs, scale, batch.fitted)

    def add_rows(
        self,
        batch: Batch,
        rows: Tensor,
        dense: Tensor | None,
        weight: Tensor | None = None,
        fitted: int | None = None,
    ) -> None:
        """Add the inputs of some tokens of a batch.

        Args:
            batch: the batch.
            rows: in the pruned model, `(rows, in)`.
            dense: in the dense model; None where it is not streamed.
            weight: of the tokens, `(rows, 1)`; None for 1.
            fitted: how many of them are not held out; by default three quarters.
        """
        if batch.shard.batch in self.options.left_out:
            return
        if isinstance(self._running, RunningGram):
            self._running.add(rows, weight)
        else:
            self._running.add(rows, dense, weight, fitted)

    def result(self) -> InputStats:
        """Statistics per token over the windows of all processes; the sums are used up.

        Raises:
            InputError: they are not finite, or so small that float32 does not hold their squares.
            PruneError: the processes are at different layers, or one has ended.
        """
        with mmap_large_allocations():
            stats = self._running.result()
        parts = [stats, *filter(None, [stats.held])]
        known = [value for part in parts for name in REDUCED if (value := getattr(part, name)) is not None]
        if not all(bool(torch.isfinite(value.sum(dtype=torch.float64))) for value in known):
            raise InputError(
                f"the inputs of layer {self.names[0]!r} hold NaN or Inf",
                "the model overflows on this text; check the checkpoint, or try other calibration text (--calib)",
            )
        total = all_reduce_statistics(stats, self.names, self.options.group)
        square = float(total.gram.diagonal().mean(dtype=torch.float64))
        if 0 < square < LEAST_SQUARE:
            raise InputError(
                f"the inputs of layer {self.names[0]!r} have a root mean square of {square**0.5:.1e}; below "
                f"{LEAST_SQUARE**0.5:.0e} their squares leave the range of float32",
                "the weights of a layer or a norm before it are that small; check the checkpoint",
            )
        return in_range(total, square)

    def _mean_square(self, rows: Tensor) -> float:
        """Of the first batch, of which other processes may have a part, or all; of an expert, its first tokens."""
        here = rows if self._first or self._routed else rows[:0]
        squares, count = self.options.group.sum([float(here.square().sum(dtype=torch.float64)), here.numel()])
        return squares / max(count, 1)

    def _residual_target(self, seen: Observation, dense: Observation) -> ResidualTarget | None:
        if seen.residual is None or dense.residual is None or dense.output is None:
            return None
        output = dense.output if self.bias is None else dense.output - self.bias
        return ResidualTarget(dense.residual - seen.residual, output)


def inverse_residual_norm(residual: Tensor) -> Tensor:
    """The token weights that make errors count relative to the residual stream, `(tokens, 1)`, float32.

    The next norm divides every token by its own size, and that differs a hundredfold: at a few tokens, such as the
    first, the stream is so large that they alone would make up all of a Gram.
    """
    size = residual.float().square().mean(-1).sqrt().flatten()[:, None]
    return size.clamp(min=torch.finfo(torch.float32).tiny ** 0.5).reciprocal()


LEAST_SQUARE = 1e-30
RANGE = 40


def in_range(stats: InputStats, square: float) -> InputStats:
    """Statistics of inputs and outputs in another unit, a power of two, where mean squares are beyond 2⁻⁴⁰ and 2⁴⁰.

    Solutions do not depend on the unit, but their factorisations leave the range of float32 where it is far from 1.

    Args:
        stats: per token.
        square: the mean square of the inputs.
    """
    exponent = round(math.log2(square)) if square > 0 else 0
    if abs(exponent) <= RANGE:
        return stats
    squares = {name: getattr(stats, name) for name in REDUCED if name != "zero_fraction"}
    scaled = {name: value * 2.0**-exponent for name, value in squares.items() if value is not None}
    return replace(stats, **scaled, held=None if stats.held is None else in_range(stats.held, square))


REDUCED = ("gram", "cross", "dense", "residual_cross", "output_cross", "output_energy", "zero_fraction")


def all_reduce_statistics(stats: InputStats, layers: list[str], group: ProcessGroup) -> InputStats:
    """Statistics per token over the windows of all processes, from those over each one's own.

    Args:
        stats: of this process's windows.
        layers: names of the layers that they are for.
        group: the processes.

    Raises:
        PruneError: the processes are at different layers, or one has ended.
    """
    if group.is_single:
        return stats
    own: dict[str, Any] = {"layers": layers, "stats": _head(stats)}
    heads = group.all_gather_object(own)
    if other := next((head["layers"] for head in heads if head["layers"] != layers), None):
        raise PruneError(
            f"the blocks take {layers} in one process and {other} in another",
            "a model that routes tokens this way cannot be spread: use one process",
        )
    return _reduced(stats, [head["stats"] for head in heads], group)


def _head(stats: InputStats) -> dict[str, Any]:
    """The token count and shapes that the other processes must know, as JSON."""
    values = {name: getattr(stats, name) for name in REDUCED}
    shapes = {name: list(value.shape) for name, value in values.items() if value is not None}
    return {"tokens": stats.tokens, "shapes": shapes, "held": None if stats.held is None else _head(stats.held)}


def _reduced(stats: InputStats, heads: list[dict[str, Any]], group: ProcessGroup) -> InputStats:
    tokens = sum(head["tokens"] for head in heads)
    found: dict[str, Any] = {"tokens": tokens, "scale": stats.scale}
    counted = [head for head in heads if head["tokens"]]
    for name in REDUCED:
        # A process without a token adds nothing; one that has some, but not this statistic, makes it useless.
        shapes = [head["shapes"].get(name) for head in counted or heads]
        value: Tensor | None = getattr(stats, name)
        if any(shape is None for shape in shapes):
            found[name] = None
            continue
        part = stats.gram.new_zeros(shapes[0]) if value is None else value.mul_(stats.tokens / max(tokens, 1))
        group.all_reduce_now(part)
        found[name] = part
    held = [head["held"] for head in counted or heads]
    found["held"] = None
    if all(held):
        own = stats.held or InputStats(0, stats.gram.new_zeros(stats.gram.shape))
        found["held"] = _reduced(own, [head["held"] or _head(InputStats(0, own.gram)) for head in heads], group)
    return InputStats(**found)
