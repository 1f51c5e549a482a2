"""The blocks of a model one after the other: calibration activations stream while only one block is in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune.job import ACTIVATION_MEMORY
from llmprune.model.skeleton import Skeleton
from llmprune.runtime.memory import trim_heap
from llmprune.runtime.process_group import SINGLE, ProcessGroup
from llmprune.streaming.activations import Activations
from llmprune.streaming.batch import RELEASED
from llmprune.streaming.batch_shards import BatchSharding, held_out_batches
from llmprune.streaming.block import Block
from llmprune.streaming.block_gap import pass_removed
from llmprune.streaming.block_types import BlockAnalysis, BlockTypes, short_batch
from llmprune.streaming.capture import capture_block_inputs
from llmprune.streaming.cross_block_state import CrossBlockState, saved_wrap
from llmprune.streaming.expert_removal import ExpertRemoval, FewerExperts
from llmprune.streaming.schedule import GroupSchedule
from llmprune.streaming.statistics import StatisticsOptions
from llmprune.structure.cut import Cut

BATCH_TOKENS = 2048
"""Tokens that pass through a block together."""

BLOCK_MEMORY = 4 * 2**30
"""Bytes of intermediate activations of one block that are kept in memory."""


@dataclass(frozen=True, slots=True)
class Observe:
    """Options of what a stream observes.

    Args:
        chosen: full names of the layers to be pruned.
        dense_stream: whether the dense model's activations are propagated in parallel.
        dense_targets: whether statistics are taken against them, where there are any.
        permute: whether to find the inputs that may be permuted.
        removed: the layers that lose inputs, by full name.
        needs: statistics that methods and criteria declare beyond the Gram: `norm_scale`, `channel_scale`.
        zero_threshold: fraction of the root mean square up to which an input counts as zero, where zeros are counted.
        shrink: whether statistics of experts are shrunk towards those of all tokens.
        reconstruct: whether blocks are reconstructed; validation batches are then left out of the statistics.
        experts: the experts that are removed, if any.
        removed_blocks: numbers of the blocks that are removed; never the first.
        left_out: numbers of batches that are left out of the statistics, beside those of `reconstruct`.
    """

    chosen: frozenset[str] = frozenset()
    dense_stream: bool = False
    dense_targets: bool = True
    permute: bool = False
    removed: Mapping[str, Cut] = field(default_factory=dict)
    needs: frozenset[str] = frozenset()
    zero_threshold: float | None = None
    shrink: bool = False
    reconstruct: bool = False
    experts: FewerExperts | None = None
    removed_blocks: frozenset[int] = frozenset()
    left_out: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Resources:
    """Memory, files and processes of a stream.

    Args:
        batch_tokens: tokens per batch; fewer if `saved` says so.
        block_memory: bytes of a block's intermediate activations; None for `BLOCK_MEMORY`.
        hidden_memory: bytes of hidden states that are kept in memory between blocks.
        folder: for hidden states beyond that, and for `save`; None for neither.
        group: the processes that share the tokens; statistics are those of all.
        saved: what `save` returned in a run that was stopped; the stream resumes from there.
    """

    batch_tokens: int = BATCH_TOKENS
    block_memory: int | None = None
    hidden_memory: int = ACTIVATION_MEMORY
    folder: Path | None = None
    group: ProcessGroup = SINGLE
    saved: dict[str, Any] | None = None


class BlockStream:
    """Iterates over the blocks of a model, each with its weights in memory and the activations that reach it.

    With no layer chosen, the output of the last block is bit-equal to that of the whole model.

    Args:
        skeleton: the model.
        tokens: `(samples, length)`, int64.
        observe: what is observed.
        resources: memory, files, processes.

    Attributes:
        sharding: the batches of all processes.
        inputs: the batches of this process.
        dense: layers that stay dense though they were chosen, by full name, and why.
        done: number of finished blocks.
    """

    def __init__(
        self, skeleton: Skeleton, tokens: Tensor, observe: Observe | None = None, resources: Resources | None = None
    ) -> None:
        self.skeleton, self.observe = skeleton, observe or Observe()
        self.resources = resources = resources or Resources()
        self.group, self.folder, saved = resources.group, resources.folder, resources.saved
        self.sharding = _sharding(tokens, resources)
        self._pruned, self._dense = self._activations()
        wrap = saved_wrap(self.folder, saved["cross_block_state"]) if self.folder and saved else None
        own = tokens[self.sharding.own]
        self.inputs = capture_block_inputs(
            skeleton, own, self.sharding.batch_size, self._pruned, self._dense, wrap, self.sharding.shards()
        )
        analysed = self.observe.permute or "norm_scale" in self.observe.needs
        # What stands for returned tensors must be as short as the batch.
        known = self.inputs.wrap if not any(isinstance(v, Tensor) for v in self.inputs.wrap.rest or ()) else None
        short = short_batch(skeleton, own, known) if analysed else None
        self.types = BlockTypes(skeleton, self.observe.chosen, short)
        self._state = CrossBlockState(self.inputs)
        self.dense: dict[str, str] = {}
        self.done = 0
        if saved:
            self._load(saved)

    def __len__(self) -> int:
        return len(self.skeleton.blocks)

    @property
    def left(self) -> int:
        """Number of blocks that are still to come, without removed ones."""
        return sum(index not in self.observe.removed_blocks for index in range(self.done, len(self)))

    def __iter__(self) -> Iterator[Block]:
        while self.done < len(self):
            index, behind = self.done, self._behind(self.done)
            # A block is trained as a whole, and loses experts as a whole.
            whole = self.observe.reconstruct or self.observe.experts is not None
            with self.skeleton.loaded(self.skeleton.block_parameters(index), whole=whole):
                block = Block(self.skeleton, index, self.inputs.batches, self.observe.chosen, self.folder)
                pass_removed(block, range(index + 1, behind), self._dense)
                try:
                    yield block
                    block.finish()
                finally:
                    block.close()
            self.done = behind
            for batch in self.inputs.batches:
                batch.gap = None
                for number in range(index, behind):
                    batch.release(number)
            for stream in self._streams:
                stream.turn()
            trim_heap()

    def _behind(self, index: int) -> int:
        """Number of the next block that stays."""
        return next((n for n in range(index + 1, len(self)) if n not in self.observe.removed_blocks), len(self))

    def residual_layers(self, block: Block) -> list[str]:
        """Local names of the chosen layers whose outputs are added to the residual stream, in call order."""
        order = self.types.order(block.index, block.module, list(block.layers), block.trial)
        adds = self.types.residual_adds(block.index, block.module, block.trial)
        return [order.groups[number][0] for number in sorted(adds)]

    def experts(self, block: Block) -> ExpertRemoval | None:
        """The removal of experts from a block; None where it loses none. It comes before its groups."""
        fewer = self.observe.experts
        if fewer is None or block.name not in fewer.mixtures.cuts:
            return None
        cut, smaller = fewer.mixtures.cuts[block.name], fewer.blocks[block.index]
        return ExpertRemoval(block, cut, smaller, self._statistics())

    def groups(self, block: Block) -> GroupSchedule:
        """The groups of a block in call order, to be solved one after the other."""
        analysis = self._analysis(block)
        self.dense |= {block.layers[local].name: why for local, why in analysis.order.dense.items()}
        # A paused forward holds the groups' inputs and about as much again: residual, gates, attention.
        forwards = len(self.inputs.batches) * len(self._streams)
        limit = BLOCK_MEMORY if self.resources.block_memory is None else self.resources.block_memory
        return GroupSchedule(block, analysis, self._statistics(), 2 * analysis.order.nbytes * forwards <= limit)

    @property
    def immovable(self) -> list[str]:
        """Reasons why the inputs of some blocks could not be permuted, one sentence per block type."""
        return [
            f"no channels of {self.skeleton.block_name(first)!r} and of blocks like it were reordered: it {reason}"
            for first, reason in self.types.opaque.items()
        ] + [
            f"no inputs inside the experts of {self.skeleton.block_name(first)!r} and of blocks like it were "
            "reordered: their module does not say how gate and up lie"
            for first in (self.types.undescribed if self.observe.permute else ())
        ]

    def save(self) -> dict[str, Any]:
        """Make durable what later blocks need of the current one and of those before; returns it as JSON.

        Raises:
            CannotBeSavedError: state between blocks that cannot be written.
        """
        folder = self._saves()
        behind = self._behind(self.done)
        return {
            "done": behind,
            "batch_size": self.sharding.batch_size,
            "cross_block_state": self._state.save(behind, folder),
            "hidden": [stream.save() for stream in self._streams],
            "block_types": self.types.save(),
            "dense": self.dense,
        }

    def _saves(self) -> Path:
        """The folder of `save`; a stream without one cannot be saved."""
        assert self.folder is not None
        return self.folder

    @property
    def _streams(self) -> list[Activations]:
        return [self._pruned] if self._dense is None else [self._pruned, self._dense]

    def _activations(self) -> tuple[Activations, Activations | None]:
        """Storage for the hidden states of the pruned model, and of the dense one if it is streamed."""
        observe, folder = self.observe, self.folder
        # The inputs and the outputs of a block are there at once.
        limit = self.resources.hidden_memory // (4 if observe.dense_stream else 2)
        pruned = Activations("pruned", folder, limit, keep=observe.reconstruct)
        return pruned, Activations("dense", folder, limit) if observe.dense_stream else None

    def _analysis(self, block: Block) -> BlockAnalysis:
        """The analysis of a block; blocks of one type share it."""
        observe, index = self.observe, block.index
        order = self.types.order(index, block.module, list(block.layers), block.trial)
        residual = self._statistics().dense_targets or bool(observe.removed)
        prefix = f"{block.name}."
        return BlockAnalysis(
            order,
            self.types.residual_adds(index, block.module, block.trial) if residual else {},
            self.types.norm_scales(index) if "norm_scale" in observe.needs else {},
            {c.consumer: c for c in self.types.movable(index, block.module) if block.movable(c, order.dense)}
            if observe.permute
            else {},
            {name.removeprefix(prefix): cut for name, cut in observe.removed.items() if name.startswith(prefix)},
        )

    def _statistics(self) -> StatisticsOptions:
        observe = self.observe
        return StatisticsOptions(
            dense_targets=observe.dense_targets and observe.dense_stream,
            token_weights=bool(observe.removed),
            zero_threshold=observe.zero_threshold,
            channel_scales="channel_scale" in observe.needs,
            shrink=observe.shrink,
            left_out=observe.left_out
            | (held_out_batches(self.sharding.batches) if observe.reconstruct else frozenset()),
            group=self.group,
        )

    def _load(self, saved: dict[str, Any]) -> None:
        self.done, self.dense = saved["done"], dict(saved["dense"])
        for stream, hidden in zip(self._streams, saved["hidden"], strict=True):
            stream.load(hidden, self.done, [len(batch.tokens) for batch in self.inputs.batches])
        self._state.load(self.done, self._saves(), saved["cross_block_state"])
        self.types.load(saved["block_types"])
        for batch in self.inputs.batches:
            batch.calls[: self.done] = batch.dense_calls[: self.done] = [RELEASED] * self.done


def _sharding(tokens: Tensor, resources: Resources) -> BatchSharding:
    """The batches of all processes."""
    windows, length = tokens.shape
    size = max(1, resources.batch_tokens // length)
    if resources.saved:
        size = min(size, resources.saved["batch_size"])
    return BatchSharding(windows, size, resources.group.rank, resources.group.world_size)
