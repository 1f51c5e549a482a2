"""What the statistics of a group of layers are made of: which batches, against which targets, how each token counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.errors import InputError
from llmprune.model.blocks import LayerRef
from llmprune.pruning.problem import InputStats
from llmprune.pruning.statistics import Landing, QuietCount, RunningGram, RunningPair
from llmprune.runtime.memory import mapped_memory
from llmprune.runtime.process_group import ALONE, Ranks
from llmprune.streaming.capture import Batch
from llmprune.streaming.hooks import Seen


@dataclass(frozen=True, slots=True)
class Sampling:
    """How statistics are taken, in all blocks alike.

    Args:
        paired: whether they are taken against the dense model's activations.
        balanced: whether a token's error counts relative to the residual stream that it lands in, see `even_weight`.
        quiet: with this share of the root mean square as the limit, count how often inputs that may go are nearly
            zero; None not to.
        unfitted: the batches that are left out.
        ranks: the processes that have the other windows of the batches.
    """

    paired: bool = False
    balanced: bool = False
    quiet: float | None = None
    unfitted: frozenset[int] = frozenset()
    ranks: Ranks = ALONE


class GroupStatistics:
    """The running statistics of layers that are fed the very same tensor.

    Args:
        sampling: how they are taken.
        layers: the layers.
        device: where their inputs come from.
        cut: whether inputs are to go.
        bias: of the first layer, `(out,)`; None for none.
    """

    def __init__(
        self,
        sampling: Sampling,
        layers: Sequence[LayerRef],
        device: torch.device,
        cut: bool = False,
        bias: Tensor | None = None,
    ) -> None:
        self.sampling, self.names, self.bias = sampling, [layer.name for layer in layers], bias
        self._first = False
        width = layers[0].shape[1]
        limit = sampling.quiet if cut else None
        with mapped_memory():
            total = sampling.ranks.total
            quiet = None if limit is None else QuietCount(width, limit, self._mean_square, total, device)
            self._running = (RunningPair if sampling.paired or cut else RunningGram)(width, device, quiet)

    def add(self, batch: Batch, seen: Seen, dense: Seen | None) -> None:
        """Take in what the layers saw of a batch, and what the dense model's saw.

        Args:
            batch: the batch.
            seen: in the pruned model.
            dense: in the dense one; None where there is no such thing.
        """
        if batch.part.batch in self.sampling.unfitted:
            return
        self._first = batch.part.batch == 0
        landed = dense.landed if dense is not None and dense.landed is not None else seen.landed
        scale = even_weight(landed) if self.sampling.balanced and landed is not None else None
        if isinstance(self._running, RunningGram):
            self._running.add(seen.inputs, scale)
            return
        # Rows that were picked from the batch (routed tokens) are not the same ones in both models.
        whole = seen.inputs.numel() // seen.inputs.shape[-1] == batch.tokens.numel()
        if dense is None or not whole or dense.inputs.shape != seen.inputs.shape:
            self._running.add(seen.inputs, None, scale, batch.fitted if whole else None)
            return
        self._running.add(seen.inputs, self._landing(seen, dense) or dense.inputs, scale, batch.fitted)

    def result(self) -> InputStats:
        """Statistics per token over the windows of all processes; the sums are used up.

        Raises:
            InputError: they are not finite.
            PruneError: the processes are at different layers, or one has ended.
        """
        with mapped_memory():
            stats = self._running.result()
        parts = [stats, *filter(None, [stats.held])]
        known = [v for s in parts for v in (s.gram, s.cross, s.dense, s.missed, s.given, s.energy) if v is not None]
        if not all(bool(torch.isfinite(value.sum(dtype=torch.float64))) for value in known):
            raise InputError(
                f"the inputs of layer {self.names[0]!r} hold NaN or Inf",
                "the model overflows on this text; check the checkpoint, or try other calibration text (--calib)",
            )
        return self.sampling.ranks.summed(stats, self.names)

    def _mean_square(self, rows: Tensor) -> float:
        """Of the first batch, of which other processes may have a part, or all."""
        here = rows if self._first else rows[:0]
        squares, count = self.sampling.ranks.total([float(here.square().sum(dtype=torch.float64)), here.numel()])
        return squares / max(count, 1)

    def _landing(self, seen: Seen, dense: Seen) -> Landing | None:
        if seen.landed is None or dense.landed is None or dense.made is None:
            return None
        return Landing(dense.landed - seen.landed, dense.made if self.bias is None else dense.made - self.bias)


def even_weight(landed: Tensor) -> Tensor:
    """By what to scale a token's error so that it counts relative to the residual stream, `(tokens, 1)`, float32.

    The next norm divides every token by its own size, and that differs a hundredfold: at a few tokens, such as the
    first, the stream is so large that they alone would make up all of a Gram.
    """
    size = landed.float().square().mean(-1).sqrt().flatten()[:, None]
    return size.clamp(min=torch.finfo(torch.float32).tiny ** 0.5).reciprocal()
