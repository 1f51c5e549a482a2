"""Dependencies of a consumer's inputs on rows of other layers, read off the gradients of one forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llmprune.model.blocks import LayerRef, is_scale
from llmprune.model.hooks import hooked, inputs_of
from llmprune.structure.coupling import Coupling, Dependency, Producer
from llmprune.structure.float64 import Float64

Run = Callable[[nn.Module, Tensor], Any]


class Probe:
    """One forward of a block in which every layer's output is a leaf of the autograd graph.

    Args:
        block: a copy with random weights.
        layers: its linear layers.
        generator: for the leaves.
    """

    def __init__(self, block: nn.Module, layers: Sequence[LayerRef], generator: torch.Generator) -> None:
        self.block, self.generator = block, generator
        self.layers = {layer.local: layer for layer in layers}
        self.inputs: dict[str, list[Tensor]] = {}
        self.leaves: dict[str, list[Tensor]] = {}

    def watch(self, run: Run, hidden: Tensor) -> None:
        """Run the block; outputs of layers become leaves, their inputs are recorded."""
        self.entry = hidden.clone().requires_grad_()
        with hooked(self._hooks()), Float64(), torch.enable_grad():
            run(self.block, self.entry.clone())

    def _hooks(self) -> Iterator[RemovableHandle]:
        for local, module in self.block.named_modules():
            if local in self.layers:
                yield module.register_forward_hook(self._replaced_output(local), with_kwargs=True)
            elif is_scale(module):
                yield module.register_forward_hook(self._rescaled_output(local))

    def _replaced_output(self, local: str) -> Callable[..., Tensor]:
        def replace(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            self.inputs.setdefault(local, []).append(inputs_of(args, kwargs))
            # The sign turns from token to token, so that no row is in the dead part of an activation all the time.
            sign = torch.randint(2, output.shape[-1:], generator=self.generator) * 2 - 1
            turn = torch.arange(output[..., 0].numel()).view(output.shape[:-1]) % 2 * 2 - 1
            leaf = self._leaf(local, output.shape, output.device, sign * turn[..., None])
            return leaf.clone()

        return replace

    def _rescaled_output(self, local: str) -> Callable[..., Tensor | None]:
        def replace(module: nn.Module, args: Any, output: Any) -> Tensor | None:
            inputs, width = args[0] if len(args) == 1 else None, module.get_parameter("weight").shape
            if not isinstance(inputs, Tensor) or not isinstance(output, Tensor):
                return None
            if inputs.shape != output.shape or output.shape[-1:] != width:
                return None
            return inputs * self._leaf(local, width, output.device, torch.ones(1))

        return replace

    def _leaf(self, local: str, shape: torch.Size, device: torch.device, sign: Tensor) -> Tensor:
        value = (torch.rand(shape, generator=self.generator, dtype=torch.float64) + 0.5) * sign
        leaf = value.to(device).requires_grad_()
        self.leaves.setdefault(local, []).append(leaf)
        return leaf

    def guess(self, consumer: LayerRef) -> Coupling | None:
        """The coupling that the gradients of a consumer's inputs suggest, None if there is none."""
        inputs = self.inputs.get(consumer.local, [])
        if len(inputs) != 1 or not inputs[0].requires_grad or consumer.shape[1] < 2:
            return None
        dependencies = self._dependencies(inputs[0])
        return None if dependencies is None else _couple(consumer, dependencies, self.layers)

    def _dependencies(self, inputs: Tensor) -> list[Dependency] | None:
        """All dependencies of the inputs; None if one is the block's input or a layer called more than once."""
        leaves = [(local, leaf) for local, leaves in self.leaves.items() for leaf in leaves]
        weights = torch.rand(inputs.shape, generator=self.generator, dtype=torch.float64).to(inputs.device) + 0.5

        def reached(wanted: Tensor, leaves: list[Tensor]) -> list[Tensor]:
            """For every leaf the rows on which a wanted input depends, bool; `wanted (in,)`, 0 or 1."""
            cotangent = weights * wanted.to(inputs.device)
            gradients = torch.autograd.grad(inputs, leaves, cotangent, retain_graph=True, materialize_grads=True)
            return [gradient.ne(0).reshape(-1, gradient.shape[-1]).any(0).cpu() for gradient in gradients]

        entry, *reach = reached(torch.ones(inputs.shape[-1]), [self.entry, *(leaf for _, leaf in leaves)])
        leaves = [leaf for leaf, rows in zip(leaves, reach, strict=True) if bool(rows.any())]
        if bool(entry.any()) or any(len(self.leaves[local]) > 1 for local, _ in leaves):
            return None
        counting = [leaf for _, leaf in leaves]
        return _read(inputs.shape[-1], [local for local, _ in leaves], lambda wanted: reached(wanted, counting))


def _read(width: int, locals_: list[str], reached: Callable[[Tensor], list[Tensor]]) -> list[Dependency]:
    """The inputs that depend on every row: a single one by the bits of its number, several by a gradient of each input.

    A row feeds a single input if, for every bit, it feeds inputs with that bit set or inputs without it, not both.
    """
    place = torch.arange(width)
    bits = range((width - 1).bit_length())
    with_bit = [reached(place >> bit & 1) for bit in bits]
    without = [reached(1 - (place >> bit & 1)) for bit in bits]
    dependencies = []
    for at, local in enumerate(locals_):
        ones = torch.stack([rows[at] for rows in with_bit])
        zeros = torch.stack([rows[at] for rows in without])
        alone = (ones ^ zeros).all(0)
        number = (ones.long() << torch.tensor(bits)[:, None]).sum(0)
        several = ((ones | zeros).any(0) & ~alone).nonzero().flatten()
        support = torch.zeros(len(several), width, dtype=torch.bool)
        dependencies.append(Dependency(local, torch.where(alone, number, -1), several, support))
    if any(len(dependency.several) for dependency in dependencies):
        for at in range(width):
            for dependency, rows in zip(dependencies, reached(place == at), strict=True):
                dependency.support[:, at] = rows[dependency.several]
    return dependencies


def _couple(consumer: LayerRef, dependencies: list[Dependency], layers: Mapping[str, LayerRef]) -> Coupling | None:
    """Group coupled inputs and rows into columns, and columns into classes within which they may be permuted.

    Rows of one layer that feed the same several inputs mix channels (the query rows of a head). Inputs that depend on
    the same mixing rows are of one kind (a head). All other rows feed their inputs one by one: connected components of
    rows and inputs make a column (a value row, its input in every head of the group). Columns with inputs and rows of
    the same kinds form a class.
    """
    kind, links = _kinds(consumer.shape[1], dependencies)
    columns: dict[int, list[int]] = {}
    for at, label in enumerate(_components(consumer.shape[1], links)):
        columns.setdefault(label, []).append(at)
    column_of: dict[int, int] = {}
    copy_of: dict[int, int] = {}
    for label, members in columns.items():
        members.sort(key=lambda at: (kind[at], at))
        column_of |= dict.fromkeys(members, label)
        copy_of |= {at: copy for copy, at in enumerate(members)}
    rows: dict[int, list[tuple[int, list[int], int]]] = {label: [] for label in columns}
    for number, row, inputs in links:
        rows[column_of[inputs[0]]].append((number, sorted(copy_of[at] for at in inputs), row))
    classes: dict[object, list[int]] = {}
    for label, members in columns.items():
        rows[label].sort()
        key = tuple(kind[at] for at in members), tuple((number, *copies) for number, copies, _ in rows[label])
        classes.setdefault(key, []).append(label)
    movable = [labels for labels in classes.values() if len(labels) > 1 and rows[labels[0]]]
    if not movable:
        return None
    producers = []
    for number, dependency in enumerate(dependencies):
        index = [[[row for n, _, row in rows[label] if n == number] for label in labels] for labels in movable]
        if any(any(members) for labels in index for members in labels):
            layer = layers.get(dependency.local)
            matrices = tuple(torch.tensor(labels, dtype=torch.long).T for labels in index)
            producers.append(Producer(dependency.local, layer is not None and layer.transposed, matrices))
    slots = tuple(torch.tensor([columns[label] for label in labels]).T for labels in movable)
    marked = [
        replace(dependency, transposed=(layer := layers.get(dependency.local)) is not None and layer.transposed)
        for dependency in dependencies
    ]
    return Coupling(consumer.local, consumer.transposed, consumer.shape[1], slots, tuple(producers), tuple(marked))


def _kinds(width: int, dependencies: list[Dependency]) -> tuple[list[int], list[tuple[int, int, list[int]]]]:
    """The kind of every input, and the rows that do not mix: `(number of the dependency, row, its inputs)`."""
    generator = torch.Generator().manual_seed(0)
    signature = torch.zeros(width, dtype=torch.long)
    links = []
    for number, dependency in enumerate(dependencies):
        rows = dependency.single.ge(0).nonzero().flatten()
        links += [(number, row, [at]) for row, at in zip(rows.tolist(), dependency.single[rows].tolist(), strict=True)]
        # Sums of random numbers tell supports apart: of rows, and then of inputs.
        code = dependency.support.long() @ torch.randint(2**40, (width,), generator=generator)
        _, same, count = torch.unique(code, return_inverse=True, return_counts=True)
        mixing = count[same] > 1
        signature += torch.randint(2**40, (int(mixing.sum()),), generator=generator) @ dependency.support[mixing].long()
        pairs = zip(dependency.several[~mixing].tolist(), dependency.support[~mixing], strict=True)
        links += [(number, row, support.nonzero().flatten().tolist()) for row, support in pairs]
    first: dict[int, int] = {}
    return [first.setdefault(value, at) for at, value in enumerate(signature.tolist())], links


def _components(width: int, links: list[tuple[int, int, list[int]]]) -> list[int]:
    """The lowest input in the connected component of every input."""
    parent = list(range(width))

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = at = parent[parent[at]]
        return at

    for _, _, inputs in links:
        low = min(map(root, inputs))
        for at in inputs:
            parent[root(at)] = low
    return [root(at) for at in range(width)]
