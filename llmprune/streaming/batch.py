"""Calibration batches on their way through the blocks, and the arguments that every block is called with."""

from __future__ import annotations

from collections.abc import MutableMapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.streaming.activations import Activations
from llmprune.streaming.batch_shards import Shard


class StopForward(Exception):
    """Ends a forward early."""


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of a block's forward, except the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
        """Take the hidden states `(batch, tokens, hidden)` out of a block's arguments."""
        if args:
            return args[0], cls(args[1:], kwargs)
        return kwargs["hidden_states"], cls((), {k: v for k, v in kwargs.items() if k != "hidden_states"})

    def run(self, block: nn.Module, hidden: Tensor) -> Any:
        """The block's own output for these hidden states."""
        return block(hidden, *self.args, **self.kwargs)

    def same(self, other: Call) -> bool:
        """Whether two calls have equal arguments."""
        return _same(self.args, other.args) and _same(self.kwargs, other.kwargs)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    # A mapping may carry state from block to block (shared keys and values), so every batch needs its own.
    if isinstance(a, MutableMapping):
        return bool(a) and bool(b) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return isinstance(a, bool | int | float | str) and bool(a == b)


RELEASED = Call((), {})
"""Stands in for the arguments of a block that has run."""


def own_state(calls: list[Call]) -> list[Call]:
    """Copies of calls with mappings of their own: some models carry state from block to block in them."""
    copies: dict[int, MutableMapping[Any, Any]] = {}

    def own(value: Any) -> Any:
        return copies.setdefault(id(value), copy(value)) if isinstance(value, MutableMapping) else value

    return [Call(tuple(map(own, call.args)), {key: own(value) for key, value in call.kwargs.items()}) for call in calls]


def run_isolated(call: Call, block: nn.Module, hidden: Tensor) -> tuple[Any, Any, Any]:
    """A block's output and the arguments that it has written into; those of the call stay as they are."""
    (own,) = own_state([call])
    return own.run(block, hidden), own.args, own.kwargs


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a block's output, which may be a tuple."""
    result = output if isinstance(output, Tensor) else output[0]
    assert isinstance(result, Tensor)
    return result


@dataclass(slots=True)
class Batch:
    """A few calibration windows on their way through the model.

    Args:
        tokens: `(batch, length)`, int64.
        calls: the arguments of every block except the hidden states.
        dense_calls: the same for the dense model's forwards.
        number: of the batch in the streams.
        streams: its hidden states in the pruned model, and in the dense model if that is streamed in parallel.
        shard: which windows of a batch of all processes these are.
    """

    tokens: Tensor
    calls: list[Call]
    dense_calls: list[Call]
    number: int
    streams: tuple[Activations, Activations | None]
    shard: Shard

    @property
    def fitted(self) -> int:
        """Number of tokens that are fitted to; those behind them are held out."""
        return self.shard.fitted(self.tokens.shape[1])

    @property
    def hidden(self) -> Tensor:
        """Newest hidden states of the pruned model, `(batch, length, hidden)`."""
        return self.streams[0].newest(self.number)

    @property
    def dense(self) -> Tensor | None:
        """Newest hidden states of the dense model, or None."""
        return None if self.streams[1] is None else self.streams[1].newest(self.number)

    def entered(self, dense: bool = False) -> Tensor:
        """Input of the current block, in the pruned model or in the dense one."""
        return self._stream(dense).entered(self.number)

    def leave(self, hidden: Tensor, dense: bool = False) -> None:
        """Store the output of the current block."""
        self._stream(dense).put(self.number, hidden)

    def _stream(self, dense: bool) -> Activations:
        stream = self.streams[dense]
        assert stream is not None
        return stream
