"""Everything but the blocks, run once: the first hidden states, and what every block is called with.

Masks and rotary tables differ from block to block and from model to model, so each block's own arguments are recorded
by running the model with its blocks replaced by identities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.errors import InputError
from llmprune.model.skeleton import Skeleton
from llmprune.streaming.activations import Activations
from llmprune.streaming.batch_shards import Part, parts


class Stop(Exception):
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


SPENT = Call((), {})
"""Stands where a block's arguments were, once they are no longer needed."""


def own_state(calls: list[Call]) -> list[Call]:
    """The same arguments, but with mappings of their own: some models carry state from block to block in them."""
    copies: dict[int, MutableMapping[Any, Any]] = {}

    def own(value: Any) -> Any:
        return copies.setdefault(id(value), copy(value)) if isinstance(value, MutableMapping) else value

    return [Call(tuple(map(own, call.args)), {key: own(value) for key, value in call.kwargs.items()}) for call in calls]


def leaves_behind(call: Call, block: nn.Module, hidden: Tensor) -> tuple[Any, Any, Any]:
    """A block's output, and its arguments: some hold state that goes on to later blocks."""
    (own,) = own_state([call])
    return own.run(block, hidden), own.args, own.kwargs


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a block's output; some blocks return a tuple."""
    result = output if isinstance(output, Tensor) else output[0]
    assert isinstance(result, Tensor)
    return result


@dataclass(slots=True)
class Batch:
    """A few calibration sequences on their way through the model.

    Args:
        tokens: `(batch, length)`, int64.
        calls: every block's other arguments.
        dense_calls: the arguments of the dense model's blocks.
        number: of the batch in the streams.
        streams: where its hidden states rest, and those of the dense model if they travel along.
        part: which windows of a batch of all processes these are.
    """

    tokens: Tensor
    calls: list[Call]
    dense_calls: list[Call]
    number: int
    streams: tuple[Activations, Activations | None]
    part: Part

    @property
    def fitted(self) -> int:
        """How many of its tokens statistics are fitted to; the rest is held out."""
        return self.part.fitted(self.tokens.shape[1])

    @property
    def hidden(self) -> Tensor:
        """`(batch, length, hidden)`, what the blocks so far made of the tokens."""
        return self.streams[0].newest(self.number)

    @property
    def dense(self) -> Tensor | None:
        """What the dense model's blocks made of them, or None."""
        return None if self.streams[1] is None else self.streams[1].newest(self.number)

    def entered(self, dense: bool = False) -> Tensor:
        """What entered the block at hand, in the pruned model or in the dense one."""
        return self._stream(dense).entered(self.number)

    def leave(self, hidden: Tensor, dense: bool = False) -> None:
        """The block at hand has made this of it."""
        self._stream(dense).put(self.number, hidden)

    def _stream(self, dense: bool) -> Activations:
        stream = self.streams[dense]
        assert stream is not None
        return stream


@contextmanager
def _forwards_replaced(blocks: nn.ModuleList, make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Replace every block's forward; the modules stay, because models read their attributes."""
    for index, block in enumerate(blocks):
        block.forward = make(index)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@dataclass(frozen=True, slots=True)
class Wrap:
    """Turns hidden states into what the model expects a block to return.

    Args:
        rest: what stands behind them in a tuple; None where blocks return a bare tensor.
    """

    rest: tuple[Any, ...] | None

    def __call__(self, hidden: Tensor) -> Any:
        """The return value."""
        return hidden if self.rest is None else (hidden, *self.rest)


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a run of everything but the blocks found out.

    Args:
        batches: the tokens, cut into batches, with their first hidden states.
        wrap: how blocks return their hidden states.
    """

    batches: list[Batch]
    wrap: Wrap


@torch.no_grad()
def rehearse(
    skeleton: Skeleton,
    tokens: Tensor,
    batch_size: int,
    pruned: Activations | None = None,
    dense: Activations | None = None,
    wrap: Wrap | None = None,
    own: Sequence[Part] = (),
) -> Rehearsal:
    """Run all that comes before the blocks, and record what each block is called with.

    The model runs with the blocks replaced by identities that note their arguments; masks and rotary tables differ
    from block to block and from model to model, so every block's own are kept (equal ones once).

    Args:
        skeleton: the model.
        tokens: `(samples, length)`, int64.
        batch_size: samples per batch.
        pruned: where the hidden states rest; None for memory.
        dense: where those of the dense model rest, if they are to travel along.
        wrap: how blocks return their hidden states; None to run the first block and see.
        own: what of every batch the tokens are; by default all of it.
    """
    own = own or parts(len(tokens), batch_size)
    streams = (pruned or Activations(), dense)
    batches: list[Batch] = []
    with skeleton.loaded(skeleton.before_blocks()):
        wrap = wrap or _probe_output(skeleton, tokens[:1])
        for part, windows in zip(own, torch.split(tokens, [len(part.own) for part in own]), strict=True):
            hidden, calls = _record(skeleton, windows, wrap)
            known = [batch.calls for batch in batches if batch.tokens.shape == windows.shape][:1]
            for earlier in known:
                calls = [old if old.same(new) else new for old, new in zip(earlier, calls, strict=True)]
            for stream in filter(None, streams):
                stream.append(hidden)
            batches.append(Batch(windows, calls, own_state(calls), len(batches), streams, part))
    return Rehearsal(batches, wrap)


def _record(skeleton: Skeleton, tokens: Tensor, wrap: Wrap) -> tuple[Tensor, list[Call]]:
    calls: list[Call] = []
    seen: list[Tensor] = []
    last = len(skeleton.blocks) - 1

    def recorder(index: int) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            hidden, call = Call.split(args, kwargs)
            seen.append(hidden)
            calls.append(call)
            if index == last:
                raise Stop
            return wrap(hidden)

        return record

    with _forwards_replaced(skeleton.blocks, recorder):
        try:
            skeleton.model(input_ids=tokens.to(skeleton.device), use_cache=False)
        except Stop:
            pass
    if len(calls) != len(skeleton.blocks) or any(hidden.data_ptr() != seen[0].data_ptr() for hidden in seen):
        raise InputError(
            f"{type(skeleton.model).__name__} does not call its {len(skeleton.blocks)} blocks one after the other",
            "only models whose blocks form a plain chain can be streamed",
        )
    return seen[0].detach().clone().cpu(), calls


def _probe_output(skeleton: Skeleton, sample: Tensor) -> Wrap:
    """How the blocks return their hidden states, learnt by running the first one on one sequence."""
    outputs: list[Any] = []
    first = skeleton.blocks[0]
    forward = first.forward

    def stop_after_first(index: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            outputs.append(forward(*args, **kwargs))
            raise Stop

        return run

    with skeleton.loaded(skeleton.block_parameters(0)), _forwards_replaced(skeleton.blocks, stop_after_first):
        try:
            skeleton.model(input_ids=sample.to(skeleton.device), use_cache=False)
        except Stop:
            pass
    output = outputs[0]
    return Wrap(None if isinstance(output, Tensor) else tuple(output[1:]))


@torch.no_grad()
def logits(skeleton: Skeleton, tokens: Tensor, hidden: Tensor, wrap: Wrap) -> Tensor:
    """What the model makes of the last block's output; the outside parameters must be loaded.

    Args:
        skeleton: the model.
        tokens: `(batch, length)`.
        hidden: the last block's output, `(batch, length, hidden)`.
        wrap: the blocks' return convention.
    """
    with _forwards_replaced(skeleton.blocks, lambda _: lambda *args, **kwargs: wrap(hidden)):
        result = skeleton.model(input_ids=tokens.to(skeleton.device), use_cache=False).logits
    assert isinstance(result, Tensor)
    return result
