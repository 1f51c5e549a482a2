"""Removal of experts from a block: what they do on the batches, the smaller mixture, and the inputs of its refit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llmprune.errors import InputError
from llmprune.model.blocks import LayerRef
from llmprune.model.hooks import before, hooked
from llmprune.model.routed_call import RoutedCall
from llmprune.pruning.experts.problem import ExpertUse, is_massive
from llmprune.pruning.experts.refit import RefitProblem
from llmprune.runtime.process_group import ProcessGroup
from llmprune.streaming.batch import Batch, StopForward
from llmprune.streaming.block import Block
from llmprune.streaming.router_mask import RouterMask
from llmprune.streaming.statistics import StatisticsOptions
from llmprune.structure.expert_cut import ExpertCut, Mixtures

REROUTED_TOKENS = 4096
"""About so many tokens are routed anew for every active expert, where a criterion asks for it."""
INPUT_MEMORY = 2 * 2**30
"""Bytes of inputs of output projections that are kept in memory; beyond that they are computed again."""


@dataclass(frozen=True, slots=True)
class FewerExperts:
    """The experts that a run removes.

    Args:
        mixtures: the cuts.
        blocks: of the model with fewer experts, without weights.
    """

    mixtures: Mixtures
    blocks: nn.ModuleList


@dataclass(frozen=True, slots=True)
class _Pass:
    """What the experts of a block got and gave for all of a process's tokens.

    Args:
        call: their call.
        output: theirs, `(tokens, hidden)`.
        largest: magnitude in the block's output.
        median: magnitude in it, of the first batch.
    """

    call: RoutedCall
    output: Tensor
    largest: float = 0.0
    median: float = 0.0


class ExpertRemoval:
    """Removes experts from one block.

    Args:
        block: the block.
        cut: what it loses.
        smaller: the block with fewer experts, without weights.
        options: of the statistics: targets, batches that are left out, processes.
    """

    def __init__(self, block: Block, cut: ExpertCut, smaller: nn.Module, options: StatisticsOptions) -> None:
        self.block, self.cut, self.smaller, self.options = block, cut, smaller, options
        self.batches = [batch for batch in block.batches if batch.shard.batch not in options.left_out]
        self._dense = self._passed(whole=True)
        self._inputs: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def group(self) -> ProcessGroup:
        """The processes that have the other tokens."""
        return self.options.group

    # Before the removal

    @torch.no_grad()
    def use(self) -> ExpertUse:
        """What the experts do on all tokens of all processes."""
        call, count = self._dense.call, self.cut.count
        tokens, output, largest = (torch.zeros(count, dtype=torch.float64) for _ in range(3))
        squares, columns = (torch.zeros(count, self._exit(0).shape[1], dtype=torch.float64) for _ in range(2))
        for expert in range(count):
            columns[expert] = self._weight(self._exit(expert)).norm(dim=0).cpu()
            rows, gates = call.gates_of(expert)
            if len(rows):
                inputs, outputs = self._replayed(call, rows, expert)
                tokens[expert], largest[expert] = len(rows), float(outputs.abs().max())
                output[expert] = float((gates * outputs.float().norm(dim=1)).sum(dtype=torch.float64))
                squares[expert] = (gates[:, None] * inputs.float()).square().sum(0, dtype=torch.float64).cpu()
        self.group.all_reduce([tokens, output, squares])
        peaks = self.group.all_gather_object([largest.tolist(), [self._dense.largest, self._dense.median]])
        largest = torch.tensor([peak[0] for peak in peaks], dtype=torch.float64).amax(0)
        massive = is_massive(max(peak[1][0] for peak in peaks), peaks[0][1][1])
        return ExpertUse(tokens, output, squares.sqrt(), columns, largest, massive, self._loss_without)

    @torch.no_grad()
    def _loss_without(self, gone: Tensor) -> Tensor:
        """The squared error that is added when one more expert goes, see `ExpertUse`."""
        loss, start, device = torch.zeros(self.cut.count, dtype=torch.float64), 0, self.block.skeleton.device
        gone = gone.to(device)
        for batch in self._sample():
            size = batch.tokens.numel()
            wanted = self._dense.output[start : start + size].float()
            start += size
            now = self._rerouted(batch, gone)
            error = (now.output.float() - wanted).square().sum(1)
            for chosen in now.call.index.T:
                other = self._rerouted(batch, gone | torch.nn.functional.one_hot(chosen, self.cut.count).bool())
                more = (other.output.float() - wanted).square().sum(1) - error
                loss.index_add_(0, chosen.cpu(), more.double().cpu())
        self.group.all_reduce([loss])
        return loss.masked_fill(gone.cpu(), torch.inf)

    def _sample(self) -> Iterator[Batch]:
        """The first batches, with about so many tokens as are routed anew, those of other processes too."""
        tokens = 0
        for batch in self.batches:
            if tokens < REROUTED_TOKENS:
                yield batch
            tokens += batch.shard.windows * batch.tokens.shape[1]

    def _rerouted(self, batch: Batch, gone: Tensor) -> _Pass:
        """A batch at the experts, the router choosing among those that are not gone."""
        parameters = dict(self.block.module.named_parameters())
        weights = [parameters[local] for local in self.cut.router if local in parameters]
        with self._seen(self.block.module, stop=True) as seen, RouterMask(weights, gone), suppress(StopForward):
            self.block.forward(batch, isolated=True)
        found = seen.result()
        rows = gone.expand(len(found.call.index), -1)
        if bool(rows.gather(1, found.call.index).any()):
            raise InputError(
                f"the router of {self.block.name!r} chooses experts that are gone",
                "use a criterion that does not ask what the others make of their tokens: --method reap",
            )
        return found

    # The removal

    def remove(self, kept: Tensor) -> None:
        """Compute with these experts only, `(kept,)`, int64, from now on."""
        self.block.remove_experts(self.smaller, self.cut, kept)

    # After the removal

    @torch.no_grad()
    def problem(self) -> RefitProblem:
        """The refit of the output projections, towards the dense mixture's output for the same tokens.

        It is the output on the same inputs, or with dense targets that of the dense model.
        """
        self._small = self._passed()
        self._target = (self._passed(dense=True) if self.options.dense_targets else self._dense).output.float()
        residual = self._target - self._small.output.float()
        return RefitProblem(self.cut.kept, self._exit(0).shape, self._gated, residual, self._held_out())

    @torch.no_grad()
    def write(self, changes: Sequence[Tensor]) -> float:
        """Add changes `(out, in)` to the output projections; returns the error with the weights as they are stored."""
        module, local = self.block.module, self._exit(0).local_parameter
        value = module.get_parameter(local).detach().clone()
        for expert, change in enumerate(changes):
            self._exit(expert).weight_in(value).add_(change.to(value.dtype))
        self.block.store({local: value})
        self._inputs.clear()
        return self.relative(self._target - module.get_submodule(self.cut.owner)(*self._small.call.arguments).float())

    def relative(self, residual: Tensor) -> float:
        """`‖target − y‖² / ‖target‖²` over all tokens of all processes, of a residual `(tokens, hidden)`."""
        squares = [float(part.square().sum(dtype=torch.float64)) for part in (residual, self._target)]
        missed, energy = self.group.sum(squares)
        return missed / energy if energy else 0.0

    def _gated(self, expert: int) -> tuple[Tensor, Tensor]:
        """The tokens of an expert, and the inputs of its output projection times its gate values."""
        if expert in self._inputs:
            return self._inputs[expert]
        rows, gates = self._small.call.gates_of(expert)
        inputs, _ = self._replayed(self._small.call, rows, expert)
        found = rows, inputs.float() * gates[:, None]
        if sum(kept.nbytes for _, kept in self._inputs.values()) + found[1].nbytes <= INPUT_MEMORY:
            self._inputs[expert] = found
        return found

    def _held_out(self) -> Tensor:
        """The tokens that are held out of every batch, `(tokens,)`, bool."""
        parts = [torch.arange(batch.tokens.numel()) >= batch.fitted for batch in self.batches]
        return torch.cat(parts).to(self.block.skeleton.device)

    # Forwards

    def _passed(self, dense: bool = False, whole: bool = False) -> _Pass:
        """All batches at the experts of the block as it is, or of the dense one on its own inputs.

        Args:
            dense: see above.
            whole: whether they go on to the end of the block, whose output is looked at.
        """
        with self._seen(self.block.dense_module if dense else self.block.module, stop=not whole) as seen:
            for batch in self.batches:
                with suppress(StopForward):
                    seen.block_output(self.block.checked_output(batch, dense))
        return seen.result()

    def _replayed(self, call: RoutedCall, rows: Tensor, expert: int) -> tuple[Tensor, Tensor]:
        """The inputs of an expert's output projection and its output, for some tokens of a call."""
        ref, inputs = self._exit(expert), list[Tensor]()
        with hooked([before(self.block.module.get_submodule(ref.local), inputs.append)]):
            output = self.block.module.get_submodule(self.cut.owner)(*call.sent(rows, expert))
        return (inputs[0] if inputs else output.new_zeros(0, ref.shape[1])), output

    def _exit(self, expert: int) -> LayerRef:
        """The output projection of an expert: its last matrix."""
        prefix = f"{self.cut.owner}.{expert}."
        return [ref for ref in self.block.linear if ref.local.startswith(prefix)][-1]

    def _weight(self, ref: LayerRef) -> Tensor:
        return ref.weight_in(self.block.module.get_parameter(ref.local_parameter).data)

    @contextmanager
    def _seen(self, module: nn.Module, stop: bool = False) -> Iterator[_Seen]:
        """Within, what the experts of a module get and give is noted; `stop` ends a forward behind them."""
        owner, seen = module.get_submodule(self.cut.owner), _Seen(stop)

        def handles() -> Iterator[RemovableHandle]:
            yield owner.register_forward_pre_hook(seen.enter, with_kwargs=True)
            yield owner.register_forward_hook(seen.leave)

        with hooked(handles()):
            yield seen


class _Seen:
    """Notes the calls of a module that holds experts, and its outputs."""

    def __init__(self, stop: bool) -> None:
        self.stop = stop
        self.calls: list[RoutedCall] = []
        self.outputs: list[Tensor] = []
        self.largest = self.median = 0.0

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = RoutedCall.of(args, kwargs)
        assert call is not None  # the plan has seen such a call
        self.calls.append(call)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        assert isinstance(output, Tensor)
        self.outputs.append(output.flatten(0, -2).clone())
        if self.stop:
            raise StopForward

    def block_output(self, hidden: Tensor) -> None:
        """Note the largest magnitude in what the block returned, and the first batch's median."""
        size = hidden.float().abs()
        self.largest = max(self.largest, float(size.max()))
        self.median = self.median or float(size.median())

    def result(self) -> _Pass:
        """All calls as one."""
        return _Pass(RoutedCall.joined(self.calls), torch.cat(self.outputs), self.largest, self.median)
