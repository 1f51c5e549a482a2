"""One block at a time: calibration activations travel through the model while only one block's weights are in memory.

A block's forward pauses where a group of layers that share their inputs is about to run; when all batches have paused
there, the group's Gram is complete, the group is pruned, and the forwards go on with the pruned weights. So a block
costs one forward, whatever its number of groups, at the price of keeping its intermediate activations for all batches.
Where these exceed the memory budget, the forward is repeated up to every group instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from llmprune.activations import Activations
from llmprune.carried import Baggage, saved_wrap
from llmprune.coupling import Coupling
from llmprune.errors import InputError
from llmprune.families import LayerRef, find_layers, weight_of
from llmprune.kinds import Kinds, short_batch
from llmprune.memory import give_back_memory, mapped_memory
from llmprune.problem import GroupProblem, InputStats, LayerProblem, LayerSolution
from llmprune.rehearse import SPENT, Batch, Stop, hidden_of, own_state, rehearse
from llmprune.skeleton import Skeleton
from llmprune.stats import RunningGram, RunningPair
from llmprune.surgery import rearrange
from llmprune.watch import Observer, watched

BATCH_TOKENS = 2048
"""Tokens that pass through a block together."""

MEMORY = 4 * 2**30
"""Bytes that a block's intermediate activations may take."""

BUDGET = 2 * 2**30
"""Bytes of hidden states that rest in memory between blocks."""


@dataclass(slots=True)
class Group:
    """Layers of a block that are fed the very same tensor.

    Args:
        problem: what a method solves.
        refs: the layers.
        classes: which of their inputs may change places, see `Coupling`; none where that cannot be folded away.
        write: puts the solutions into the block (one per layer, in order), and what `order` their inputs are to have in
            the file, where those it does not name are gone; returns what is stored, in the order as it is.
    """

    problem: GroupProblem
    refs: tuple[LayerRef, ...]
    classes: tuple[Tensor, ...]
    write: Callable[[list[LayerSolution], Tensor | None], list[Tensor]]


class Block:
    """One transformer block with its weights in memory.

    Args:
        skeleton: the model.
        index: position of the block.
        batches: the activations that enter it; they leave it when `advance` or `groups` is done.
        chosen: the layers to be pruned, by full name.
        paired: whether the layers' statistics are taken against the dense model's activations.
    """

    def __init__(
        self, skeleton: Skeleton, index: int, batches: list[Batch], chosen: frozenset[str], paired: bool = False
    ) -> None:
        self.skeleton, self.index, self.batches, self.paired = skeleton, index, batches, paired
        self.paused = True
        self.name = skeleton.block_name(index)
        self.module = skeleton.blocks[index]
        self.linear = find_layers(self.module, self.name, skeleton.config)
        self.layers = {layer.local: layer for layer in self.linear if layer.name in chosen}
        self.changed: dict[str, Tensor] = {}
        self.dense_weights: dict[str, Tensor] = {}
        self.couplings: dict[str, Coupling] = {}
        self.cuts: dict[str, Coupling] = {}
        self.scales: dict[str, tuple[str, float]] = {}
        self.quiet: float | None = None
        self.balanced = False
        self._moves: list[tuple[Coupling, Tensor]] = []
        self.observer: Observer | None = None
        self.landings: dict[int, str] = {}
        self.advanced = False

    @property
    def shrinks(self) -> bool:
        """Whether inputs were removed for good."""
        return any(len(order) < coupling.width for coupling, order in self._moves)

    @property
    def twin(self) -> bool:
        """Whether the dense model's activations travel along."""
        return self.batches[0].streams[1] is not None

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """The block's tensors by their names on disk, with new weights, in new orders."""
        for coupling, order in self._moves:
            self.changed |= rearrange(coupling, order.cpu(), self._current(coupling), f"{self.name}.")
        self._moves.clear()
        return self.skeleton.checkpoint.export(self.skeleton.block_parameters(self.index), self.changed)

    @torch.no_grad()
    def advance(self) -> None:
        """Let all batches pass through the block."""
        for batch in self.batches:
            if self.twin:
                with self._as_dense():
                    self.pass_through(batch, dense=True)
            self.pass_through(batch)
        self.advanced = True

    def pass_through(self, batch: Batch, dense: bool = False) -> None:
        """Let one batch pass through the block."""
        output = self._forward(batch, dense)
        if not bool(torch.isfinite(output).all()):
            raise InputError(
                f"the output of {self.name!r} holds NaN or Inf",
                "the model overflows on this text; check the checkpoint, or try other calibration text (--calib)",
            )
        batch.leave(output.cpu(), dense)

    def finish(self) -> None:
        """Let the batches pass, if they have not passed yet."""
        if not self.advanced:
            self.advance()

    @torch.no_grad()
    def rewind(self) -> None:
        """Let the batches pass once more."""
        for batch in self.batches:
            self.pass_through(batch)

    def movable(self, coupling: Coupling) -> bool:
        """Whether all that a permutation moves can be written, and no layer among it is to be left as it is."""
        left = {layer.local for layer in self.linear} - self.layers.keys()
        return not left & {source.local for source in coupling.sources} and all(
            self.writable(local) for local in coupling.parameters(self.module)
        )

    def writable(self, local: str) -> bool:
        """Whether a new value of a parameter can be written."""
        checkpoint, name = self.skeleton.checkpoint, f"{self.name}.{local}"
        return checkpoint.writable(name) and len(checkpoint.users(checkpoint.disk_names([name])[0])) == 1

    def _current(self, coupling: Coupling) -> dict[str, Tensor]:
        """The tensors that a permutation or a removal changes, as they will be stored."""
        checkpoint = self.skeleton.checkpoint
        locals_ = dict.fromkeys(coupling.parameters(self.module) + coupling.fed(self.module))
        names = [f"{self.name}.{local}" for local in locals_]
        return {name: self.changed.get(name, checkpoint.stored(checkpoint[name])) for name in names}

    @torch.no_grad()
    def store(self, values: dict[str, Tensor]) -> None:
        """Give parameters new values, by local name; the block computes with what the file will hold."""
        for local, value in values.items():
            name = f"{self.name}.{local}"
            stored = value.to(self.skeleton.checkpoint.stored_dtype(name))
            if not bool(torch.isfinite(stored).all()):
                raise InputError(
                    f"the pruned weights of {name!r} hold NaN or Inf in {stored.dtype}", "choose another --dtype"
                )
            self.module.get_parameter(local).copy_(stored)
            self.changed[name] = stored.contiguous().cpu()

    @torch.no_grad()
    def try_out(self) -> Tensor:
        """What the block makes of the first batch, which stays where it is."""
        batch = self.batches[0]
        (call,) = own_state([batch.calls[self.index]])
        return hidden_of(call.run(self.module, batch.entered().to(self.skeleton.device)))

    def _forward(self, batch: Batch, dense: bool = False) -> Tensor:
        hidden = batch.entered(dense)
        call = (batch.dense_calls if dense else batch.calls)[self.index]
        return hidden_of(call.run(self.module, hidden.to(self.skeleton.device)))

    @torch.no_grad()
    def groups(self, order: list[list[str]]) -> Iterator[Group]:
        """Yield the groups in call order, each with the statistics of the inputs that the pruned groups before produce.

        When the last group is done, the batches have passed the pruned block.

        Args:
            order: local layer names by group, from `call_order`.
        """
        with watched(self.module, order, self.landings, lambda: self.observer):
            for number, stats in self._pausing(order) if self.paused else self._repeating(order):
                yield self._group(order[number], stats)
        self.advanced = True

    def _group(self, locals_: list[str], stats: InputStats) -> Group:
        refs = tuple(self.layers[local] for local in locals_)
        with mapped_memory():
            problems = tuple(LayerProblem(ref.name, self._weight(ref).to(torch.float32, copy=True)) for ref in refs)

        if locals_[0] in self.scales:
            norm, offset = self.scales[locals_[0]]
            stats = replace(stats, scale=self.module.get_parameter(f"{norm}.weight").float() + offset)
        alone = locals_[0] if len(locals_) == 1 else ""
        coupling = self.couplings.get(alone)
        moved = self.cuts.get(alone, coupling)

        def write(solutions: list[LayerSolution], order: Tensor | None = None) -> list[Tensor]:
            if order is not None and moved is not None:
                self._moves.append((moved, order))
            return [self._write(ref, solution) for ref, solution in zip(refs, solutions, strict=True)]

        return Group(GroupProblem(problems, stats), refs, coupling.classes if coupling else (), write)

    def _weight(self, ref: LayerRef) -> Tensor:
        return weight_of(self.module.get_submodule(ref.local), ref.transposed)

    def _parameter(self, local: str) -> nn.Parameter:
        return self.module.get_parameter(f"{local}.weight")

    def _write(self, ref: LayerRef, solution: LayerSolution) -> Tensor:
        """Store a solution; from now on the block computes with what the file will hold. Returns that, float32."""
        if self.twin or self.landings:
            self.dense_weights.setdefault(ref.local, self._parameter(ref.local).data.clone())
        self.store({f"{ref.local}.weight": solution.weight.T if ref.transposed else solution.weight})
        return solution.weight.to(self.skeleton.checkpoint.stored_dtype(f"{ref.name}.weight")).float()

    def _pausing(self, order: list[list[str]]) -> Iterator[tuple[int, InputStats]]:
        """One forward per batch, each in a greenlet that pauses where a group begins.

        The dense model's forwards go on from a group before it is pruned, with dense weights in the ones before.
        """
        with ExitStack() as stack:
            pruned = [stack.enter_context(Forward(self, batch)) for batch in self.batches]
            dense = [stack.enter_context(Forward(self, batch, dense=True)) for batch in self.batches if self.twin]
            yield from self._in_step(order, pruned, dense)

    def _in_step(
        self, order: list[list[str]], pruned: list[Forward], dense: list[Forward]
    ) -> Iterator[tuple[int, InputStats]]:
        for number, layers in enumerate(order):
            stats = self._running(layers)
            for forward, twin in zip_longest(pruned, dense):
                if forward.at == number:
                    self._add(stats, forward.batch, forward.seen, twin.seen if twin and twin.at == number else None)
            # A member of a group may be called after later groups have begun.
            with self._as_dense():
                for forward in dense:
                    forward.leave(number)
            yield number, self._result(stats, layers)
            for forward in pruned:
                if forward.at == number and forward.seen.landed is not None:
                    self._follow(layers[0], forward.seen)
                forward.leave(number)

    def _follow(self, local: str, seen: Seen) -> None:
        """Let the residual stream know what pruning changed in a layer that had run already."""
        if local in self.dense_weights and seen.landed is not None:
            change = self._parameter(local).data - self.dense_weights[local]
            moved = seen.inputs @ (change if self.layers[local].transposed else change.T)
            seen.landed.add_(moved.view_as(seen.landed))

    def _repeating(self, order: list[list[str]]) -> Iterator[tuple[int, InputStats]]:
        """A forward up to every group, and one through the whole block."""
        for number, layers in enumerate(order):
            stats = self._running(layers)
            for batch in self.batches:
                seen = self._seen_at(number, batch)
                if seen is not None:
                    self._add(stats, batch, seen, self._seen_at(number, batch, dense=True) if self.paired else None)
            yield number, self._result(stats, layers)
        self.advance()

    def _seen_at(self, number: int, batch: Batch, dense: bool = False) -> Seen | None:
        """What is seen of a group in a forward of its own, None if the forward does not come there."""
        self.observer = finder = Finder(number)
        try:
            with self._as_dense() if dense else nullcontext():
                self._forward(batch, dense)
        except Stop:
            pass
        finally:
            self.observer = None
        return finder.seen

    @contextmanager
    def _as_dense(self) -> Iterator[None]:
        """Within, the block computes with its dense weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for local, other in self.dense_weights.items():
            weight = self._parameter(local)
            self.dense_weights[local], weight.data = weight.data, other

    def _running(self, layers: list[str]) -> RunningGram | RunningPair:
        with mapped_memory():
            width = self.layers[layers[0]].shape[1]
            quiet = self.quiet if layers[0] in self.cuts else None
            apart = self.paired or layers[0] in self.cuts
            return (RunningPair if apart else RunningGram)(width, self.skeleton.device, quiet)

    def _add(self, stats: RunningGram | RunningPair, batch: Batch, seen: Seen, dense: Seen | None) -> None:
        landed = dense.landed if dense is not None and dense.landed is not None else seen.landed
        scale = even_weight(landed) if self.balanced and landed is not None else None
        if isinstance(stats, RunningGram):
            stats.add(seen.inputs, scale)
            return
        # Rows that were picked from the batch (routed tokens) are not the same ones in both models.
        if dense is None or seen.inputs.numel() // seen.inputs.shape[-1] != batch.tokens.numel():
            stats.add(seen.inputs, None, scale=scale)
            return
        both = seen.landed is not None and dense.landed is not None
        error = dense.landed - seen.landed if both else None  # type: ignore[operator]
        stats.add(seen.inputs, dense.inputs, error, scale)

    def _result(self, running: RunningGram | RunningPair, layers: list[str]) -> InputStats:
        with mapped_memory():
            stats = running.result()
        if not bool(torch.isfinite(stats.gram).all()):
            raise InputError(
                f"the inputs of layer {self.layers[layers[0]].name!r} hold NaN or Inf",
                "the model overflows on this text; check the checkpoint, or try other calibration text (--calib)",
            )
        return stats


def even_weight(landed: Tensor) -> Tensor:
    """By what to scale a token's error so that it counts relative to the residual stream, `(tokens, 1)`, float32.

    The next norm divides every token by its own size, and that differs a hundredfold: at a few tokens, such as the
    first, the stream is so large that they alone would make up all of a Gram.
    """
    size = landed.float().square().mean(-1).sqrt().flatten()[:, None]
    return size.clamp(min=torch.finfo(torch.float32).tiny ** 0.5).reciprocal()


@dataclass(frozen=True, slots=True)
class Seen:
    """What a forward shows of a group.

    Args:
        inputs: of its layers, `(..., in)`.
        landed: the residual stream right behind its only layer, `(..., out)`, if it adds to that.
    """

    inputs: Tensor
    landed: Tensor | None


class Finder(Observer):
    """Ends a forward where it comes to a group."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.seen: Seen | None = None

    def arrive(self, number: int, inputs: Tensor, landed: Tensor | None) -> None:
        if number == self.number:
            self.seen = Seen(inputs, landed)
            raise Stop


class Forward(Observer):
    """One batch's forward through a block, in a greenlet that pauses where a group begins, or where its output lands.

    Args:
        block: the block.
        batch: the activations that enter it.
        dense: whether they are those of the dense model.
    """

    def __init__(self, block: Block, batch: Batch, dense: bool = False) -> None:
        super().__init__()
        self.block, self.batch = block, batch
        self.at: int | None = None
        self.seen = NOTHING
        self._next = 0
        self._hub = getcurrent()
        self._run = greenlet(lambda: block.pass_through(batch, dense), self._hub)

    def __enter__(self) -> Forward:
        self.go_on()
        return self

    def __exit__(self, *_: object) -> None:
        # Its frames refer to itself in ways that the garbage collector cannot see.
        self._run.throw()

    def go_on(self) -> None:
        """Run to the next pause, or to the end of the block."""
        self.at, self.seen = None, NOTHING
        self.block.observer = self
        self._run.switch()
        self.block.observer = None

    def leave(self, number: int) -> None:
        """Do not pause at this group any more; go on if that is where this forward stands."""
        self._next = number + 1
        if self.at == number:
            self.go_on()

    def arrive(self, number: int, inputs: Tensor, landed: Tensor | None) -> None:
        if number < self._next:
            return
        self.at, self.seen = number, Seen(inputs, landed)
        # A forward that pauses inside autocast must not leave it on for the others.
        with torch.autocast(inputs.device.type, enabled=False):
            self._hub.switch()


NOTHING = Seen(torch.empty(0), None)


class BlockStream:
    """Iterates over the blocks of a model, each with its weights in memory and the activations that reach it.

    Without a method applied, what leaves the last block is bit-equal to what the whole model computes.

    Args:
        skeleton: the model.
        tokens: `(samples, length)`, int64.
        batch_tokens: tokens per batch; fewer if `saved` says so.
        chosen: full names of the layers to be pruned.
        memory: bytes that a block's intermediate activations may take.
        twin: whether the dense model's activations travel along.
        paired: whether the layers' statistics are taken against them, where there are such.
        permute: whether to find out which inputs may change places.
        cuts: by their full names, the layers that lose inputs, with what these hang together with.
        scales: whether to look for the norms that feed the layers.
        quiet: with this share of the root mean square as the limit, count how often their inputs are nearly zero.
        again: whether blocks will be passed more than once, see `Block.rewind`.
        folder: where hidden states rest that exceed the budget, and what `save` writes; None for neither.
        budget: bytes of hidden states that may rest in memory.
        saved: what `save` returned in a run that was stopped; the stream goes on from there.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        tokens: Tensor,
        *,
        batch_tokens: int = BATCH_TOKENS,
        chosen: frozenset[str] = frozenset(),
        memory: int = MEMORY,
        twin: bool = False,
        paired: bool = True,
        permute: bool = False,
        cuts: Mapping[str, Coupling] | None = None,
        quiet: float | None = None,
        scales: bool = False,
        again: bool = False,
        folder: Path | None = None,
        budget: int = BUDGET,
        saved: dict[str, Any] | None = None,
    ) -> None:
        self.skeleton, self.chosen, self.memory, self.folder = skeleton, chosen, memory, folder
        self.paired = paired and twin
        self.cuts, self.quiet, self.permute, self.scales = cuts or {}, quiet, permute, scales
        # What enters a block and what leaves it are there at once.
        limit = budget // (4 if twin else 2)
        self._pruned = Activations("pruned", folder, limit, keep=again)
        self._dense = Activations("dense", folder, limit) if twin else None
        self._streams = [self._pruned] if self._dense is None else [self._pruned, self._dense]
        wrap = saved_wrap(folder, saved["carried"]) if folder and saved else None
        self.batch_size = max(1, batch_tokens // tokens.shape[1])
        if saved:
            self.batch_size = min(self.batch_size, saved["batch_size"])
        self.rehearsal = rehearse(skeleton, tokens, self.batch_size, self._pruned, self._dense, wrap)
        short = short_batch(skeleton, tokens, self.rehearsal.wrap) if permute or scales else None
        self.kinds = Kinds(skeleton, chosen, short)
        self._baggage = Baggage(self.rehearsal) if folder else None
        self.uncalled: list[str] = []
        self.done = 0
        if saved:
            self._load(saved)

    def __len__(self) -> int:
        return len(self.skeleton.blocks)

    def __iter__(self) -> Iterator[Block]:
        for index in range(self.done, len(self)):
            with self.skeleton.loaded(self.skeleton.block_parameters(index)):
                block = Block(self.skeleton, index, self.rehearsal.batches, self.chosen, paired=self.paired)
                yield block
                block.finish()
            self.done = index + 1
            for batch in self.rehearsal.batches:
                batch.calls[index] = batch.dense_calls[index] = SPENT
            for stream in self._streams:
                stream.turn()
            give_back_memory()

    def groups(self, block: Block) -> Iterator[Group]:
        """The groups of a block; blocks of one kind share their call order."""
        order = self.kinds.order(block.index, list(block.layers), block.try_out)
        seen = self.paired or bool(self.cuts)
        block.landings = self.kinds.landings(block.index, block.try_out) if seen else {}
        self.uncalled += [block.layers[local].name for local in order.uncalled]
        # A paused forward holds the groups' inputs and about as much again: residual, gates, attention.
        forwards = len(self.rehearsal.batches) * (2 if block.twin else 1)
        block.paused = 2 * order.nbytes * forwards <= self.memory
        if self.scales:
            block.scales = self.kinds.scales(block.index)
        if self.permute:
            block.couplings = {c.sink: c for c in self.kinds.couplings(block.index) if block.movable(c)}
        prefix = f"{block.name}."
        block.cuts = {n.removeprefix(prefix): c for n, c in self.cuts.items() if n.startswith(prefix)}
        block.quiet, block.balanced = self.quiet, bool(self.cuts)
        return block.groups(order.groups)

    def save(self) -> dict[str, Any]:
        """Make durable all that the blocks behind the one at hand need from it and those before; returns it as JSON.

        Raises:
            CannotBeSavedError: blocks hand on what cannot be written.
        """
        assert self.folder is not None
        assert self._baggage is not None
        return {
            "done": self.done + 1,
            "batch_size": self.batch_size,
            "hidden": [stream.save() for stream in self._streams],
            "carried": self._baggage.save(self.done + 1, self.folder),
            "kinds": self.kinds.save(),
            "uncalled": self.uncalled,
        }

    def _load(self, saved: dict[str, Any]) -> None:
        assert self.folder is not None
        assert self._baggage is not None
        self.done, self.uncalled = saved["done"], list(saved["uncalled"])
        for stream, hidden in zip(self._streams, saved["hidden"], strict=True):
            stream.load(hidden, self.done, self.batch_size)
        self._baggage.load(self.done, self.folder, saved["carried"])
        self.kinds.load(saved["kinds"])
        for batch in self.rehearsal.batches:
            batch.calls[: self.done] = batch.dense_calls[: self.done] = [SPENT] * self.done
