"""What blocks do to the dense model's residual stream, and how well the block before would compensate their removal."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from llmprune.model.hooks import before, hooked
from llmprune.pruning.blocks.problem import BlockUse
from llmprune.pruning.dense_targets import TARGET_DAMPING
from llmprune.pruning.linalg import inverse_factor, line_minimum
from llmprune.pruning.statistics import HELD_OUT
from llmprune.streaming.block import Block
from llmprune.streaming.statistics import inverse_residual_norm
from llmprune.streaming.stream import BlockStream

TOKENS = 8192
"""About so many tokens are looked at: they are held for several blocks at a time."""
LONGEST = 8
"""The longest run of neighbouring blocks that is considered, unless so many blocks go that longer ones are needed."""
MASSIVE = 10.0
"""A token whose stream grows so many times over a run is not fitted to: nothing linear makes a massive activation."""


def longest_run(blocks: int, removed: int) -> int:
    """The length of the longest run that is considered where some of so many blocks are removed.

    Each run follows a block that stays, so there are `blocks - removed` at most, and they must hold all removed blocks.
    """
    return max(min(LONGEST, removed), -(-removed // (blocks - removed)))


@torch.no_grad()
def block_use(
    stream: BlockStream, longest: int, step: Callable[[], None] = lambda: None
) -> tuple[BlockUse, tuple[str, ...]]:
    """Pass the dense model's blocks once, and fit every run of blocks by the last layer of the block before it.

    A run of blocks adds D to the residual stream; the layer with inputs X that adds to the stream last in the block
    before fits it by `Δ = argmin ‖S(XΔᵀ − D)‖² + λ‖Δ‖²` on three quarters of the tokens, with token weights S, the
    inverse norms of the stream. On the held-out rest the error is the mean over tokens of `‖D − α XΔᵀ‖² / ‖H‖²`, H the
    stream behind the run and α in [0, 1] the best there. Only the smoother `X (XᵀS²X + λI)⁻¹ XᵀS²` from fitted to
    held-out tokens, `(held, fitted)`, is kept for the runs to come.

    Args:
        stream: with the layers chosen that may compensate; nothing is pruned.
        longest: number of blocks of the longest run that is considered.
        step: called after every block.

    Returns:
        the use, and the full names of all layers that add to the residual stream.
    """
    count, adders = len(stream), list[str]()
    influence = torch.zeros(count, dtype=torch.float64)
    repaired = torch.full((count, longest), math.inf, dtype=torch.float64)
    places: deque[_Place] = deque(maxlen=longest)
    for block in stream:
        layers = stream.residual_layers(block)
        adders += [block.layers[local].name for local in layers]
        entered = _hidden(block)
        inputs = _inputs_of(layers[-1], block) if layers else None
        left = _hidden(block)
        influence[block.index] = 1 - functional.cosine_similarity(entered, left, dim=-1).mean(dtype=torch.float64)
        for length, place in enumerate(reversed(places), 1):
            repaired[block.index + 1 - length, length - 1] = place.error(left)
        places.append(_Place(left, None if inputs is None else _smoother(inputs, left)))
        step()
    return BlockUse(influence, repaired), tuple(adders)


@dataclass(frozen=True, slots=True)
class _Place:
    """The residual stream behind a block.

    Args:
        hidden: the stream, `(tokens, width)`, float32.
        smoother: `(held, fitted)`: what the block's last layer predicts for held-out tokens from fitted ones; None
            where it has no layer that could compensate.
    """

    hidden: Tensor
    smoother: Tensor | None

    def error(self, behind: Tensor) -> float:
        """The relative error of the stream behind a run of blocks that follow, once it is removed and compensated.

        Args:
            behind: the dense stream there, `(tokens, width)`.
        """
        missing = behind - self.hidden
        held = _held(len(missing))
        weight = inverse_residual_norm(behind[-held:])
        rest = missing[-held:] * weight
        total = float(rest.square().sum(dtype=torch.float64))
        if self.smoother is not None:
            grown = behind.norm(dim=1) > MASSIVE * self.hidden.norm(dim=1)
            found = (self.smoother @ missing.masked_fill(grown[:, None], 0)[:-held]) * weight
            gain = float((rest * found).sum(dtype=torch.float64))
            cost = float(found.square().sum(dtype=torch.float64))
            strength = line_minimum(gain, cost)
            total += strength * (strength * cost - 2 * gain)
        return total / (held * behind.shape[1])


def _held(tokens: int) -> int:
    return max(int(HELD_OUT * tokens), 1)


def _smoother(inputs: Tensor, hidden: Tensor) -> Tensor:
    """See `block_use`; the diagonal λ is that of the fit of dense targets."""
    held = _held(len(inputs))
    weight = inverse_residual_norm(hidden[:-held]).square()
    fitted = inputs[:-held]
    upper = inverse_factor(fitted.T @ (fitted * weight), TARGET_DAMPING).upper
    return ((inputs[-held:] @ upper.T) @ upper @ fitted.T) * weight.T


def _hidden(block: Block) -> Tensor:
    """The newest hidden states of all tokens, `(tokens, width)`, float32."""
    return torch.cat([batch.hidden.flatten(0, 1).flatten(1) for batch in block.batches]).float()


def _inputs_of(local: str, block: Block) -> Tensor | None:
    """Pass the batches through a block; the inputs of one of its layers, `(tokens, in)`, None if it skips tokens."""
    with _noted(local, block) as found:
        block.finish()
    tokens = sum(batch.tokens.numel() for batch in block.batches)
    inputs = torch.cat(found) if found else torch.empty(0, 1)
    return inputs if len(inputs) == tokens else None


@contextmanager
def _noted(local: str, block: Block) -> Iterator[list[Tensor]]:
    """Within, the inputs of a layer are noted in the order of the tokens in hidden states."""
    found: list[Tensor] = []
    batches = iter(block.batches)

    def note(inputs: Tensor) -> None:
        batch = next(batches)
        native = batch.entered().shape[:2]
        if inputs.numel() // inputs.shape[-1] == batch.tokens.numel():
            rows = batch.axes.stored(inputs.reshape(*native, inputs.shape[-1]))
            found.append(rows.flatten(0, 1).float().cpu())

    with hooked([before(block.module.get_submodule(local), note)]):
        yield found
