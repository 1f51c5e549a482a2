"""What is found out about a block by running it, once for all blocks of its kind: same class, same layers to prune."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import Tensor, nn

from llmprune.coupling import Coupling, find_couplings
from llmprune.families import find_layers
from llmprune.rehearse import Batch, Call, own_state
from llmprune.skeleton import Skeleton
from llmprune.watch import CallOrder, call_order, find_landings


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
        """Which of its channels hang together; none where they are not wanted. They depend on the block's form only."""
        kind = self._first[index]
        if self.short is None:
            return []
        if kind not in self._couplings:
            module, name = self.skeleton.blocks[kind], self.skeleton.block_name(kind)
            run = partial(_leaves_behind, self.short.calls[kind])
            layers = find_layers(module, name, self.skeleton.config)
            self._couplings[kind] = find_couplings(module, run, self.short.hidden, layers)
        return self._couplings[kind]

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


def _leaves_behind(call: Call, module: nn.Module, hidden: Tensor) -> tuple[Any, Any, Any]:
    """A block's output, and its arguments: some hold state that goes on to later blocks."""
    (own,) = own_state([call])
    return own.run(module, hidden), own.args, own.kwargs
