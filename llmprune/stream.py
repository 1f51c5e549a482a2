"""One block at a time: calibration activations travel through the model while only one block's weights are in memory.

A block's forward pauses where a group of layers that share their inputs is about to run; when all batches have paused
there, the group's Gram is complete, the group is pruned, and the forwards go on with the pruned weights. So a block
costs one forward, whatever its number of groups, at the price of keeping its intermediate activations for all batches.
Where these exceed the memory budget, the forward is repeated up to every group instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from llmprune.errors import InputError
from llmprune.families import LayerRef, find_layers, weight_of
from llmprune.memory import give_back_memory, mapped_memory
from llmprune.problem import GroupProblem, InputStats, LayerProblem, LayerSolution
from llmprune.skeleton import Skeleton
from llmprune.stats import RunningGram


class _Stop(Exception):
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
    # A dict may carry state from block to block (shared keys and values), so every batch needs its own.
    if isinstance(a, dict):
        return bool(a) and bool(b) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return isinstance(a, bool | int | float | str) and bool(a == b)


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
        hidden: `(batch, length, hidden)`, what the blocks so far made of them.
        calls: every block's other arguments.
    """

    tokens: Tensor
    hidden: Tensor
    calls: list[Call]


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
class Rehearsal:
    """What a run of everything but the blocks found out.

    Args:
        batches: the tokens, cut into batches, with their first hidden states.
        wrap: turns hidden states into what the model expects a block to return.
    """

    batches: list[Batch]
    wrap: Callable[[Tensor], Any]


@torch.no_grad()
def rehearse(skeleton: Skeleton, tokens: Tensor, batch_size: int) -> Rehearsal:
    """Run all that comes before the blocks, and record what each block is called with.

    The model runs with the blocks replaced by identities that note their arguments; masks and rotary tables differ
    from block to block and from model to model, so every block's own are kept (equal ones once).

    Args:
        skeleton: the model.
        tokens: `(samples, length)`, int64.
        batch_size: samples per batch.
    """
    batches: list[Batch] = []
    with skeleton.loaded(skeleton.outside()):
        wrap = _probe_output(skeleton, tokens[:1])
        for part in torch.split(tokens, batch_size):
            hidden, calls = _record(skeleton, part, wrap)
            known = [batch.calls for batch in batches if batch.tokens.shape == part.shape][:1]
            for earlier in known:
                calls = [old if old.same(new) else new for old, new in zip(earlier, calls, strict=True)]
            batches.append(Batch(part, hidden, calls))
    return Rehearsal(batches, wrap)


def _record(skeleton: Skeleton, tokens: Tensor, wrap: Callable[[Tensor], Any]) -> tuple[Tensor, list[Call]]:
    calls: list[Call] = []
    seen: list[Tensor] = []
    last = len(skeleton.blocks) - 1

    def recorder(index: int) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            hidden, call = Call.split(args, kwargs)
            seen.append(hidden)
            calls.append(call)
            if index == last:
                raise _Stop
            return wrap(hidden)

        return record

    with _forwards_replaced(skeleton.blocks, recorder):
        try:
            skeleton.model(input_ids=tokens.to(skeleton.device), use_cache=False)
        except _Stop:
            pass
    if len(calls) != len(skeleton.blocks) or any(hidden.data_ptr() != seen[0].data_ptr() for hidden in seen):
        raise InputError(
            f"{type(skeleton.model).__name__} does not call its {len(skeleton.blocks)} blocks one after the other",
            "only models whose blocks form a plain chain can be streamed",
        )
    return seen[0].detach().clone().cpu(), calls


def _probe_output(skeleton: Skeleton, sample: Tensor) -> Callable[[Tensor], Any]:
    """How the blocks return their hidden states, learnt by running the first one on one sequence."""
    outputs: list[Any] = []
    first = skeleton.blocks[0]
    forward = first.forward

    def stop_after_first(index: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            outputs.append(forward(*args, **kwargs))
            raise _Stop

        return run

    with skeleton.loaded(skeleton.block_parameters(0)), _forwards_replaced(skeleton.blocks, stop_after_first):
        try:
            skeleton.model(input_ids=sample.to(skeleton.device), use_cache=False)
        except _Stop:
            pass
    output = outputs[0]
    if isinstance(output, Tensor):
        return lambda hidden: hidden
    rest = tuple(output[1:])
    return lambda hidden: (hidden, *rest)


@torch.no_grad()
def logits(skeleton: Skeleton, tokens: Tensor, hidden: Tensor, wrap: Callable[[Tensor], Any]) -> Tensor:
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


@dataclass(slots=True)
class Group:
    """Layers of a block that are fed the very same tensor.

    Args:
        problem: what a method solves.
        write: puts the solutions into the block (one per layer, in order).
        refs: the layers.
    """

    problem: GroupProblem
    refs: tuple[LayerRef, ...]
    write: Callable[[list[LayerSolution]], list[Tensor]]


class Block:
    """One transformer block with its weights in memory.

    Args:
        skeleton: the model.
        index: position of the block.
        batches: the activations that enter it; they leave it when `advance` or `groups` is done.
        chosen: the layers to be pruned, by full name.
        paused: whether forwards may pause (one forward a block) or are repeated for every group.
    """

    def __init__(
        self, skeleton: Skeleton, index: int, batches: list[Batch], chosen: frozenset[str], paused: bool = True
    ) -> None:
        self.skeleton, self.index, self.batches, self.paused = skeleton, index, batches, paused
        self.name = skeleton.block_name(index)
        self.module = skeleton.blocks[index]
        layers = find_layers(self.module, self.name, skeleton.config)
        self.layers = {layer.local: layer for layer in layers if layer.name in chosen}
        self.changed: dict[str, Tensor] = {}
        self.advanced = False

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """The block's tensors by their names on disk, pruned layers with their new weights."""
        return self.skeleton.checkpoint.export(self.skeleton.block_parameters(self.index), self.changed)

    @torch.no_grad()
    def advance(self) -> None:
        """Let all batches pass through the block."""
        for batch in self.batches:
            self._leave(batch, self._forward(batch))
        self.advanced = True

    def _forward(self, batch: Batch) -> Tensor:
        hidden = batch.hidden.to(self.skeleton.device)
        return hidden_of(batch.calls[self.index].run(self.module, hidden))

    def _leave(self, batch: Batch, output: Tensor) -> None:
        if not bool(torch.isfinite(output).all()):
            raise InputError(
                f"the output of {self.name!r} holds NaN or Inf",
                "the model overflows on this text; check the checkpoint, or try other calibration text (--calib)",
            )
        batch.hidden = output.cpu()

    @torch.no_grad()
    def groups(self, order: list[list[str]]) -> Iterator[Group]:
        """Yield the groups in call order, each with the Gram of the inputs that the already pruned groups produce.

        When the last group is done, the batches have passed the pruned block.

        Args:
            order: local layer names by group, from `call_order`.
        """
        group_of = {layer: number for number, layers in enumerate(order) for layer in layers}
        observed = self._pausing(group_of) if self.paused else self._repeating(group_of)
        for number, stats in observed:
            yield self._group(order[number], stats)
        self.advanced = True

    def _group(self, locals_: list[str], stats: InputStats) -> Group:
        refs = tuple(self.layers[local] for local in locals_)
        with mapped_memory():
            problems = tuple(LayerProblem(ref.name, self._weight(ref).to(torch.float32, copy=True)) for ref in refs)

        def write(solutions: list[LayerSolution]) -> list[Tensor]:
            return [self._write(ref, solution) for ref, solution in zip(refs, solutions, strict=True)]

        return Group(GroupProblem(problems, stats), refs, write)

    def _weight(self, ref: LayerRef) -> Tensor:
        return weight_of(self.module.get_submodule(ref.local), ref.transposed)

    def _write(self, ref: LayerRef, solution: LayerSolution) -> Tensor:
        """Store a solution; from now on the block computes with what the file will hold. Returns that, float32."""
        name = f"{ref.name}.weight"
        stored = solution.weight.to(self.skeleton.checkpoint.stored_dtype(name))
        if not bool(torch.isfinite(stored).all()):
            raise InputError(
                f"the pruned weights of {ref.name!r} hold NaN or Inf in {stored.dtype}", "choose another --dtype"
            )
        self._weight(ref).copy_(stored)
        self.changed[name] = (stored.T if ref.transposed else stored).contiguous().cpu()
        return stored.float()

    def _pausing(self, group_of: dict[str, int]) -> Iterator[tuple[int, InputStats]]:
        """One forward per batch, each in a greenlet that pauses where a group begins."""
        grams: dict[int, RunningGram] = {}
        hub = getcurrent()
        done = 0

        def pause(number: int, inputs: Tensor) -> None:
            if number >= done:
                self._add(grams, number, inputs)
                # A forward that pauses inside autocast must not leave it on for the others.
                with torch.autocast(inputs.device.type, enabled=False):
                    hub.switch(number)

        def run(batch: Batch) -> None:
            self._leave(batch, self._forward(batch))

        with self._watched(group_of, pause):
            forwards = [greenlet(partial(run, batch), hub) for batch in self.batches]
            waiting = [(forward, forward.switch()) for forward in forwards]
            for number in range(max(group_of.values(), default=-1) + 1):
                yield number, self._result(grams, number, group_of)
                done = number + 1
                waiting = [(f, f.switch() if at == number else at) for f, at in waiting]

    def _repeating(self, group_of: dict[str, int]) -> Iterator[tuple[int, InputStats]]:
        """A forward up to every group, and one through the whole block."""
        for number in range(max(group_of.values(), default=-1) + 1):
            grams: dict[int, RunningGram] = {}

            def stop(at: int, inputs: Tensor, number: int = number, grams: dict[int, RunningGram] = grams) -> None:
                if at == number:
                    self._add(grams, number, inputs)
                    raise _Stop

            with self._watched(group_of, stop):
                for batch in self.batches:
                    try:
                        self._forward(batch)
                    except _Stop:
                        pass
            yield number, self._result(grams, number, group_of)
        self.advance()

    def _add(self, grams: dict[int, RunningGram], number: int, inputs: Tensor) -> None:
        if number not in grams:
            with mapped_memory():
                grams[number] = RunningGram(inputs.shape[-1], inputs.device)
        grams[number].add(inputs)

    def _result(self, grams: dict[int, RunningGram], number: int, group_of: dict[str, int]) -> InputStats:
        first = next(self.layers[local] for local, at in group_of.items() if at == number)
        with mapped_memory():
            stats = grams.pop(number, RunningGram(first.shape[1], self.skeleton.device)).result()
        if not bool(torch.isfinite(stats.gram).all()):
            raise InputError(
                f"the inputs of layer {first.name!r} hold NaN or Inf",
                "the model overflows on this text; check the checkpoint, or try other calibration text (--calib)",
            )
        return stats

    @contextmanager
    def _watched(self, group_of: dict[str, int], notice: Callable[[int, Tensor], None]) -> Iterator[None]:
        """Call `notice(group, inputs)` when the first layer of a group is about to run in a forward."""
        with ExitStack() as stack:
            leaders = {number: local for local, number in reversed(group_of.items())}
            for number, local in leaders.items():
                hook = self.module.get_submodule(local).register_forward_pre_hook(
                    lambda _, args, kwargs, number=number: notice(number, _inputs(args, kwargs)), with_kwargs=True
                )
                stack.callback(hook.remove)
            yield


@dataclass(frozen=True, slots=True)
class CallOrder:
    """How the layers of a block are called.

    Args:
        groups: local names in call order, layers fed the very same tensor together.
        uncalled: layers that are never called although the module that holds them is: their weight is used in some
            other way, so neither their inputs nor the moment of their use can be seen.
        nbytes: size of all groups' inputs for one batch.
    """

    groups: list[list[str]]
    uncalled: list[str]
    nbytes: int


@torch.no_grad()
def call_order(block: Block) -> CallOrder:
    """Find out how the layers of a block are called, by running one batch.

    A layer inside a module that this batch does not reach (an expert nobody chose) forms a group of its own, where its
    definition stands.
    """
    inputs: list[Tensor] = []
    groups: list[list[str]] = []
    called: set[str] = set()

    def note(local: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if local in called:
            return
        called.add(local)
        if local not in block.layers:
            return
        tensor = _inputs(args, kwargs)
        for known, members in zip(inputs, groups, strict=True):
            if _same_memory(known, tensor):
                members.append(local)
                return
        inputs.append(tensor)
        groups.append([local])

    with ExitStack() as stack:
        for local, module in block.module.named_modules():
            hook = module.register_forward_pre_hook(
                lambda _, args, kwargs, local=local: note(local, args, kwargs), with_kwargs=True
            )
            stack.callback(hook.remove)
        block._forward(block.batches[0])
    nbytes = sum(tensor.nbytes for tensor in inputs)
    uncalled, previous = [], -1
    for local in block.layers:
        if local in called:
            previous = next(number for number, members in enumerate(groups) if local in members)
        elif local.rpartition(".")[0] in called:
            uncalled.append(local)
        else:
            previous += 1
            groups.insert(previous, [local])
    return CallOrder(groups, uncalled, nbytes)


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a linear layer is called with."""
    found = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(found, Tensor)
    return found


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.shape[-1] == b.shape[-1]


class BlockStream:
    """Iterates over the blocks of a model, each with its weights in memory and the activations that reach it.

    Without a method applied, what leaves the last block is bit-equal to what the whole model computes.

    Args:
        skeleton: the model.
        tokens: `(samples, length)`, int64.
        batch_tokens: tokens per batch.
        chosen: full names of the layers to be pruned.
        memory: bytes that a block's intermediate activations may take.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        tokens: Tensor,
        *,
        batch_tokens: int = 2048,
        chosen: frozenset[str] = frozenset(),
        memory: int = 2 * 2**30,
    ) -> None:
        self.skeleton, self.chosen, self.memory = skeleton, chosen, memory
        self.rehearsal = rehearse(skeleton, tokens, max(1, batch_tokens // tokens.shape[1]))
        self.uncalled: list[LayerRef] = []
        self._orders: dict[object, CallOrder] = {}

    def __len__(self) -> int:
        return len(self.skeleton.blocks)

    def __iter__(self) -> Iterator[Block]:
        for index in range(len(self)):
            with self.skeleton.loaded(self.skeleton.block_parameters(index)):
                block = Block(self.skeleton, index, self.rehearsal.batches, self.chosen)
                yield block
                if not block.advanced:
                    block.advance()
            for batch in self.rehearsal.batches:
                batch.calls[index] = _SPENT
            give_back_memory()

    def groups(self, block: Block) -> Iterator[Group]:
        """The groups of a block; blocks of one kind share their call order."""
        kind = (type(block.module), tuple((layer.local, layer.shape) for layer in block.layers.values()))
        if kind not in self._orders:
            self._orders[kind] = call_order(block)
        order = self._orders[kind]
        self.uncalled += [block.layers[local] for local in order.uncalled]
        # A paused forward holds the groups' inputs and about as much again: residual, gates, attention.
        block.paused = 2 * order.nbytes * len(self.rehearsal.batches) <= self.memory
        return block.groups(order.groups)


_SPENT = Call((), {})
