"""Calibration batches on their way through the blocks, and the arguments that every block is called with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.errors import InputError
from llmprune.streaming.activations import Activations
from llmprune.streaming.batch_shards import Shard


class StopForward(Exception):
    """Ends a forward early."""


@dataclass(frozen=True, slots=True)
class Axes:
    """The dimensions of windows and of tokens in the hidden states that the blocks of a model take and return.

    Between blocks they are kept as `(batch, tokens, ...)`, whatever the model does.
    """

    batch: int = 0
    tokens: int = 1

    def stored(self, hidden: Tensor) -> Tensor:
        """Hidden states as `(batch, tokens, ...)`, from those of the model."""
        return self._moved(hidden, (self.batch, self.tokens), (0, 1))

    def native(self, hidden: Tensor) -> Tensor:
        """The inverse of `stored`."""
        return self._moved(hidden, (0, 1), (self.batch, self.tokens))

    def _moved(self, hidden: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
        return hidden if self == Axes() else hidden.movedim(source, target).contiguous()


@dataclass(frozen=True, slots=True)
class Carried:
    """An argument of a block that an earlier block returned behind its hidden states.

    Args:
        key: number of that block, and of the entry.
        example: what stands for it where the earlier block has not run.
    """

    key: tuple[int, int]
    example: Any


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of a block's forward, except the hidden states.

    Args:
        args: by position.
        kwargs: by name.
        index: number of the block.
        kept: numbers of the entries behind its hidden states that later blocks take.
        returned: those of all blocks so far, by `Carried.key`; the calls of a batch share it.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int = 0
    kept: tuple[int, ...] = ()
    returned: MutableMapping[tuple[int, int], Any] = field(default_factory=dict)

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
        """Take the hidden states out of a block's arguments.

        Raises:
            InputError: there are none.
        """
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor):
            raise InputError(
                f"its blocks are called with {type(hidden).__name__} in place of hidden states",
                "only models whose blocks take and return hidden states can be streamed",
            )
        return hidden, cls(args[1:], {key: value for key, value in kwargs.items() if args or key != "hidden_states"})

    @property
    def values(self) -> Iterator[Any]:
        """All arguments."""
        yield from self.args
        yield from self.kwargs.values()

    @property
    def taken(self) -> set[tuple[int, int]]:
        """The keys of what earlier blocks returned for this one."""
        return {value.key for value in self.values if isinstance(value, Carried)}

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        """The block's own output for these hidden states."""
        call = self.changed(lambda value: self._resolved(value, hidden.device))
        output = block(hidden, *call.args, **call.kwargs)
        for entry in self.kept:
            value = output[1 + entry]
            self.returned[self.index, entry] = value.detach().cpu() if isinstance(value, Tensor) else value
        return output

    def _resolved(self, value: Any, device: torch.device) -> Any:
        if not isinstance(value, Carried):
            return value
        found = self.returned.get(value.key, value.example)
        return found.to(device) if isinstance(found, Tensor) else found

    def changed(self, change: Callable[[Any], Any]) -> Call:
        """The call with other arguments in place of these."""
        return replace(
            self, args=tuple(map(change, self.args)), kwargs={key: change(value) for key, value in self.kwargs.items()}
        )

    def sharing(self, other: Call) -> Call:
        """The call with the other's objects in place of equal arguments, so that they are held once."""
        if len(self.args) != len(other.args) or self.kwargs.keys() != other.kwargs.keys():
            return self
        pairs = [(value, other.kwargs[key]) for key, value in self.kwargs.items()]
        known = {id(a): b for a, b in [*zip(self.args, other.args, strict=True), *pairs] if _same(a, b)}
        return self.changed(lambda value: known.get(id(value), value))


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


def release(calls: list[Call], index: int) -> None:
    """Forget the arguments of a block that has run, and what no later block takes of those before."""
    returned, calls[index] = calls[index].returned, RELEASED
    needed = {key for call in calls[index + 1 :] for key in call.taken}
    for key in returned.keys() - needed:
        del returned[key]


def own_state(calls: list[Call]) -> list[Call]:
    """Copies of calls with mappings of their own: some models carry state from block to block in them."""
    copies: dict[int, MutableMapping[Any, Any]] = {}

    def own(value: Any) -> Any:
        return copies.setdefault(id(value), copy(value)) if isinstance(value, MutableMapping) else value

    return [replace(call.changed(own), returned=own(call.returned)) for call in calls]


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
        axes: of the hidden states that blocks take.
        gap: what the removed blocks right behind the current one add to the dense model's stream; None without
            such.
    """

    tokens: Tensor
    calls: list[Call]
    dense_calls: list[Call]
    number: int
    streams: tuple[Activations, Activations | None]
    shard: Shard
    axes: Axes = field(default_factory=Axes)
    gap: Activations | None = None

    @property
    def fitted(self) -> int:
        """Number of tokens that are fitted to; those behind them are held out."""
        return self.shard.fitted(self.tokens.shape[1])

    @property
    def hidden(self) -> Tensor:
        """Newest hidden states of the pruned model, `(batch, length, ...)`."""
        return self.streams[0].newest(self.number)

    @property
    def dense(self) -> Tensor | None:
        """Newest hidden states of the dense model, `(batch, length, ...)`, or None."""
        return None if self.streams[1] is None else self.streams[1].newest(self.number)

    def entered(self, dense: bool = False) -> Tensor:
        """Input of the current block, in the pruned model or in the dense one, as the block takes it."""
        return self.axes.native(self._stream(dense).entered(self.number))

    def leave(self, hidden: Tensor, dense: bool = False) -> None:
        """Store the output of the current block, as the block returns it; the dense one passes removed blocks, too."""
        stored = self.axes.stored(hidden)
        if dense and self.gap is not None:
            stored = stored + self.gap.newest(self.number)
        self._stream(dense).put(self.number, stored)

    def added_behind(self) -> Tensor | None:
        """What removed blocks right behind add to the dense model's stream, `(tokens, ...)` as the block returns it."""
        return None if self.gap is None else self.axes.native(self.gap.newest(self.number))

    def release(self, index: int) -> None:
        """Forget the arguments of a block that has run."""
        for calls in (self.calls, self.dense_calls):
            release(calls, index)

    def _stream(self, dense: bool) -> Activations:
        stream = self.streams[dense]
        assert stream is not None
        return stream
