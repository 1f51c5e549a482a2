"""Blocks that are removed: the dense model's activations pass them before the block in front of them is solved."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from llmprune.errors import InputError
from llmprune.model.skeleton import Skeleton
from llmprune.streaming.activations import Activations
from llmprune.streaming.batch import hidden_of, own_state
from llmprune.streaming.block import Block
from llmprune.streaming.block_types import short_batch
from llmprune.structure.fewer_blocks import HINT


def check_separate(skeleton: Skeleton, tokens: Tensor) -> None:
    """Refuse models whose blocks take what earlier ones have made beside the hidden states, such as shared keys.

    Args:
        skeleton: the model.
        tokens: `(samples, length)`, of which a few are run up to the first block.

    Raises:
        InputError: naming the first such block.
    """
    for call in short_batch(skeleton, tokens).calls:
        if call.taken or call.kept:
            model = type(skeleton.model).__name__
            raise InputError(f"block {call.index} of {model} shares more than hidden states with other blocks", HINT)


@torch.no_grad()
def pass_removed(block: Block, gap: Iterable[int], dense: Activations | None) -> None:
    """Pass the dense activations through a block and those that are removed behind it, and note what the latter add.

    The block itself is not changed yet; its batches stay before it, with `Batch.gap` set.

    Args:
        block: in memory.
        gap: numbers of the removed blocks.
        dense: the dense model's activations; None where they are not streamed, and nothing is compensated.
    """
    numbers, skeleton = list(gap), block.skeleton
    if not numbers or dense is None:
        return
    ahead, added = (Activations(name, dense.folder, dense.limit) for name in ("ahead", "gap"))
    for batch in block.batches:
        first = batch.axes.stored(block.checked_output(batch, dense=True)).cpu()
        ahead.append(first)
        added.append(-first)
    for index in numbers:
        with skeleton.loaded(skeleton.block_parameters(index)):
            for batch in block.batches:
                (call,) = own_state([batch.dense_calls[index]])
                entered = batch.axes.native(ahead.entered(batch.number)).to(skeleton.device)
                ahead.put(batch.number, batch.axes.stored(hidden_of(call.run(skeleton.blocks[index], entered))).cpu())
        ahead.turn()
    for batch in block.batches:
        added.put(batch.number, added.entered(batch.number) + ahead.entered(batch.number))
        batch.gap = added
