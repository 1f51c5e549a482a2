"""Captures block inputs: the hidden states that enter the first block, and the arguments of every block.

Masks and rotary tables differ from block to block and from model to model, so each block's own arguments are recorded
by running the model with its blocks replaced by identities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.errors import InputError, PruneError
from llmprune.model.skeleton import Skeleton
from llmprune.runtime.foreign import reason
from llmprune.runtime.oom import out_of_memory
from llmprune.streaming.activations import Activations
from llmprune.streaming.batch import Batch, Call, StopForward, own_state
from llmprune.streaming.batch_shards import Shard, whole_batches


@contextmanager
def _forwards_replaced(blocks: nn.ModuleList, make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
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
    """

    rest: tuple[Any, ...] | None

    def __call__(self, hidden: Tensor) -> Any:
        """The return value."""
        return hidden if self.rest is None else (hidden, *self.rest)


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
                calls = [old if old.same(new) else new for old, new in zip(earlier, calls, strict=True)]
            for stream in filter(None, streams):
                stream.append(hidden)
            batches.append(Batch(windows, calls, own_state(calls), len(batches), streams, shard))
    return BlockInputs(batches, wrap)


def _run(skeleton: Skeleton, tokens: Tensor) -> Any:
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
        raise InputError(
            f"{type(skeleton.model).__name__} cannot run with the settings of its config: {reason(error)}",
            "the config is damaged, or of another version of the model",
        ) from error


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
                raise StopForward
            return wrap(hidden)

        return record

    with _forwards_replaced(skeleton.blocks, recorder):
        _run(skeleton, tokens)
    if len(calls) != len(skeleton.blocks) or any(hidden.data_ptr() != seen[0].data_ptr() for hidden in seen):
        raise InputError(
            f"{type(skeleton.model).__name__} does not call its {len(skeleton.blocks)} blocks one after the other",
            "only models whose blocks form a plain chain can be streamed",
        )
    return seen[0].detach().clone().cpu(), calls


def _probe_output(skeleton: Skeleton, sample: Tensor) -> Wrap:
    """The return convention of the blocks, found by running the first one on one sequence."""
    outputs: list[Any] = []
    first = skeleton.blocks[0]
    forward = first.forward

    def stop_after_first(index: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            outputs.append(forward(*args, **kwargs))
            raise StopForward

        return run

    with skeleton.loaded(skeleton.block_parameters(0)), _forwards_replaced(skeleton.blocks, stop_after_first):
        _run(skeleton, sample)
    output = outputs[0]
    return Wrap(None if isinstance(output, Tensor) else tuple(output[1:]))


@torch.no_grad()
def logits(skeleton: Skeleton, tokens: Tensor, hidden: Tensor, wrap: Wrap) -> Tensor:
    """Logits from the last block's output; the parameters outside the blocks must be loaded.

    Args:
        skeleton: the model.
        tokens: `(batch, length)`.
        hidden: the last block's output, `(batch, length, hidden)`.
        wrap: the blocks' return convention.
    """
    with _forwards_replaced(skeleton.blocks, lambda _: lambda *args, **kwargs: wrap(hidden)):
        result = _run(skeleton, tokens).logits
    assert isinstance(result, Tensor)
    return result
