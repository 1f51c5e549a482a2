"""The groups of a block in call order, each with the statistics of the inputs that the pruned groups before produce.

A block's forward pauses where a group of layers that share their inputs is about to run; when all batches have paused
there, the group's Gram is complete, the group is pruned, and the forwards resume with the pruned weights. So a block
costs one forward, whatever its number of groups, at the price of keeping its intermediate activations for all batches.
Where these exceed the memory budget, the forward is repeated up to every group instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import TypeVar

import torch
from torch import Tensor

from llmprune.errors import PruneError
from llmprune.model.blocks import LayerRef
from llmprune.pruning.problem import GroupProblem, InputStats, LayerProblem, LayerSolution, UnitRemoval
from llmprune.runtime.memory import mmap_large_allocations, trim_heap
from llmprune.streaming.batch import Batch, StopForward
from llmprune.streaming.block import Block
from llmprune.streaming.block_types import BlockAnalysis
from llmprune.streaming.expert_statistics import ExpertStatistics, RoutedBatch
from llmprune.streaming.hooks import CurrentObserver, Observation, Observer, is_expert, observed, owner_of
from llmprune.streaming.pausable import PausableForward, StopAtExperts, StopAtGroup
from llmprune.streaming.statistics import GroupStatistics, StatisticsOptions
from llmprune.structure.cut import Cut, scale_of

S = TypeVar("S", bound=Observer)


@dataclass(slots=True)
class Group:
    """Layers of a block that share their input tensor.

    Args:
        problem: the layer problems to be solved.
        refs: the layers.
        write: stores the solutions (one per layer, in order) with the order of their inputs in the file (None for the
            order as it is; inputs that it does not name are removed); returns the stored weights in the present order.
    """

    problem: GroupProblem
    refs: tuple[LayerRef, ...]
    write: Callable[[list[LayerSolution], Tensor | None], list[Tensor]]


class GroupSchedule:
    """Iterates over the groups of a block; behind the last one, the batches have passed the pruned block.

    Args:
        block: the block.
        analysis: how its layers are called and coupled.
        options: how statistics are taken.
        pausing: whether forwards pause at every group; else they are repeated up to it.
    """

    def __init__(self, block: Block, analysis: BlockAnalysis, options: StatisticsOptions, pausing: bool) -> None:
        self.block, self.analysis, self.options, self.pausing = block, analysis, options, pausing
        self.order = analysis.order.groups
        self._current = CurrentObserver()
        self._experts = ExpertStatistics(block, options, self._current.set_to)

    @torch.no_grad()
    def __iter__(self) -> Iterator[Group]:
        with self._watched():
            for number, stats in self._pausing() if self.pausing else self._repeating():
                yield self._group(self.order[number], stats)
                # Memory of the group that was freed would be scattered by the activations that come next.
                trim_heap()
        self.block.advanced = True

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Within, observers are told of forwards of the block, and of the dense one where that is another module."""
        block, adds = self.block, self.analysis.residual_adds
        with observed(block.module, self.order, adds, self._current), ExitStack() as stack:
            if block.dense_module is not block.module:
                order = [[block.dense_local(local) for local in layers] for layers in self.order]
                stack.enter_context(observed(block.dense_module, order, adds, self._current))
            yield

    def _group(self, layers: list[str], stats: InputStats) -> Group:
        block, first = self.block, layers[0]
        refs = tuple(block.layers[local] for local in layers)
        with mmap_large_allocations():
            problems = tuple(
                LayerProblem(ref.name, block.weight(ref.local).to(torch.float32, copy=True)) for ref in refs
            )
        if first in self.analysis.norm_scales:
            norm, offset = self.analysis.norm_scales[first]
            stats = replace(stats, scale=block.module.get_parameter(f"{norm}.weight").float() + offset)
        coupling = self.analysis.couplings.get(first) if len(layers) == 1 else None
        removed = self.analysis.removed.get(first)
        if removed is not None and len(layers) > 1:
            raise PruneError(f"{refs[0].name!r} is to lose inputs that {refs[1].name!r} has, too", "please report it")
        keep_dense = block.dense_stream or bool(self.analysis.residual_adds)

        def write(solutions: list[LayerSolution], order: Tensor | None = None) -> list[Tensor]:
            moved = removed.coupling if removed else coupling
            if order is not None and moved is not None:
                block.reorder(moved, order)
            return [block.write(ref, solution, keep_dense) for ref, solution in zip(refs, solutions, strict=True)]

        classes = coupling.classes if coupling else ()
        return Group(GroupProblem(problems, stats, classes, self._removal(removed)), refs, write)

    def _removal(self, cut: Cut | None) -> UnitRemoval | None:
        if cut is None:
            return None
        scale = scale_of(self.block.module, cut.coupling) if self.options.channel_scales else None
        return UnitRemoval(cut.units, cut.count, scale)

    # One forward per batch, paused at every group

    def _pausing(self) -> Iterator[tuple[int, InputStats]]:
        """One forward per batch, each in a greenlet that pauses where a group begins.

        The dense model's forwards leave a group before it is pruned, with dense weights in the ones before.
        """
        batches, dense_stream = self.block.batches, self.block.dense_stream
        with ExitStack() as stack:
            pruned = [stack.enter_context(self._begun(batch)) for batch in batches]
            dense = [stack.enter_context(self._begun(batch, dense=True)) for batch in batches if dense_stream]
            yield from self._in_lockstep(pruned, dense)

    def _begun(self, batch: Batch, dense: bool = False) -> PausableForward:
        run = partial(self.block.pass_through, batch, dense)
        return PausableForward(batch, run, self._current.set_to, outputs=dense)

    def _in_lockstep(
        self, pruned: list[PausableForward], dense: list[PausableForward]
    ) -> Iterator[tuple[int, InputStats]]:
        for number, layers in enumerate(self.order):
            if routed := self._routed(layers[0], pruned, dense):
                stats = self._experts.collect(number, self._refs(layers), routed, self._loses(layers))
            else:
                stats = self._paused_statistics(number, layers, pruned, dense)
            # A member of a group may be called after later groups have begun.
            with self.block.dense():
                for forward in dense:
                    forward.leave(number)
            yield number, stats
            change = self.block.change_of(layers[0]) if number in self.analysis.residual_adds else None
            for forward in pruned:
                if forward.at == number and change is not None:
                    self._update_residual(layers[0], forward.observation, change)
                forward.leave(number)

    def _paused_statistics(
        self, number: int, layers: list[str], pruned: list[PausableForward], dense: list[PausableForward]
    ) -> InputStats:
        stats = self._statistics(layers)
        for forward, other in zip_longest(pruned, dense):
            if forward.at == number:
                paired = other.observation if other and other.at == number else None
                stats.add(forward.batch, forward.observation, paired)
        return stats.result()

    def _routed(self, local: str, pruned: list[PausableForward], dense: list[PausableForward]) -> list[RoutedBatch]:
        """All batches as they came to the module of an expert; none if a layer is no expert's, or it does not say."""
        owner = owner_of(local) if is_expert(self.block.module, local) else None
        for forward in pruned + dense:
            for other in forward.routed.keys() - {owner}:  # what is behind this forward
                del forward.routed[other]
        pairs = list(zip_longest(pruned, dense if self.options.dense_targets else ()))
        if owner is None or any(owner not in forward.routed for forward, _ in pairs):
            return []
        return [RoutedBatch(f.batch, f.routed[owner], d.routed.get(owner) if d else None) for f, d in pairs]

    def _update_residual(self, local: str, observation: Observation, change: Tensor) -> None:
        """Add to the residual stream what pruning changed in a layer that had run already."""
        if observation.residual is not None:
            moved = observation.inputs @ (change if self.block.layers[local].transposed else change.T)
            observation.residual.add_(moved.view_as(observation.residual))

    # A forward up to every group

    def _repeating(self) -> Iterator[tuple[int, InputStats]]:
        """A forward up to every group, and one through the whole block."""
        owner, routed = "", []
        for number, layers in enumerate(self.order):
            here = owner_of(layers[0]) if is_expert(self.block.module, layers[0]) else ""
            if here != owner:
                owner, routed = here, self._routed_again(here) if here else []
            if routed:
                yield number, self._experts.collect(number, self._refs(layers), routed, self._loses(layers))
            else:
                yield number, self._repeated_statistics(number, layers)
        self.block.advance()

    def _repeated_statistics(self, number: int, layers: list[str]) -> InputStats:
        stats = self._statistics(layers)
        for batch in self.block.batches:
            observation = self._observation_at(number, batch)
            if observation is not None:
                other = self._observation_at(number, batch, dense=True) if self.options.dense_targets else None
                stats.add(batch, observation, other)
        return stats.result()

    def _routed_again(self, owner: str) -> list[RoutedBatch]:
        """All batches as they come to the module of experts; none if it does not say how it is called."""
        found = []
        for batch in self.block.batches:
            pruned = self._stopped(StopAtExperts(owner), batch).routed.get(owner)
            if pruned is None:
                return []
            dense = self._stopped(StopAtExperts(owner), batch, dense=True) if self.options.dense_targets else None
            found.append(RoutedBatch(batch, pruned, dense.routed.get(owner) if dense else None))
        return found

    def _observation_at(self, number: int, batch: Batch, dense: bool = False) -> Observation | None:
        """The observation of a group in a forward of its own, None if the forward does not reach the group."""
        return self._stopped(StopAtGroup(number, outputs=dense), batch, dense).observation

    def _stopped(self, stop: S, batch: Batch, dense: bool = False) -> S:
        """An observer that has ended a forward."""
        with self._current.set_to(stop), self.block.dense() if dense else nullcontext(), suppress(StopForward):
            self.block.forward(batch, dense, isolated=True)
        return stop

    def _refs(self, layers: list[str]) -> list[LayerRef]:
        return [self.block.layers[local] for local in layers]

    def _statistics(self, layers: list[str]) -> GroupStatistics:
        module = self.block.module.get_submodule(layers[0])
        bias = dict(module.named_parameters()).get("bias")
        device = self.block.skeleton.device
        return GroupStatistics(self.options, self._refs(layers), device, self._loses(layers), bias)

    def _loses(self, layers: list[str]) -> bool:
        return layers[0] in self.analysis.removed
