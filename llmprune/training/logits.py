"""A language model in two parts, hidden states and the head behind them: its logits are never all in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

CHUNK_ELEMENTS = 2**24
"""Logits that are formed together."""
PROBE = 4


@dataclass(frozen=True, slots=True)
class TwoParts:
    """A causal language model as `head(trunk(tokens))`.

    Args:
        trunk: from `(windows, length)`, int64, to hidden states `(windows, length, hidden)`.
        head: from hidden states `(positions, hidden)` to logits `(positions, vocabulary)`.
        parameters: those of the head.
        vocabulary: number of logits.
    """

    trunk: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    parameters: tuple[nn.Parameter, ...]
    vocabulary: int

    def chunks(self, positions: int) -> Iterator[slice]:
        """Ranges of positions whose logits are formed together."""
        size = max(1, CHUNK_ELEMENTS // self.vocabulary)
        return (slice(start, min(start + size, positions)) for start in range(0, positions, size))


@torch.no_grad()
def two_parts(model: nn.Module, device: torch.device) -> TwoParts:
    """The two parts of a model, which is tried on a few tokens.

    Where its output embeddings do not make its logits of its last hidden states (some models scale or cap logits), the
    trunk is the whole model, and the head changes nothing.

    Args:
        model: of transformers; its weights are in memory.
        device: of its inputs.
    """

    def whole(tokens: Tensor) -> Tensor:
        found: Tensor = model(input_ids=tokens, use_cache=False).logits
        return found

    probe = torch.arange(PROBE, device=device)[None]
    training = model.training
    model.eval()
    wanted = whole(probe)
    vocabulary = wanted.shape[-1]
    head = model.get_output_embeddings()  # type: ignore[operator]
    base = model.base_model
    assert isinstance(base, nn.Module)

    def trunk(tokens: Tensor) -> Tensor:
        found: Tensor = base(input_ids=tokens, use_cache=False).last_hidden_state
        return found

    try:
        split = base is not model and torch.allclose(head(trunk(probe)), wanted, rtol=1e-4, atol=1e-4)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        split = False
    model.train(training)
    if not split:
        return TwoParts(whole, lambda logits: logits, (), vocabulary)
    return TwoParts(trunk, head, tuple(head.parameters()), vocabulary)
