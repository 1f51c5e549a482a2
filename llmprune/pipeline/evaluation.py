"""The perplexity of a model that is streamed, with fewer windows at a time where memory does not suffice."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from llmprune.model.skeleton import Skeleton
from llmprune.progress import Progress
from llmprune.runtime.oom import with_oom_retry
from llmprune.sources.tokens import TokenBatch
from llmprune.streaming.perplexity import Perplexity, perplexity
from llmprune.streaming.stream import BATCH_TOKENS, Resources


def measured(
    skeleton: Skeleton, batch: TokenBatch, folder: Path, memory: int, told: tuple[Progress, str]
) -> Perplexity:
    """The perplexity of a model on windows of text.

    Args:
        skeleton: the model.
        batch: the windows.
        folder: for hidden states that exceed the memory.
        memory: bytes of hidden states that are kept in memory.
        told: what is told of every block, and under which label.
    """
    progress, label = told
    windows, length = batch.tokens.shape

    def attempt(at_once: int) -> Perplexity:
        progress.start(label, len(skeleton.blocks) + 1)
        with TemporaryDirectory(dir=folder) as spare:
            resources = Resources(at_once * length, None, memory, Path(spare))
            result = perplexity(skeleton, batch.tokens, progress.step, resources, batch.bos_tokens)
        progress.finish()
        return result

    return with_oom_retry(attempt, min(max(BATCH_TOKENS // length, 1), windows), progress)
