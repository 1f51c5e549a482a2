"""The blocks of a model one after the other: calibration activations travel while only one block is in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune.model.skeleton import Skeleton
from llmprune.runtime.memory import give_back_memory
from llmprune.runtime.process_group import SINGLE, ProcessGroup
from llmprune.streaming.activations import Activations
from llmprune.streaming.batch_shards import parts, unfitted
from llmprune.streaming.block import Block, Group
from llmprune.streaming.block_types import Kinds, short_batch
from llmprune.streaming.capture import SPENT, rehearse
from llmprune.streaming.cross_block_state import Baggage, saved_wrap
from llmprune.streaming.statistics import Sampling
from llmprune.structure.coupling import Coupling

BATCH_TOKENS = 2048
"""Tokens that pass through a block together."""

BUDGET = 2 * 2**30
"""Bytes of hidden states that rest in memory between blocks."""

MEMORY = 4 * 2**30
"""Bytes that a block's intermediate activations may take."""


class BlockStream:
    """Iterates over the blocks of a model, each with its weights in memory and the activations that reach it.

    Without a method applied, what leaves the last block is bit-equal to what the whole model computes.

    Args:
        skeleton: the model.
        tokens: `(samples, length)`, int64.
        batch_tokens: tokens per batch; fewer if `saved` says so.
        chosen: full names of the layers to be pruned.
        memory: bytes that a block's intermediate activations may take; `MEMORY` by default.
        twin: whether the dense model's activations travel along.
        paired: whether the layers' statistics are taken against them, where there are such.
        permute: whether to find out which inputs may change places.
        cuts: by their full names, the layers that lose inputs, with what these hang together with.
        scales: whether to look for the norms that feed the layers.
        quiet: with this share of the root mean square as the limit, count how often their inputs are nearly zero.
        again: whether blocks will be trained, and passed once more, see `Block.rewind`; statistics then leave out the
            batches that are to judge them, see `unfitted`.
        folder: where hidden states rest that exceed the budget, and what `save` writes; None for neither.
        budget: bytes of hidden states that may rest in memory.
        saved: what `save` returned in a run that was stopped; the stream goes on from there.
        group: the processes that share the tokens; statistics are those of all.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        tokens: Tensor,
        *,
        batch_tokens: int = BATCH_TOKENS,
        chosen: frozenset[str] = frozenset(),
        memory: int | None = None,
        twin: bool = False,
        paired: bool = True,
        permute: bool = False,
        cuts: Mapping[str, Coupling] | None = None,
        quiet: float | None = None,
        scales: bool = False,
        again: bool = False,
        folder: Path | None = None,
        budget: int = BUDGET,
        saved: dict[str, Any] | None = None,
        group: ProcessGroup = SINGLE,
    ) -> None:
        self.skeleton, self.chosen, self.folder = skeleton, chosen, folder
        self.memory = MEMORY if memory is None else memory
        self.cuts, self.permute, self.scales = cuts or {}, permute, scales
        # What enters a block and what leaves it are there at once.
        limit = budget // (4 if twin else 2)
        self._pruned = Activations("pruned", folder, limit, keep=again)
        self._dense = Activations("dense", folder, limit) if twin else None
        self._streams = [self._pruned] if self._dense is None else [self._pruned, self._dense]
        wrap = saved_wrap(folder, saved["carried"]) if folder and saved else None
        self.batch_size = max(1, batch_tokens // tokens.shape[1])
        if saved:
            self.batch_size = min(self.batch_size, saved["batch_size"])
        self.group, self.count = group, -(-len(tokens) // self.batch_size)
        left_out = unfitted(self.count) if again else frozenset()
        self.sampling = Sampling(paired and twin, bool(cuts), quiet, left_out, group)
        own = parts(len(tokens), self.batch_size, group.rank, group.world_size)
        tokens = tokens[group.rank :: group.world_size]
        self.rehearsal = rehearse(skeleton, tokens, self.batch_size, self._pruned, self._dense, wrap, own)
        short = short_batch(skeleton, tokens, self.rehearsal.wrap) if permute or scales else None
        self.kinds = Kinds(skeleton, chosen, short)
        self._baggage = Baggage(self.rehearsal) if folder else None
        self.uncalled: list[str] = []
        self.rows: list[int] = []
        self.done = 0
        if saved:
            self._load(saved)

    def __len__(self) -> int:
        return len(self.skeleton.blocks)

    def __iter__(self) -> Iterator[Block]:
        for index in range(self.done, len(self)):
            with self.skeleton.loaded(self.skeleton.block_parameters(index)):
                batches = self.rehearsal.batches
                block = Block(self.skeleton, index, batches, self.chosen, self.sampling, self.count)
                yield block
                block.finish()
            self.done = index + 1
            for batch in self.rehearsal.batches:
                batch.calls[index] = batch.dense_calls[index] = SPENT
            for stream in self._streams:
                stream.turn()
            give_back_memory()

    @property
    def unmoved(self) -> list[str]:
        """Why inputs of blocks that were met could not change places at all."""
        return [
            f"no channels of {self.skeleton.block_name(kind)!r} and of blocks like it were reordered: it {reason}"
            for kind, reason in self.kinds.opaque.items()
        ]

    def groups(self, block: Block) -> Iterator[Group]:
        """The groups of a block; blocks of one kind share their call order."""
        order = self.kinds.order(block.index, list(block.layers), block.try_out)
        seen = self.sampling.paired or bool(self.cuts)
        block.landings = self.kinds.landings(block.index, block.try_out) if seen else {}
        self.uncalled += [block.layers[local].name for local in order.uncalled]
        # A paused forward holds the groups' inputs and about as much again: residual, gates, attention.
        forwards = len(self.rehearsal.batches) * (2 if block.twin else 1)
        block.paused = 2 * order.nbytes * forwards <= self.memory
        if self.scales:
            block.scales = self.kinds.scales(block.index)
        if self.permute:
            block.couplings = {c.sink: c for c in self.kinds.couplings(block.index) if block.movable(c)}
        prefix = f"{block.name}."
        block.cuts = {n.removeprefix(prefix): c for n, c in self.cuts.items() if n.startswith(prefix)}
        return block.groups(order.groups)

    def save(self) -> dict[str, Any]:
        """Make durable all that the blocks behind the one at hand need from it and those before; returns it as JSON.

        Raises:
            CannotBeSavedError: blocks hand on what cannot be written.
        """
        assert self.folder is not None
        assert self._baggage is not None
        return {
            "done": self.done + 1,
            "batch_size": self.batch_size,
            "carried": self._baggage.save(self.done + 1, self.folder),
            "hidden": [stream.save() for stream in self._streams],
            "kinds": self.kinds.save(),
            "uncalled": self.uncalled,
            "rows": self.rows,
        }

    def _load(self, saved: dict[str, Any]) -> None:
        assert self.folder is not None
        assert self._baggage is not None
        self.done, self.uncalled = saved["done"], list(saved["uncalled"])
        for stream, hidden in zip(self._streams, saved["hidden"], strict=True):
            stream.load(hidden, self.done, [len(batch.tokens) for batch in self.rehearsal.batches])
        self._baggage.load(self.done, self.folder, saved["carried"])
        self.kinds.load(saved["kinds"])
        for batch in self.rehearsal.batches:
            batch.calls[: self.done] = batch.dense_calls[: self.done] = [SPENT] * self.done
