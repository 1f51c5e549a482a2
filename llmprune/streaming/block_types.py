"""What is found out about a block by running it, once for all blocks of its kind: same class, same layers to prune."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import Tensor

from llmprune.model.blocks import find_layers
from llmprune.model.skeleton import Skeleton
from llmprune.streaming.capture import Batch, Wrap, leaves_behind, rehearse
from llmprune.streaming.hooks import CallOrder, call_order
from llmprune.streaming.norms import find_scales
from llmprune.streaming.residual import find_landings
from llmprune.structure.coupling import Coupling
from llmprune.structure.find_couplings import OpaqueBlockError, find_couplings
from llmprune.structure.plan import BlockCouplings

SHORT = 16
"""Tokens that are enough to see how the layers of a block hang together."""


def short_batch(skeleton: Skeleton, tokens: Tensor, wrap: Wrap | None = None) -> Batch:
    """A few tokens on their way into the first block; arguments as of `rehearse`."""
    return rehearse(skeleton, tokens[:1, :SHORT], 1, wrap=wrap).batches[0]


def all_kinds(skeleton: Skeleton, tokens: Tensor) -> Kinds:
    """The kinds of blocks by all their layers, for couplings and scales."""
    names = [
        layer.name
        for index, module in enumerate(skeleton.blocks)
        for layer in find_layers(module, skeleton.block_name(index), skeleton.config)
    ]
    return Kinds(skeleton, frozenset(names), short_batch(skeleton, tokens))


def all_couplings(skeleton: Skeleton, tokens: Tensor) -> BlockCouplings:
    """The coupled channels of all blocks.

    Args:
        skeleton: the model.
        tokens: `(samples, length)`, of which a few are run through copies of the blocks.
    """
    kinds = all_kinds(skeleton, tokens)
    found = [kinds.couplings(index) for index in range(len(skeleton.blocks))]
    return BlockCouplings(found, next(iter(kinds.opaque.values()), ""))


class Kinds:
    """The kinds of blocks of a model; each goes by the number of its first block.

    Args:
        skeleton: the model.
        chosen: full names of the layers to be pruned.
        short: a few tokens on their way into the first block, to find couplings with; None if these are not wanted.
    """

    def __init__(self, skeleton: Skeleton, chosen: frozenset[str], short: Batch | None = None) -> None:
        self.skeleton, self.short = skeleton, short
        first: dict[object, int] = {}
        self._first: list[int] = []
        for index, module in enumerate(skeleton.blocks):
            layers = find_layers(module, skeleton.block_name(index), skeleton.config)
            kind = (type(module), tuple((layer.local, layer.shape) for layer in layers if layer.name in chosen))
            self._first.append(first.setdefault(kind, index))
        self._orders: dict[int, CallOrder] = {}
        self._landings: dict[int, dict[int, str]] = {}
        self._couplings: dict[int, list[Coupling]] = {}
        self.opaque: dict[int, str] = {}
        self._scales: dict[int, dict[str, tuple[str, float]]] = {}

    def order(self, index: int, layers: list[str], run: Callable[[], Tensor]) -> CallOrder:
        """How the layers of a block are called, see `call_order`."""
        kind = self._first[index]
        if kind not in self._orders:
            self._orders[kind] = call_order(self.skeleton.blocks[index], layers, run)
        return self._orders[kind]

    def landings(self, index: int, run: Callable[[], Tensor]) -> dict[int, str]:
        """Where its layers add to the residual stream, see `find_landings`."""
        kind = self._first[index]
        if kind not in self._landings:
            self._landings[kind] = find_landings(self.skeleton.blocks[index], self._orders[kind].groups, run)
        return self._landings[kind]

    def couplings(self, index: int) -> list[Coupling]:
        """Which of its channels hang together; none where they are not wanted. They depend on the block's form only.

        Why there are none in a block that cannot be run on its own stands in `opaque`.
        """
        kind = self._first[index]
        if self.short is None:
            return []
        if kind not in self._couplings:
            module, name = self.skeleton.blocks[kind], self.skeleton.block_name(kind)
            run = partial(leaves_behind, self.short.calls[kind])
            layers = find_layers(module, name, self.skeleton.config)
            hidden = self.short.hidden.to(self.skeleton.device)
            try:
                self._couplings[kind] = find_couplings(module, run, hidden, layers)
            except OpaqueBlockError as error:
                self._couplings[kind], self.opaque[kind] = [], str(error)
        return self._couplings[kind]

    def scales(self, index: int) -> dict[str, tuple[str, float]]:
        """Of its layers that a norm feeds: the norm, and what it adds to its weight, see `find_scales`."""
        kind = self._first[index]
        if self.short is None:
            return {}
        if kind not in self._scales:
            module, hidden = self.skeleton.blocks[kind], self.short.hidden.to(self.skeleton.device)
            layers = find_layers(module, self.skeleton.block_name(kind), self.skeleton.config)
            with self.skeleton.loaded(self.skeleton.block_parameters(kind)):
                run = partial(leaves_behind, self.short.calls[kind], module, hidden)
                self._scales[kind] = find_scales(module, {layer.local for layer in layers}, run)
        return self._scales[kind]

    def save(self) -> dict[str, Any]:
        """What cannot be found again without the weights and activations of the kinds' first blocks, as JSON."""
        return {
            str(kind): {"order": asdict(order), "landings": list(self._landings.get(kind, {}).items())}
            for kind, order in self._orders.items()
        }

    def load(self, saved: dict[str, Any]) -> None:
        """The inverse of `save`."""
        for kind, found in saved.items():
            self._orders[int(kind)] = CallOrder(**found["order"])
            self._landings[int(kind)] = dict(found["landings"])
