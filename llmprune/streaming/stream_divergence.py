"""How far the next-token distribution at the end of a stream is from the dense model's."""

from __future__ import annotations

from collections.abc import Collection

import torch

from llmprune.streaming.capture import logits
from llmprune.streaming.perplexity import CHUNK_ELEMENTS
from llmprune.streaming.stream import BlockStream
from llmprune.training.divergence import divergence


@torch.no_grad()
def stream_divergence(stream: BlockStream, batches: Collection[int]) -> float:
    """The mean over positions of `Σ p (log p − log q)`, p of the dense model and q of the pruned one.

    Args:
        stream: behind its last block, with the dense stream beside it.
        batches: numbers of the batches that count.
    """
    skeleton, wrap = stream.skeleton, stream.inputs.wrap
    total = positions = 0.0
    with skeleton.loaded(skeleton.outside()):
        for batch in stream.inputs.batches:
            if batch.shard.batch not in batches:
                continue
            dense = batch.dense
            assert dense is not None
            windows, length = batch.tokens.shape
            chunk = max(1, CHUNK_ELEMENTS // (windows * skeleton.config.get_text_config().vocab_size))
            for start in range(0, length, chunk):
                part = slice(start, start + chunk)
                pruned, wanted = (
                    logits(skeleton, batch.tokens[:, part], hidden[:, part].to(skeleton.device), wrap).float()
                    for hidden in (batch.hidden, dense)
                )
                total += float(divergence(pruned.flatten(0, 1), wanted.flatten(0, 1)))
            positions += windows * length
    return total / positions
