"""Perplexity the way the literature measures it, streamed block by block."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from llmprune.errors import InputError
from llmprune.model.skeleton import Skeleton
from llmprune.streaming.capture import Wrap, logits
from llmprune.streaming.stream import BlockStream, Resources

CHUNK_ELEMENTS = 2**25
MAX_LOSS = 700.0  # beyond this, exp leaves the range of floats


@dataclass(frozen=True, slots=True)
class Perplexity:
    """`exp` of the mean cross-entropy per token.

    Args:
        value: the perplexity.
        error: its standard error, from the spread over windows (0 with a single window).
        windows: number of windows.
        context: tokens per window.
    """

    value: float
    error: float
    windows: int
    context: int

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.error:.2f}"


def from_losses(losses: Tensor, context: int) -> Perplexity:
    """Perplexity from the mean loss of every window, `(windows,)`, in nats per token."""
    mean = float(losses.double().mean())
    value = math.exp(min(mean, MAX_LOSS))
    spread = float(losses.double().std()) / math.sqrt(len(losses)) if len(losses) > 1 else 0.0
    return Perplexity(value, min(value * spread, sys.float_info.max), len(losses), context)


@torch.no_grad()
def perplexity(
    skeleton: Skeleton,
    tokens: Tensor,
    step: Callable[[], None] = lambda: None,
    resources: Resources | None = None,
    bos_tokens: int = 0,
) -> Perplexity:
    """Perplexity of a model on non-overlapping windows, each predicted on its own (as SparseGPT and Wanda measure it).

    Behind BOS every token of the text is predicted, without it every one but the first.

    Args:
        skeleton: the model; one block at a time is in memory.
        tokens: `(windows, context)`, int64.
        step: called after every block and once at the end.
        resources: memory and files of the stream.
        bos_tokens: tokens that every window begins with before its text; they are given and not predicted.
    """
    stream = BlockStream(skeleton, tokens, resources=resources)
    for _ in stream:
        step()
    with skeleton.loaded(skeleton.outside()):
        losses = [
            window_losses(skeleton, batch.tokens, batch.hidden, stream.inputs.wrap, bos_tokens)
            for batch in stream.inputs.batches
        ]
    step()
    return from_losses(torch.cat(losses), tokens.shape[1])


def first_predicted(bos_tokens: int) -> int:
    """The position of the first token of a window that is predicted."""
    return max(bos_tokens, 1)


def window_losses(skeleton: Skeleton, tokens: Tensor, hidden: Tensor, wrap: Wrap, bos_tokens: int = 0) -> Tensor:
    """Mean next-token cross-entropy of every window, `(batch,)`; logits are formed for a few positions at a time.

    Args:
        skeleton: the model, its outside parameters loaded.
        tokens: `(batch, context)`.
        hidden: the last block's output, `(batch, context, hidden)`.
        wrap: the blocks' return convention.
        bos_tokens: tokens that every window begins with before its text; they are not predicted.
    """
    batch, context = tokens.shape
    first = first_predicted(bos_tokens) - 1
    chunk = max(1, CHUNK_ELEMENTS // (batch * skeleton.config.get_text_config().vocab_size))
    total = torch.zeros(batch, dtype=torch.float64)
    for start in range(first, context - 1, chunk):
        stop = min(start + chunk, context - 1)
        scores = logits(skeleton, tokens[:, start:stop], hidden[:, start:stop].to(skeleton.device), wrap).float()
        targets = tokens[:, start + 1 : stop + 1].to(scores.device)
        loss = functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none")
        total += loss.view(batch, -1).sum(1, dtype=torch.float64).cpu()
    if not bool(torch.isfinite(total).all()):
        raise InputError(
            f"the logits of {type(skeleton.model).__name__} hold NaN or Inf",
            "the last norm or the head overflows on this text; check the checkpoint",
        )
    return total / (context - 1 - first)
