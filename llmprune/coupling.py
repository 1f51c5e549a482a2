"""Which rows of which layers feed which inputs of another layer, found by watching a block run.

If the inputs of a layer (the sink) are fed one by one by output rows of others (its sources), with nothing in between
that mixes them, rows and inputs can change places together, or go together, and the block computes the same. No layer's
name is known here: a guess is read off one differentiated forward, and kept only if the block really computes the same
after its channels were permuted at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmprune.families import LayerRef
from llmprune.watch import is_scale

TOLERANCE = 1e-10
Run = Callable[[nn.Module, Tensor], Any]


@dataclass(frozen=True, slots=True)
class Source:
    """A layer whose output rows feed a sink; or a norm on the way to it, whose scale has a row for every input.

    Args:
        local: module name inside the block.
        transposed: True where the module stores `(in, out)` (Conv1D).
        rows: for every class of the coupling `(copies, free)`, int64: the rows that move with its columns. There may be
            more than one row for a column (gate and up in one layer), fewer than inputs (one value row feeds an input
            of every query head of its group), or none.
    """

    local: str
    transposed: bool
    rows: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Feed:
    """Which inputs of a sink the rows of a layer, or the entries of a norm's scale, feed.

    Args:
        local: module name inside the block.
        single: `(rows,)`, int64, the only input that a row feeds, −1 for none or several.
        several: `(k,)`, int64, the rows that feed several (query and key rows feed all inputs of their heads).
        support: `(k, in)`, bool: which ones.
        transposed: True where the module stores `(in, out)` (Conv1D).
    """

    local: str
    single: Tensor
    several: Tensor
    support: Tensor
    transposed: bool = False

    def staying(self, gone: Tensor) -> Tensor:
        """The rows that stay, `(k,)`, int64, if the inputs `gone (in,)` go: a row goes with all that it feeds."""
        stays = torch.ones(len(self.single), dtype=torch.bool)
        alone = self.single >= 0
        stays[alone] = ~gone[self.single[alone]]
        stays[self.several] = (self.support & ~gone).any(1)
        return stays.nonzero().flatten()


@dataclass(frozen=True, slots=True)
class Coupling:
    """How a sink's inputs hang together with its sources' rows.

    Args:
        sink: module name inside the block.
        transposed: True where it stores `(in, out)` (Conv1D).
        width: its number of inputs.
        classes: each `(copies, free)`, int64, inputs of the sink. The inputs in one column are fed by the same rows and
            go together; the columns of a class may change places with each other, those of different classes may not
            (attention heads). Inputs that no row feeds alone are in no class.
        sources: the layers whose rows feed them one by one.
        feeds: all that feeds them, query and key rows and shared norms too.
        severable: whether inputs can be removed: without the rows that feed only them, they are zero, and the others
            are what they were (behind a norm over all of them they are not).
    """

    sink: str
    transposed: bool
    width: int
    classes: tuple[Tensor, ...]
    sources: tuple[Source, ...]
    feeds: tuple[Feed, ...] = ()
    severable: bool = False

    def parameters(self, block: nn.Module) -> list[str]:
        """Names in the block of the parameters that a permutation moves."""
        return self._parameters(block, [source.local for source in self.sources])

    def fed(self, block: nn.Module) -> list[str]:
        """Names in the block of the parameters that shrink when inputs are removed."""
        return self._parameters(block, [feed.local for feed in self.feeds])

    def _parameters(self, block: nn.Module, locals_: list[str]) -> list[str]:
        own = {name for name, _ in block.named_parameters()}
        names = [f"{local}.{kind}" for local in locals_ for kind in ("weight", "bias")]
        return [name for name in [*names, f"{self.sink}.weight"] if name in own]


def fold(
    coupling: Coupling, order: Tensor, tensors: Mapping[str, Tensor], prefix: str = "", sink: bool = True
) -> dict[str, Tensor]:
    """Permute the rows of the sources and the columns of the sink; the block computes the same as before.

    Args:
        coupling: what moves together.
        order: `(width,)`, int64: position p of the sink gets input `order[p]`. It must respect the classes.
        tensors: at least all parameters of these layers, as the modules store them, by name; a bias that is not there
            is one that the layer does not have.
        prefix: stands before the local names.
        sink: whether the sink's columns are permuted too.

    Returns:
        The tensors that changed, new ones, by name.

    Raises:
        ValueError: the order moves an input out of its class, or apart from its copies.
    """
    order = order.cpu()
    moves = [_move(order, slots) for slots in coupling.classes]
    respected = torch.equal(_scatter(coupling.classes, moves, coupling.width), order)
    if not respected or len(set(order.tolist())) != coupling.width:
        raise ValueError("the order moves inputs out of their class or apart from their copies, or loses some")
    changed = {}
    for source in coupling.sources:
        for kind in ("weight", "bias"):
            name = f"{prefix}{source.local}.{kind}"
            if kind == "weight" or name in tensors:
                axis = tensors[name].dim() - 1 if source.transposed else 0
                rows = _scatter(source.rows, moves, tensors[name].shape[axis])
                changed[name] = tensors[name].index_select(axis, rows.to(tensors[name].device))
    if sink:
        name = f"{prefix}{coupling.sink}.weight"
        changed[name] = tensors[name].index_select(int(not coupling.transposed), order.to(tensors[name].device))
    return changed


def _move(order: Tensor, slots: Tensor) -> Tensor:
    """By which column of `slots` every column is replaced."""
    position = torch.zeros_like(order)
    position[slots[0]] = torch.arange(slots.shape[1])
    return position[order[slots[0]]]


def _scatter(indices: Sequence[Tensor], moves: Sequence[Tensor], size: int) -> Tensor:
    """The order of `size` rows in which the columns of every index matrix are moved."""
    order = torch.arange(size)
    for index, move in zip(indices, moves, strict=True):
        order[index] = index[:, move]
    return order


def find_couplings(block: nn.Module, run: Run, hidden: Tensor, layers: Sequence[LayerRef]) -> list[Coupling]:
    """All couplings inside one transformer block.

    The block is copied with random weights in float64, so its own may be anywhere, also on the meta device. In one
    forward, every linear layer's output is replaced by random numbers, and every norm by a random scale for each input.
    So the gradient of a sink's inputs tells on which rows each of them depends, through nothing but what lies between
    (activations, products, attention). Rows that feed single inputs are read off by differentiating `log₂(in)` times;
    for the others (query and key rows, value rows shared by heads) every input is differentiated.

    Nothing is trusted: the copy's rows and columns are permuted, at random within the classes, and all that the run
    leaves behind must stay the same to `TOLERANCE`. A block that cannot run so (a kernel without float64, state that
    an earlier block should have handed on) has no couplings.

    Args:
        block: the block; it is left alone. No hooks of the caller's may be on it.
        run: calls a block with hidden states; returns all that it leaves behind: its output, and whatever state it
            hands to later blocks.
        hidden: `(batch, tokens, hidden)` for that call; a few tokens are enough, two at least. Only shape and device
            matter.
        layers: the linear layers of the block.

    Returns:
        One coupling for every sink that has one.
    """
    generator = torch.Generator().manual_seed(0)
    copy = _random_copy(block, hidden.device, generator)
    noise = torch.randn(hidden.shape, generator=generator, dtype=torch.float64).to(hidden.device)
    probe = _Probe(copy, layers, generator)
    try:
        probe.watch(run, noise)
    except (RuntimeError, KeyError):
        return []
    guesses = [guess for layer in layers if (guess := probe.guess(layer)) is not None]
    if not guesses:
        return []
    with Float64(), torch.no_grad():
        dense = _tensors(run(copy, noise))
        held = [guess for guess in guesses if _holds(guess, copy, run, noise, dense, generator)]
        return [replace(guess, severable=_severs(guess, copy, run, noise)) for guess in held]


def _random_copy(block: nn.Module, device: torch.device, generator: torch.Generator) -> nn.Module:
    """The block with other parameters: matrices keep the scale of their inputs, vectors are positive."""
    fresh: dict[int, Any] = {}
    for parameter in block.parameters():
        value = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() < 2:
            value += 0.5
        else:
            value.sub_(0.5).mul_((12 / parameter.shape[-1]) ** 0.5)
        fresh[id(parameter)] = nn.Parameter(value.to(device), requires_grad=False)
    # What the memo knows is not copied: the block's own weights are never read.
    copy = deepcopy(block, fresh).double().eval()
    for module in copy.modules():
        # The grouped kernels for fused experts have no float64.
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"
    return copy


class Float64(TorchFunctionMode):
    """While it is on, every function sees and makes float64 where it would see and make another float dtype.

    Many models compute norms, softmax or masks in float32 whatever their weights are, which would blur the difference
    between the same and nearly the same.
    """

    def __enter__(self) -> Self:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        torch.set_default_dtype(self._default)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in {torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}:
            func = torch.Tensor.double
        return _double(func(*_double(args), **_double(kwargs or {})))


def _double(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() and value.dtype != torch.float64 else value
    if type(value) in {tuple, list}:
        return type(value)(map(_double, value))
    return {key: _double(item) for key, item in value.items()} if type(value) is dict else value


def _holds(
    guess: Coupling, block: nn.Module, run: Run, hidden: Tensor, dense: list[Tensor], generator: torch.Generator
) -> bool:
    """Whether the block computes the same after a random permutation, and does not if only the sources are permuted."""
    moves = [_cycle(slots.shape[1], generator) for slots in guess.classes]
    order = _scatter(guess.classes, moves, guess.width)
    parameters = dict(block.named_parameters())

    def distance(sink: bool) -> float:
        with _swapped(parameters, fold(guess, order, parameters, sink=sink)):
            return _distance(dense, _tensors(run(block, hidden)))

    return distance(sink=True) <= TOLERANCE < distance(sink=False)


def _severs(guess: Coupling, block: nn.Module, run: Run, hidden: Tensor) -> bool:
    """Whether inputs whose rows are zero are zero, and all others what they were.

    A class goes as a whole, or every other column of one, or one copy of every class (query heads, whose value rows
    then stay for the other copies, so that the inputs need not be zero).
    """
    parameters, inputs = dict(block.named_parameters()), _inputs_of(guess.sink, block, run)
    dense = inputs(hidden)
    for columns, wholly in _samples(guess.classes):
        gone = torch.zeros(guess.width, dtype=torch.bool)
        gone[columns] = True
        with _swapped(parameters, _zeroed(guess, gone, parameters)):
            left = inputs(hidden)
        gone = gone.to(left.device)
        if (wholly and bool(left[..., gone].any())) or _distance([dense[..., ~gone]], [left[..., ~gone]]) > TOLERANCE:
            return False
    return True


def _samples(classes: tuple[Tensor, ...]) -> list[tuple[Tensor, bool]]:
    """Inputs to be removed on trial, and whether all their copies are among them."""
    samples = [(classes[0][:, ::2].flatten(), True)]
    samples += [(classes[0].flatten(), True)] if len(classes) > 1 else []
    samples += [(torch.cat([slots[0] for slots in classes]), False)] if len(classes[0]) > 1 else []
    return samples


def _zeroed(guess: Coupling, gone: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that feed a sink, zero in all rows that feed nothing but the inputs `gone (in,)`, bool."""
    changed = {}
    for feed in guess.feeds:
        stays = torch.zeros(len(feed.single))
        stays[feed.staying(gone)] = 1
        for name in (f"{feed.local}.weight", f"{feed.local}.bias"):
            if name in parameters:
                value = parameters[name].detach()
                across = value.dim() > 1 and not feed.transposed
                changed[name] = value * (stays[:, None] if across else stays).to(value)
    return changed


def _inputs_of(local: str, block: nn.Module, run: Run) -> Callable[[Tensor], Tensor]:
    """A function that runs the block and returns what one of its layers is fed."""

    def inputs(hidden: Tensor) -> Tensor:
        seen: list[Tensor] = []
        handle = block.get_submodule(local).register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args[0] if args else next(iter(kwargs.values()))).clone()),
            with_kwargs=True,
        )
        with handle:
            run(block, hidden)
        return seen[0]

    return inputs


def _cycle(size: int, generator: torch.Generator) -> Tensor:
    """A random permutation that leaves nothing in its place."""
    cycle = torch.randperm(size, generator=generator)
    return torch.empty_like(cycle).scatter_(0, cycle, cycle.roll(1))


@contextmanager
def _swapped(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> Iterator[None]:
    before = {name: parameters[name].data for name in values}
    for name, value in values.items():
        parameters[name].data = value
    try:
        yield
    finally:
        for name, value in before.items():
            parameters[name].data = value


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and mappings, copied."""
    if isinstance(value, Tensor):
        return [value.detach().clone()]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def _distance(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest relative difference; infinite if anything is not finite or has another shape."""
    if [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
        return torch.inf
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        finite = torch.isfinite(a)
        if not torch.equal(a[~finite], b[~finite]):
            return torch.inf
        difference = float((a[finite].double() - b[finite].double()).norm())
        if not difference < torch.inf:
            return torch.inf
        worst = max(worst, difference / max(float(a[finite].double().norm()), 1e-300))
    return worst


class _Probe:
    """One forward of a block in which every layer's output is a leaf of the graph.

    Args:
        block: its copy.
        layers: its linear layers.
        generator: for the leaves.
    """

    def __init__(self, block: nn.Module, layers: Sequence[LayerRef], generator: torch.Generator) -> None:
        self.block, self.generator = block, generator
        self.layers = {layer.local: layer for layer in layers}
        self.inputs: dict[str, list[Tensor]] = {}
        self.leaves: dict[str, list[Tensor]] = {}

    def watch(self, run: Run, hidden: Tensor) -> None:
        """Run the block: outputs become leaves, inputs are noted."""
        self.entry = hidden.clone().requires_grad_()
        with ExitStack() as stack:
            for local, module in self.block.named_modules():
                if local in self.layers:
                    hook = module.register_forward_hook(self._cut(local), with_kwargs=True)
                elif is_scale(module):
                    hook = module.register_forward_hook(self._scale(local))
                else:
                    continue
                stack.callback(hook.remove)
            with Float64(), torch.enable_grad():
                run(self.block, self.entry.clone())

    def _cut(self, local: str) -> Callable[..., Tensor]:
        def replace(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            self.inputs.setdefault(local, []).append(args[0] if args else next(iter(kwargs.values())))
            # The sign turns from token to token, so that no row is in the dead part of an activation all the time.
            sign = torch.randint(2, output.shape[-1:], generator=self.generator) * 2 - 1
            turn = torch.arange(output[..., 0].numel()).view(output.shape[:-1]) % 2 * 2 - 1
            leaf = self._leaf(local, output.shape, output.device, sign * turn[..., None])
            return leaf.clone()

        return replace

    def _scale(self, local: str) -> Callable[..., Tensor | None]:
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

    def guess(self, sink: LayerRef) -> Coupling | None:
        """What the gradients of a sink's inputs say."""
        inputs = self.inputs.get(sink.local, [])
        if len(inputs) != 1 or not inputs[0].requires_grad or sink.shape[1] < 2:
            return None
        feeds = self._feeds(inputs[0])
        return None if feeds is None else _couple(sink, feeds, self.layers)

    def _feeds(self, inputs: Tensor) -> list[Feed] | None:
        """What feeds the inputs; None if the block's own input does, or a layer that was called more than once."""
        leaves = [(local, leaf) for local, leaves in self.leaves.items() for leaf in leaves]
        weights = torch.rand(inputs.shape, generator=self.generator, dtype=torch.float64).to(inputs.device) + 0.5

        def touched(wanted: Tensor, leaves: list[Tensor]) -> list[Tensor]:
            """For every leaf, which of its rows feed one of the wanted inputs; `wanted (in,)`, 0 or 1."""
            cotangent = weights * wanted.to(inputs.device)
            gradients = torch.autograd.grad(inputs, leaves, cotangent, retain_graph=True, materialize_grads=True)
            return [gradient.ne(0).reshape(-1, gradient.shape[-1]).any(0).cpu() for gradient in gradients]

        entry, *reach = touched(torch.ones(inputs.shape[-1]), [self.entry, *(leaf for _, leaf in leaves)])
        leaves = [leaf for leaf, rows in zip(leaves, reach, strict=True) if bool(rows.any())]
        if bool(entry.any()) or any(len(self.leaves[local]) > 1 for local, _ in leaves):
            return None
        counting = [leaf for _, leaf in leaves]
        return _read(inputs.shape[-1], [local for local, _ in leaves], lambda wanted: touched(wanted, counting))


def _read(width: int, locals_: list[str], touched: Callable[[Tensor], list[Tensor]]) -> list[Feed]:
    """Find every row's inputs: a single one by the bits of its number, several ones by asking for each input.

    A row feeds a single input if, for every bit, it feeds inputs with that bit set or inputs without it, not both.
    """
    place = torch.arange(width)
    bits = range((width - 1).bit_length())
    with_bit = [touched(place >> bit & 1) for bit in bits]
    without = [touched(1 - (place >> bit & 1)) for bit in bits]
    feeds = []
    for at, local in enumerate(locals_):
        ones = torch.stack([rows[at] for rows in with_bit])
        zeros = torch.stack([rows[at] for rows in without])
        alone = (ones ^ zeros).all(0)
        number = (ones.long() << torch.tensor(bits)[:, None]).sum(0)
        several = ((ones | zeros).any(0) & ~alone).nonzero().flatten()
        support = torch.zeros(len(several), width, dtype=torch.bool)
        feeds.append(Feed(local, torch.where(alone, number, -1), several, support))
    if any(len(feed.several) for feed in feeds):
        for at in range(width):
            for feed, rows in zip(feeds, touched(place == at), strict=True):
                feed.support[:, at] = rows[feed.several]
    return feeds


def _couple(sink: LayerRef, feeds: list[Feed], layers: Mapping[str, LayerRef]) -> Coupling | None:
    """Sort inputs and rows into columns that move together, and these into classes within which they may move.

    Rows of one layer that feed the same several inputs mix channels (the query rows of a head). Inputs that the same
    mixing rows feed are of one kind (a head). All other rows feed their inputs one by one: rows and inputs that hang
    together make a column (a value row, its input in every head of the group). Columns with inputs and rows of the
    same kinds form a class.
    """
    kind, links = _kinds(sink.shape[1], feeds)
    columns: dict[int, list[int]] = {}
    for at, label in enumerate(_components(sink.shape[1], links)):
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
    sources = []
    for number, feed in enumerate(feeds):
        index = [[[row for n, _, row in rows[label] if n == number] for label in labels] for labels in movable]
        if any(any(members) for labels in index for members in labels):
            layer = layers.get(feed.local)
            matrices = tuple(torch.tensor(labels, dtype=torch.long).T for labels in index)
            sources.append(Source(feed.local, layer is not None and layer.transposed, matrices))
    slots = tuple(torch.tensor([columns[label] for label in labels]).T for labels in movable)
    marked = [
        replace(feed, transposed=(layer := layers.get(feed.local)) is not None and layer.transposed) for feed in feeds
    ]
    return Coupling(sink.local, sink.transposed, sink.shape[1], slots, tuple(sources), tuple(marked))


def _kinds(width: int, feeds: list[Feed]) -> tuple[list[int], list[tuple[int, int, list[int]]]]:
    """The kind of every input, and the rows that do not mix: `(number of the feed, row, its inputs)`."""
    generator = torch.Generator().manual_seed(0)
    signature = torch.zeros(width, dtype=torch.long)
    links = []
    for number, feed in enumerate(feeds):
        rows = feed.single.ge(0).nonzero().flatten()
        links += [(number, row, [at]) for row, at in zip(rows.tolist(), feed.single[rows].tolist(), strict=True)]
        # Sums of random numbers tell supports apart: of rows, and then of inputs.
        code = feed.support.long() @ torch.randint(2**40, (width,), generator=generator)
        _, same, count = torch.unique(code, return_inverse=True, return_counts=True)
        mixing = count[same] > 1
        signature += torch.randint(2**40, (int(mixing.sum()),), generator=generator) @ feed.support[mixing].long()
        pairs = zip(feed.several[~mixing].tolist(), feed.support[~mixing], strict=True)
        links += [(number, row, support.nonzero().flatten().tolist()) for row, support in pairs]
    first: dict[int, int] = {}
    return [first.setdefault(value, at) for at, value in enumerate(signature.tolist())], links


def _components(width: int, links: list[tuple[int, int, list[int]]]) -> list[int]:
    """The lowest input that every input hangs together with."""
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
