"""One transformer block with its weights in memory: its groups in call order, and the activations that pass it.

A block's forward pauses where a group of layers that share their inputs is about to run; when all batches have paused
there, the group's Gram is complete, the group is pruned, and the forwards go on with the pruned weights. So a block
costs one forward, whatever its number of groups, at the price of keeping its intermediate activations for all batches.
Where these exceed the memory budget, the forward is repeated up to every group instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor, nn

from llmprune.errors import InputError
from llmprune.model.blocks import LayerRef, find_layers, weight_of
from llmprune.model.skeleton import Skeleton
from llmprune.pruning.problem import GroupProblem, InputStats, LayerProblem, LayerSolution
from llmprune.runtime.memory import give_back_memory, mapped_memory
from llmprune.runtime.process_group import ProcessGroup
from llmprune.streaming.capture import Batch, Stop, hidden_of, own_state
from llmprune.streaming.hooks import Observer, Seen, watched
from llmprune.streaming.pausable import Finder, Forward
from llmprune.streaming.statistics import GroupStatistics, Sampling
from llmprune.structure.coupling import Coupling
from llmprune.structure.slicing import rearrange


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
        sampling: how the layers' statistics are taken.
        count: how many batches there are in all.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        index: int,
        batches: list[Batch],
        chosen: frozenset[str],
        sampling: Sampling | None = None,
        count: int | None = None,
    ) -> None:
        self.skeleton, self.index, self.batches = skeleton, index, batches
        self.sampling, self.count = sampling or Sampling(), len(batches) if count is None else count
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
        self._moves: list[tuple[Coupling, Tensor]] = []
        self.observer: Observer | None = None
        self.landings: dict[int, str] = {}
        self.advanced = False

    @property
    def shrinks(self) -> bool:
        """Whether inputs were removed for good."""
        return any(len(order) < coupling.width for coupling, order in self._moves)

    @property
    def group(self) -> ProcessGroup:
        """The processes that have the other windows of the batches."""
        return self.sampling.group

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

    def as_stored(self, local: str, value: Tensor) -> Tensor:
        """A parameter's value as the file will hold it."""
        return value.to(self.skeleton.checkpoint.stored_dtype(f"{self.name}.{local}"))

    @torch.no_grad()
    def store(self, values: dict[str, Tensor]) -> None:
        """Give parameters new values, by local name; the block computes with what the file will hold."""
        for local, value in values.items():
            name, stored = f"{self.name}.{local}", self.as_stored(local, value)
            if not bool(torch.isfinite(stored).all()):
                raise InputError(
                    f"the pruned weights of {name!r} hold NaN or Inf in {stored.dtype}", "choose another --dtype"
                )
            self.module.get_parameter(local).copy_(stored)
            self.changed[name] = stored.contiguous().cpu()

    @torch.no_grad()
    def try_out(self) -> Tensor:
        """What the block makes of the first batch, which stays where it is."""
        return self._forward(self.batches[0], trial=True)

    def _forward(self, batch: Batch, dense: bool = False, trial: bool = False) -> Tensor:
        """The block's output; a trial leaves nothing for later blocks."""
        hidden = batch.entered(dense)
        call = (batch.dense_calls if dense else batch.calls)[self.index]
        if trial:
            (call,) = own_state([call])
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
                # What was freed of the group would else be scattered by the activations that come next.
                give_back_memory()
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
            pruned = [stack.enter_context(self._begun(batch)) for batch in self.batches]
            dense = [stack.enter_context(self._begun(batch, dense=True)) for batch in self.batches if self.twin]
            yield from self._in_step(order, pruned, dense)

    def _begun(self, batch: Batch, dense: bool = False) -> Forward:
        return Forward(batch, partial(self.pass_through, batch, dense), self._observed_by, outputs=dense)

    @contextmanager
    def _observed_by(self, observer: Observer) -> Iterator[None]:
        self.observer = observer
        try:
            yield
        finally:
            self.observer = None

    def _in_step(
        self, order: list[list[str]], pruned: list[Forward], dense: list[Forward]
    ) -> Iterator[tuple[int, InputStats]]:
        for number, layers in enumerate(order):
            stats = self._statistics(layers)
            for forward, twin in zip_longest(pruned, dense):
                if forward.at == number:
                    other = twin.seen if twin and twin.at == number else None
                    stats.add(forward.batch, forward.seen, other)
            # A member of a group may be called after later groups have begun.
            with self._as_dense():
                for forward in dense:
                    forward.leave(number)
            yield number, stats.result()
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
            stats = self._statistics(layers)
            for batch in self.batches:
                seen = self._seen_at(number, batch)
                if seen is not None:
                    other = self._seen_at(number, batch, dense=True) if self.sampling.paired else None
                    stats.add(batch, seen, other)
            yield number, stats.result()
        self.advance()

    def _seen_at(self, number: int, batch: Batch, dense: bool = False) -> Seen | None:
        """What is seen of a group in a forward of its own, None if the forward does not come there."""
        finder = Finder(number, outputs=dense)
        with self._observed_by(finder), self._as_dense() if dense else nullcontext(), suppress(Stop):
            self._forward(batch, dense, trial=True)
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

    def _statistics(self, layers: list[str]) -> GroupStatistics:
        bias = dict(self.module.get_submodule(layers[0]).named_parameters()).get("bias")
        refs = [self.layers[local] for local in layers]
        return GroupStatistics(self.sampling, refs, self.skeleton.device, layers[0] in self.cuts, bias)
