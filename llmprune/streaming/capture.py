"""Captures block inputs: the hidden states that enter the first block, and the arguments of every block.

Masks and rotary tables differ from block to block and from model to model, so each block's own arguments are recorded
by running the model with its blocks replaced by identities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.errors import InputError, PruneError
from llmprune.model.auto_class import WRAPPER, auto_class
from llmprune.model.skeleton import Skeleton
from llmprune.model.tower import TEXT_ALONE
from llmprune.runtime.foreign import reason
from llmprune.runtime.oom import out_of_memory
from llmprune.streaming.activations import Activations
from llmprune.streaming.batch import Axes, Batch, Call, Carried, StopForward, own_state
from llmprune.streaming.batch_shards import Shard, whole_batches

PROBE = 8
"""Tokens that are enough to see how blocks take and return hidden states."""


@contextmanager
def forwards_replaced(blocks: nn.ModuleList, make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of every block within; the modules stay, because models read their attributes."""
    for index, block in enumerate(blocks):
        block.forward = make(index)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@dataclass(frozen=True, slots=True)
class Wrap:
    """Wraps hidden states as the blocks of a model return them.

    Args:
        rest: the entries of a tuple behind the hidden states; None where blocks return a bare tensor.
        axes: of the hidden states.
    """

    rest: tuple[Any, ...] | None
    axes: Axes = field(default_factory=Axes)

    def __call__(self, hidden: Tensor) -> Any:
        """The return value; tensors behind the hidden states are new objects every time, so that each can be told."""
        if self.rest is None:
            return hidden
        return (hidden, *(value.detach() if isinstance(value, Tensor) else value for value in self.rest))


@dataclass(frozen=True, slots=True)
class BlockInputs:
    """The inputs of all blocks.

    Args:
        batches: the tokens, cut into batches, with their first hidden states.
        wrap: how blocks return their hidden states.
    """

    batches: list[Batch]
    wrap: Wrap


@torch.no_grad()
def capture_block_inputs(
    skeleton: Skeleton,
    tokens: Tensor,
    batch_size: int,
    pruned: Activations | None = None,
    dense: Activations | None = None,
    wrap: Wrap | None = None,
    shards: Sequence[Shard] = (),
) -> BlockInputs:
    """The hidden states that enter the first block, and the arguments of every block.

    The model runs with the blocks replaced by identities that note their arguments; masks and rotary tables differ
    from block to block and from model to model, so every block's own are kept (equal ones once).

    Args:
        skeleton: the model.
        tokens: `(samples, length)`, int64.
        batch_size: samples per batch.
        pruned: stores the hidden states of the pruned model; None for memory.
        dense: stores those of the dense model, if it is streamed in parallel.
        wrap: how blocks return their hidden states; None to find out by running the first block.
        shards: which windows of every batch the tokens are; by default all of them.
    """
    shards = shards or whole_batches(len(tokens), batch_size)
    streams = (pruned or Activations(), dense)
    batches: list[Batch] = []
    with skeleton.loaded(skeleton.before_blocks()):
        wrap = wrap or _probe_output(skeleton, tokens[:1])
        for shard, windows in zip(shards, torch.split(tokens, [len(shard.own) for shard in shards]), strict=True):
            hidden, calls = _record(skeleton, windows, wrap)
            known = [batch.calls for batch in batches if batch.tokens.shape == windows.shape][:1]
            for earlier in known:
                calls = [new.sharing(old) for old, new in zip(earlier, calls, strict=True)]
            for stream in filter(None, streams):
                stream.append(wrap.axes.stored(hidden))
            batches.append(Batch(windows, calls, own_state(calls), len(batches), streams, shard, wrap.axes))
    return BlockInputs(batches, wrap)


def run_model(skeleton: Skeleton, tokens: Tensor) -> Any:
    """What the model returns, or None where its replaced blocks end the forward.

    Raises:
        InputError: it cannot run with the settings of its config.
    """
    try:
        return skeleton.model(input_ids=tokens.to(skeleton.device), use_cache=False)
    except StopForward:
        return None
    except PruneError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        if auto_class(skeleton.config) == WRAPPER:
            name = type(skeleton.model).__name__
            raise InputError(f"{name} cannot run on text alone: {reason(error)}", TEXT_ALONE) from error
        raise InputError(
            f"{type(skeleton.model).__name__} cannot run with the settings of its config: {reason(error)}",
            "the config is damaged, or of another version of the model",
        ) from error


def _record(skeleton: Skeleton, tokens: Tensor, wrap: Wrap) -> tuple[Tensor, list[Call]]:
    calls: list[Call] = []
    seen: list[Tensor] = []
    returned: list[tuple[Any, ...]] = []
    last = len(skeleton.blocks) - 1

    def recorder(index: int) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            hidden, call = Call.split(args, kwargs)
            seen.append(hidden)
            calls.append(call)
            if index == last:
                raise StopForward
            output = wrap(hidden)
            returned.append(output[1:] if wrap.rest else ())
            return output

        return record

    with forwards_replaced(skeleton.blocks, recorder):
        run_model(skeleton, tokens)
    if len(calls) != len(skeleton.blocks) or any(hidden.data_ptr() != seen[0].data_ptr() for hidden in seen):
        raise InputError(
            f"{type(skeleton.model).__name__} does not call its {len(skeleton.blocks)} blocks one after the other",
            "only models whose blocks form a plain chain can be streamed",
        )
    return seen[0].detach().clone().cpu(), _linked(calls, returned)


def _linked(calls: list[Call], returned: Sequence[tuple[Any, ...]]) -> list[Call]:
    """The calls, with `Carried` where an argument is the very object that an earlier block returned."""
    keys = {
        id(value): (block, entry)
        for block, rest in enumerate(returned)
        for entry, value in enumerate(rest)
        if isinstance(value, Tensor)
    }
    linked = [
        call.changed(lambda value: Carried(keys[id(value)], value) if id(value) in keys else value) for call in calls
    ]
    taken = sorted({key for call in linked for key in call.taken})
    values: dict[tuple[int, int], Any] = {}
    return [
        replace(call, index=at, kept=tuple(entry for block, entry in taken if block == at), returned=values)
        for at, call in enumerate(linked)
    ]


def _probe_output(skeleton: Skeleton, sample: Tensor) -> Wrap:
    """How the blocks take and return hidden states, found by running the first one on one sequence."""
    output = _at_first_block(skeleton, sample, lambda forward, args, kwargs: forward(*args, **kwargs))
    if not isinstance(output, Tensor) and (type(output) not in {tuple, list} or not isinstance(output[0], Tensor)):
        raise InputError(
            f"the blocks of {type(skeleton.model).__name__} return {type(output).__name__}, not hidden states",
            "only models whose blocks take and return hidden states can be streamed",
        )
    return Wrap(None if isinstance(output, Tensor) else tuple(output[1:]), _probe_axes(skeleton, sample))


def _probe_axes(skeleton: Skeleton, sample: Tensor) -> Axes:
    """The dimensions of windows and tokens: those that change with their numbers.

    Raises:
        InputError: the hidden states have no such dimensions.
    """
    one = sample[:1, :PROBE]
    two = one.repeat(2, 2)[:, : max(one.shape[1] - 1, 2)]
    shapes = [
        _at_first_block(skeleton, tokens, lambda _, args, kwargs: Call.split(args, kwargs)[0].shape)
        for tokens in (one, two)
    ]
    pairs = list(enumerate(zip(*shapes, strict=True))) if len(shapes[0]) == len(shapes[1]) else []
    found = [[axis for axis, sizes in pairs if sizes == wanted] for wanted in zip(one.shape, two.shape, strict=True)]
    if [len(axes) for axes in found] != [1, 1]:
        raise InputError(
            f"the blocks of {type(skeleton.model).__name__} take hidden states of shapes {tuple(shapes[0])} and "
            f"{tuple(shapes[1])} for tokens of shapes {tuple(one.shape)} and {tuple(two.shape)}",
            "only models whose blocks take one hidden state for every token can be streamed",
        )
    return Axes(found[0][0], found[1][0])


def _at_first_block(skeleton: Skeleton, sample: Tensor, take: Callable[..., Any]) -> Any:
    """What `take(forward, args, kwargs)` makes of the first block's call; the model's forward ends there."""
    found: list[Any] = []
    forward = skeleton.blocks[0].forward

    def stop_after_first(index: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            found.append(take(forward, args, kwargs))
            raise StopForward

        return run

    with skeleton.loaded(skeleton.block_parameters(0)), forwards_replaced(skeleton.blocks, stop_after_first):
        run_model(skeleton, sample)
    return found[0]


@torch.no_grad()
def logits(skeleton: Skeleton, tokens: Tensor, hidden: Tensor, wrap: Wrap) -> Tensor:
    """Logits from the last block's output; the parameters outside the blocks must be loaded.

    Args:
        skeleton: the model.
        tokens: `(batch, length)`.
        hidden: the last block's output, `(batch, length, ...)`.
        wrap: the blocks' return convention.
    """
    native = wrap.axes.native(hidden)
    with forwards_replaced(skeleton.blocks, lambda _: lambda *args, **kwargs: wrap(native)):
        result = run_model(skeleton, tokens).logits
    assert isinstance(result, Tensor)
    return result
