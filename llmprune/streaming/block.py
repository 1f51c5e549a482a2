"""One transformer block with its weights in memory, and the activations that pass through it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.errors import InputError
from llmprune.model import compressed_tensors
from llmprune.model.blocks import LayerRef, find_layers
from llmprune.model.experts import ExpertMatrix, WatchedParameter, sliced_parameters, storage_of
from llmprune.model.skeleton import Skeleton
from llmprune.pruning.problem import LayerSolution, Scales
from llmprune.streaming.batch import Batch, hidden_of, own_state
from llmprune.streaming.narrower_experts import NarrowerExperts
from llmprune.structure.coupling import Coupling
from llmprune.structure.expert_cut import ExpertCut
from llmprune.structure.slicing import permute_and_slice

OVERFLOW = "the model overflows on this text; check the checkpoint, or try other calibration text (--calib)"


class Block:
    """One transformer block with its weights in memory.

    Args:
        skeleton: the model.
        index: position of the block.
        batches: the activations that enter it; they leave it by `advance`, or when its groups have all been solved.
        chosen: full names of the layers to be pruned.
        folder: for new values of experts that are too many for memory; None for the system's folder for such files.

    Attributes:
        layers: the layers to be pruned, by local name.
        changed: new values of parameters as they will be stored, by full name.
        scales: of those that are on a grid, by full name.
        supports: of those, bool, True = kept; a weight that is kept may be zero on the grid.
        advanced: whether the batches have passed.
        dense_module: the block of the dense model; the same module unless experts are removed.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        index: int,
        batches: list[Batch],
        chosen: frozenset[str],
        folder: Path | None = None,
    ) -> None:
        self.skeleton, self.index, self.batches = skeleton, index, batches
        self.name = skeleton.block_name(index)
        self.module = self.dense_module = skeleton.blocks[index]
        self._chosen = chosen
        self._find_layers()
        self.changed: dict[str, Tensor] = {}
        self.advanced = False
        self._dense_weights: dict[str, Tensor] = {}
        self._folder = folder
        self._sliced = dict(sliced_parameters(self.module))
        self._orders: list[tuple[Coupling, Tensor]] = []
        self.scales: dict[str, Scales] = {}
        self.supports: dict[str, Tensor] = {}
        self._kept_experts: Tensor | None = None
        self._borrowed: list[tuple[dict[str, Any], str, Any]] = []

    def _find_layers(self) -> None:
        self.linear = find_layers(self.module, self.name, self.skeleton.config)
        self.layers = {layer.local: layer for layer in self.linear if layer.name in self._chosen}

    @property
    def dense_stream(self) -> bool:
        """Whether the dense model's activations are propagated in parallel."""
        return self.batches[0].streams[1] is not None

    @property
    def shrinks(self) -> bool:
        """Whether inputs of a layer are removed."""
        return any(len(order) < coupling.width for coupling, order in self._orders)

    # Activations

    @torch.no_grad()
    def advance(self) -> None:
        """Pass all batches through the block, and through the dense block where its activations are streamed."""
        for batch in self.batches:
            if self.dense_stream:
                with self.dense():
                    self.pass_through(batch, dense=True)
            self.pass_through(batch)
        self.advanced = True

    def finish(self) -> None:
        """Pass the batches through the block, if they have not passed yet."""
        if not self.advanced:
            self.advance()

    @torch.no_grad()
    def recompute_outputs(self) -> None:
        """Pass the batches once more, with the block's present weights."""
        for batch in self.batches:
            self.pass_through(batch)

    def pass_through(self, batch: Batch, dense: bool = False) -> None:
        """Pass one batch through the block, and store the output."""
        batch.leave(self.checked_output(batch, dense, isolated=False).cpu(), dense)

    def checked_output(self, batch: Batch, dense: bool = False, isolated: bool = True) -> Tensor:
        """The block's output, arguments as of `forward`.

        Raises:
            InputError: it is not finite.
        """
        output = self.forward(batch, dense, isolated)
        if not bool(torch.isfinite(output).all()):
            raise InputError(f"the output of {self.name!r} holds NaN or Inf", OVERFLOW)
        return output

    @torch.no_grad()
    def trial(self) -> Tensor:
        """The block's output for the first batch, whose state stays as it is."""
        return self.forward(self.batches[0], isolated=True)

    def forward(self, batch: Batch, dense: bool = False, isolated: bool = False) -> Tensor:
        """The block's output, as it returns it.

        Args:
            batch: what enters.
            dense: whether the dense model's activations enter.
            isolated: whether state that the block writes into its arguments is kept from later blocks.
        """
        hidden = batch.entered(dense)
        call = (batch.dense_calls if dense else batch.calls)[self.index]
        if isolated:
            (call,) = own_state([call])
        return hidden_of(call.run(self.dense_module if dense else self.module, hidden.to(self.skeleton.device)))

    # Weights

    def weight(self, local: str) -> Tensor:
        """The weight of a layer to be pruned, `(out, in)`, a view."""
        ref = self.layers[local]
        return ref.weight_in(self.module.get_parameter(ref.local_parameter).data)

    def write(self, ref: LayerRef, solution: LayerSolution, keep_dense: bool) -> Tensor:
        """Store a solution; returns the weight as the file will hold it, `(out, in)`, float32.

        Args:
            ref: the layer.
            solution: its new weight.
            keep_dense: whether the dense weight is kept for `dense`.
        """
        local = ref.local_parameter
        if local in self._sliced:
            return self._write_slice(ref, solution)
        if keep_dense and local not in self._dense_weights:
            self._dense_weights[local] = self.module.get_parameter(local).data.clone()
        stored = self._checked(local, solution.weight)
        parameter = self.module.get_parameter(local).data
        if ref.expert is None:
            self.changed[ref.parameter] = (stored.T if ref.transposed else stored).contiguous().cpu()
            if solution.scales is not None:
                self.scales[ref.parameter], self.supports[ref.parameter] = solution.scales, solution.mask
        else:
            if ref.parameter not in self.changed:
                self.changed[ref.parameter] = self.as_stored(local, parameter).clone().cpu()
            ref.weight_in(self.changed[ref.parameter]).copy_(stored)
        ref.weight_in(parameter).copy_(stored)
        return stored.float()

    def _write_slice(self, ref: LayerRef, solution: LayerSolution) -> Tensor:
        """`write` where the parameter is not in memory: into a file; the dense weight is in the checkpoint."""
        assert ref.expert is not None
        local = ref.local_parameter
        values, stored = self._sliced[local], self._checked(local, solution.weight)
        new = values.open(stored.dtype, self._folder)
        ref.weight_in(new).copy_(stored)
        values.written(ref.expert.index)
        self.changed[ref.parameter] = new
        return stored.float()

    # Experts

    @torch.no_grad()
    def remove_experts(self, smaller: nn.Module, cut: ExpertCut, kept: Tensor) -> None:
        """Compute with some of the experts from now on; the dense module keeps all.

        Args:
            smaller: the block with fewer experts, without weights; it shares those that do not change until `close`.
            cut: what gets smaller.
            kept: the experts that stay, `(kept,)`, int64; they are numbered anew.
        """
        for local, slot in smaller.state_dict(keep_vars=True).items():
            path, _, attribute = local.rpartition(".")
            value = _tensor(self.module, local)
            owner = smaller.get_submodule(path)
            slots: dict[str, Any] = owner._parameters if attribute in owner._parameters else owner._buffers
            self._borrowed.append((slots, attribute, slots[attribute]))
            if local in cut.parts:
                value = cut.sliced(local, value.detach(), kept)
                self.changed[f"{self.name}.{local}"] = self.as_stored(local, value).contiguous().cpu()
                if isinstance(slot, nn.Parameter):
                    value = slot.filled(value) if isinstance(slot, WatchedParameter) else nn.Parameter(value, False)
            slots[attribute] = value
        self.module, self._kept_experts = smaller, kept
        self._find_layers()

    def close(self) -> None:
        """Give back the module without weights that `remove_experts` was given."""
        for slots, attribute, value in self._borrowed:
            slots[attribute] = value
        self._borrowed.clear()

    def dense_expert(self, index: int) -> int:
        """The number of an expert in the dense module."""
        return index if self._kept_experts is None else int(self._kept_experts[index])

    def dense_local(self, local: str) -> str:
        """The local name of a layer in the dense module."""
        if not isinstance(self.module.get_submodule(local), ExpertMatrix):
            return local
        owner, index, attribute = local.rsplit(".", 2)
        return f"{owner}.{self.dense_expert(int(index))}.{attribute}"

    def reorder(self, coupling: Coupling, order: Tensor) -> None:
        """Give a layer the inputs `order (kept,)` in the file; inputs that it does not name are removed."""
        self._orders.append((coupling, order))

    @torch.no_grad()
    def store(self, values: Mapping[str, Tensor]) -> None:
        """Give parameters new values, by local name; the block computes with the values as they will be stored."""
        for local, value in values.items():
            stored = self._checked(local, value)
            self.module.get_parameter(local).copy_(stored)
            self.changed[f"{self.name}.{local}"] = stored.contiguous().cpu()

    def as_stored(self, local: str, value: Tensor) -> Tensor:
        """A parameter's value in the dtype of the file."""
        return value.to(self.skeleton.checkpoint.stored_dtype(f"{self.name}.{local}"))

    def _checked(self, local: str, value: Tensor) -> Tensor:
        """A new value of a parameter, or of a part of it, in the dtype of the file."""
        stored = self.as_stored(local, value)
        if not bool(torch.isfinite(stored).all()):
            name = f"{self.name}.{local}"
            raise InputError(
                f"the pruned weights of {name!r} hold NaN or Inf in {stored.dtype}", "choose another --dtype"
            )
        return stored

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """The block's tensors by their names on disk, with new weights, permuted and sliced."""
        checkpoint = self.skeleton.checkpoint
        whole = {_storage(self.module, local)[0] for coupling, _ in self._orders for local in self._moved_by(coupling)}
        for local, values in self._sliced.items():
            name = f"{self.name}.{local}"
            if name in self.changed or checkpoint.stored_as_is(name) or local in whole:
                self.changed[name] = values.complete(checkpoint.stored_dtype(name), self._folder)
        spread = {name: self.as_stored(name, scales.spread()).cpu() for name, scales in self._local_scales().items()}
        narrow = NarrowerExperts(self.module, set(self._sliced), self._folder)
        for coupling, order in self._orders:
            current = {local: self._as_written(local) for local in self._moved_by(coupling)}
            # A scale goes where its weight goes.
            moved = permute_and_slice(coupling, order.cpu(), {**current, **spread}) if spread else {}
            spread |= {local: moved[local] for local in spread.keys() & moved.keys()}
            for local, value in permute_and_slice(coupling, order.cpu(), current).items():
                if not narrow.takes(local, value, current[local]):
                    self._rewrite(local, value)
        self._orders.clear()
        self.changed |= {f"{self.name}.{local}": value for local, value in narrow.parameters.items()}
        sliced = {f"{self.name}.{local}": values.slices.export for local, values in self._sliced.items()}
        tensors = checkpoint.export(self.skeleton.block_parameters(self.index), self.changed, sliced)
        return self._on_grid(tensors, spread) if spread else tensors

    def _local_scales(self) -> dict[str, Scales]:
        return {name.removeprefix(f"{self.name}."): scales for name, scales in self.scales.items()}

    def _on_grid(
        self, tensors: Iterator[tuple[str, Tensor]], spread: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors on disk, with codes and scales in place of weights on a grid.

        Args:
            tensors: by their names on disk.
            spread: the scale of every weight, as it is stored, by local name.
        """
        origin = self.skeleton.checkpoint.origin
        local_of = {origin(f"{self.name}.{local}").names[0]: local for local in spread}
        for disk, tensor in tensors:
            if (local := local_of.get(disk)) is None:
                yield disk, tensor
                continue
            grid, scale = self.scales[f"{self.name}.{local}"].grid, spread[local]
            yield from compressed_tensors.written(disk, tensor, scale[:, :: grid.group or scale.shape[1]], grid)

    def _moved_by(self, coupling: Coupling) -> list[str]:
        """Local names of the weights and biases that another order of a layer's inputs changes, or fewer of them."""
        return list(dict.fromkeys(coupling.permuted_parameters(self.module) + coupling.sliced_parameters(self.module)))

    def movable(self, coupling: Coupling, dense: Collection[str]) -> bool:
        """Whether all that a permutation moves can be written, and no layer that must stay as it is takes part.

        Args:
            coupling: of the layer whose inputs would be permuted.
            dense: layers that stay dense though they were chosen.
        """
        left = {layer.local for layer in self.linear if layer.local in dense or layer.local not in self.layers}
        return not left & {producer.local for producer in coupling.producers} and all(
            self.writable(_storage(self.module, local)[0]) for local in coupling.permuted_parameters(self.module)
        )

    def writable(self, local: str) -> bool:
        """Whether a new value of a parameter can be written."""
        checkpoint, name = self.skeleton.checkpoint, f"{self.name}.{local}"
        return checkpoint.writable(name) and not checkpoint.shared(name)

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Within, the block computes with its dense weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def change_of(self, local: str) -> Tensor | None:
        """Pruned minus dense weight of a layer, as the module stores it; None if it was not changed."""
        name = self.layers[local].local_parameter
        dense = self._dense_weights.get(name)
        return None if dense is None else self.module.get_parameter(name).data - dense

    def _swap(self) -> None:
        for values in self._sliced.values():
            values.dense = not values.dense
        for name, other in self._dense_weights.items():
            parameter = self.module.get_parameter(name)
            self._dense_weights[name], parameter.data = parameter.data, other

    def _as_written(self, local: str) -> Tensor:
        """A layer's weight or bias as it will be stored; of an expert, a part of the parameter in `changed`."""
        parameter, part = _storage(self.module, local)
        name, checkpoint = f"{self.name}.{parameter}", self.skeleton.checkpoint
        value = self.changed[name] if name in self.changed else checkpoint.stored(checkpoint[name])
        if parameter != local:
            self.changed[name] = value = value.contiguous()
        return part(value)

    def _rewrite(self, local: str, value: Tensor) -> None:
        """Store a weight or bias that `_as_written` gave in another form."""
        parameter, part = _storage(self.module, local)
        if parameter == local:
            self.changed[f"{self.name}.{local}"] = value
        else:
            part(self.changed[f"{self.name}.{parameter}"]).copy_(value)


def _tensor(module: nn.Module, local: str) -> Tensor:
    """A parameter or buffer of a block."""
    path, _, attribute = local.rpartition(".")
    found = getattr(module.get_submodule(path), attribute)
    assert isinstance(found, Tensor)
    return found


def _storage(module: nn.Module, local: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    found = storage_of(module, local)
    assert found is not None
    return found
