"""Statistics of experts: the tokens routed to one, the same tokens in the dense model, and all tokens sent to it.

The module that holds the experts is called with all tokens and their routing. It can be called again, with the tokens
of one expert or with any others, as far as the matrix whose inputs are wanted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.model.blocks import LayerRef
from llmprune.model.routed_call import RoutedCall
from llmprune.pruning.problem import InputStats
from llmprune.pruning.shrinkage import QuarticSum, shrunk
from llmprune.streaming.batch import Batch, StopForward
from llmprune.streaming.block import Block
from llmprune.streaming.hooks import Observer, owner_of
from llmprune.streaming.pausable import StopAtGroup
from llmprune.streaming.statistics import GroupStatistics, StatisticsOptions

POOLED_TOKENS = 8192
"""About so many tokens are sent to every expert; more would add to the cost and hardly to what they tell."""


@dataclass(frozen=True, slots=True)
class RoutedBatch:
    """A batch that has come to the experts.

    Args:
        batch: the batch.
        pruned: their call in the pruned model.
        dense: their call in the dense model; None where that is not streamed.
    """

    batch: Batch
    pruned: RoutedCall
    dense: RoutedCall | None

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return -(-len(self.pruned.hidden) // len(self.batch.shard.own))

    @property
    def numbers(self) -> Tensor:
        """Numbers of the tokens in the batch of all processes, `(tokens,)`, int64."""
        starts = torch.tensor(self.batch.shard.own)[:, None] * self.length
        return (starts + torch.arange(self.length)).flatten()[: len(self.pruned.hidden)]


class ExpertStatistics:
    """Takes the statistics of the experts of a block.

    Args:
        block: the block.
        options: how statistics are taken.
        observed_by: within, the block's observer is the one given.
    """

    def __init__(
        self, block: Block, options: StatisticsOptions, observed_by: Callable[[Observer], AbstractContextManager[None]]
    ) -> None:
        self.block, self.options, self._observed_by = block, options, observed_by
        self._at_entry: dict[tuple[str, str], InputStats] = {}

    def collect(
        self, number: int, refs: Sequence[LayerRef], batches: Sequence[RoutedBatch], removed: bool = False
    ) -> InputStats:
        """The statistics of a group of an expert's matrices, over the tokens that are routed to it in the pruned model.

        Args:
            number: of the group.
            refs: its layers.
            batches: those of this process.
            removed: whether inputs are to be removed; tokens then count by their gate values.
        """
        place = refs[0].expert
        assert place is not None
        pooled = self._pooled(number, refs, batches, removed) if self.options.shrink else None
        quartic = None if pooled is None else QuarticSum(pooled.gram)
        own = GroupStatistics(self.options, refs, self.block.skeleton.device, removed)
        sent = [routed.pruned.tokens_of(place.index) for routed in batches]
        weights = self._token_weights(place.index, batches) if removed else [None] * len(batches)
        for routed, tokens, weight, fitted in zip(batches, sent, weights, self._fitted(batches, sent), strict=True):
            if len(tokens):
                rows, dense = self._rows(number, refs[0], routed, tokens)
                own.add_rows(routed.batch, rows, dense, weight, fitted)
                if quartic is not None and routed.batch.shard.batch not in self.options.left_out:
                    quartic.add(rows if weight is None else rows * weight)
        stats = own.result()
        if pooled is None or quartic is None:
            return stats
        return shrunk(stats, pooled, self.options.group.sum([quartic.value])[0])

    def _token_weights(self, expert: int, batches: Sequence[RoutedBatch]) -> list[Tensor]:
        """The gate values of an expert's tokens in every batch, `(tokens, 1)`, over their root mean square.

        What the mixture gives is the sum of the experts' outputs times these.
        """
        gates = [routed.pruned.gates_of(expert)[1][:, None] for routed in batches]
        own = [sum(float(part.square().sum(dtype=torch.float64)) for part in gates), sum(map(len, gates))]
        squares, tokens = self.options.group.sum(own)
        scale = (tokens / squares) ** 0.5 if squares else 0.0
        return [part * scale for part in gates]

    def _fitted(self, batches: Sequence[RoutedBatch], sent: Sequence[Tensor]) -> list[int]:
        """How many of the tokens of every batch are fitted to: all but the last quarter of those of all processes."""
        own: list[Any] = []
        for routed, tokens in zip(batches, sent, strict=True):
            shard = routed.batch.shard
            counts = torch.bincount(tokens // routed.length, minlength=len(shard.own)).tolist()
            own.append([shard.batch, shard.own, counts])
        found: dict[int, dict[int, int]] = defaultdict(dict)
        for one in self.options.group.all_gather_object(own):
            for batch, windows, counts in one:
                found[batch].update(zip(windows, counts, strict=True))
        shards = [routed.batch.shard for routed in batches]
        return [shard.fitted_rows([found[shard.batch][at] for at in range(shard.windows)]) for shard in shards]

    def _pooled(
        self, number: int, refs: Sequence[LayerRef], batches: Sequence[RoutedBatch], removed: bool
    ) -> InputStats:
        """The statistics of all tokens, or of every so many of them, as if they had been sent to this expert.

        Where the inputs are the tokens themselves, those of all experts are the same.
        """
        owner = owner_of(refs[0].local)
        key = owner, refs[0].local.rpartition(".")[2]
        if key in self._at_entry:
            return self._at_entry[key]
        (every,) = self.options.group.sum([sum(len(routed.pruned.hidden) for routed in batches)])
        pooled = GroupStatistics(self.options, refs, self.block.skeleton.device, removed)
        at_entry = True
        for routed in batches:
            hidden = routed.pruned.hidden
            tokens = (routed.numbers % -(-int(every) // POOLED_TOKENS) == 0).nonzero().flatten().to(hidden.device)
            rows, dense = self._rows(number, refs[0], routed, tokens)
            at_entry = at_entry and rows.shape == hidden[tokens].shape and torch.equal(rows, hidden[tokens])
            pooled.add_rows(routed.batch, rows, dense)
        found = pooled.result()
        if at_entry:
            self._at_entry = {key: found}
        return found

    def _rows(self, number: int, ref: LayerRef, routed: RoutedBatch, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """The inputs of a group for some tokens of a batch, in the pruned and in the dense model."""
        assert ref.expert is not None
        block, index = self.block, ref.expert.index
        rows = self._replayed(number, block.module, ref, routed.pruned.sent(tokens, index))
        assert rows is not None
        if routed.dense is None or len(routed.dense.hidden) != len(routed.pruned.hidden):
            return rows, None
        with block.dense():
            sent = routed.dense.sent(tokens, block.dense_expert(index))
            return rows, self._replayed(number, block.dense_module, ref, sent)

    def _replayed(self, number: int, module: nn.Module, ref: LayerRef, sent: tuple[Tensor, ...]) -> Tensor | None:
        """The inputs of a group in a call of the experts of a block, or of the dense one."""
        stop = StopAtGroup(number)
        with self._observed_by(stop), suppress(StopForward):
            module.get_submodule(owner_of(ref.local))(*sent)
        return None if stop.observation is None else stop.observation.inputs
