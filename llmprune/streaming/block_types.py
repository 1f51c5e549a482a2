"""Block types: the analysis of a block by running it, once for all blocks of the same class with the same layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from llmprune.model.blocks import find_layers
from llmprune.model.skeleton import Skeleton
from llmprune.streaming.batch import Batch, run_isolated
from llmprune.streaming.capture import Wrap, capture_block_inputs
from llmprune.streaming.hooks import CallOrder, call_order
from llmprune.streaming.norms import NormScale, find_norm_scales
from llmprune.streaming.residual import find_residual_adds
from llmprune.structure.coupling import Coupling
from llmprune.structure.cut import Cut
from llmprune.structure.expert_coupling import expert_couplings, has_experts
from llmprune.structure.expert_plan import BlockRuns
from llmprune.structure.find_couplings import OpaqueBlockError, find_couplings
from llmprune.structure.plan import BlockCouplings

SHORT = 16
"""Tokens that are enough to find the coupled channels of a block."""


@dataclass(frozen=True, slots=True)
class BlockAnalysis:
    """Call order, residual adds, norms and coupled channels of one block; keys are local names.

    Args:
        order: the call order of its layers.
        residual_adds: by number of the group, where its layer adds to the residual stream, see `find_residual_adds`.
        norm_scales: the norms that feed layers.
        couplings: layers whose inputs may be permuted.
        removed: layers that lose inputs.
    """

    order: CallOrder
    residual_adds: Mapping[int, str] = field(default_factory=dict)
    norm_scales: Mapping[str, NormScale] = field(default_factory=dict)
    couplings: Mapping[str, Coupling] = field(default_factory=dict)
    removed: Mapping[str, Cut] = field(default_factory=dict)


def short_batch(skeleton: Skeleton, tokens: Tensor, wrap: Wrap | None = None) -> Batch:
    """A few tokens as they enter the first block; arguments as of `capture_block_inputs`."""
    return capture_block_inputs(skeleton, tokens[:1, :SHORT], 1, wrap=wrap).batches[0]


def all_block_types(skeleton: Skeleton, tokens: Tensor) -> BlockTypes:
    """The block types by all their layers, for couplings and norm scales."""
    names = [
        layer.name
        for index, module in enumerate(skeleton.blocks)
        for layer in find_layers(module, skeleton.block_name(index), skeleton.config)
    ]
    return BlockTypes(skeleton, frozenset(names), short_batch(skeleton, tokens))


def all_couplings(skeleton: Skeleton, tokens: Tensor) -> BlockCouplings:
    """The coupled channels of all blocks.

    Args:
        skeleton: the model.
        tokens: `(samples, length)`, of which a few are run through copies of the blocks.
    """
    types = all_block_types(skeleton, tokens)
    found = [types.couplings(index) for index in range(len(skeleton.blocks))]
    return BlockCouplings(found, next(iter(types.opaque.values()), ""))


def block_runs(skeleton: Skeleton, tokens: Tensor) -> BlockRuns:
    """Calls of every block with hidden states, and such hidden states; arguments as of `all_couplings`."""
    short = short_batch(skeleton, tokens)
    return lambda index: (partial(run_isolated, short.calls[index]), short.entered().to(skeleton.device))


class BlockTypes:
    """The block types of a model, each numbered by its first block; results are cached.

    Args:
        skeleton: the model.
        chosen: full names of the layers to be pruned.
        short: a few tokens as they enter the first block, to find couplings with; None if these are not wanted.

    Attributes:
        opaque: by type, why a block has no couplings that could be found.
    """

    def __init__(self, skeleton: Skeleton, chosen: frozenset[str], short: Batch | None = None) -> None:
        self.skeleton, self.short = skeleton, short
        first: dict[object, int] = {}
        self._first: list[int] = []
        for index, module in enumerate(skeleton.blocks):
            layers = find_layers(module, skeleton.block_name(index), skeleton.config)
            key = (type(module), tuple((layer.local, layer.shape) for layer in layers if layer.name in chosen))
            self._first.append(first.setdefault(key, index))
        self._orders: dict[int, CallOrder] = {}
        self._residual_adds: dict[int, dict[int, str]] = {}
        self._couplings: dict[int, list[Coupling]] = {}
        self._norm_scales: dict[int, dict[str, NormScale]] = {}
        self.opaque: dict[int, str] = {}

    def order(self, index: int, module: nn.Module, layers: list[str], run: Callable[[], Tensor]) -> CallOrder:
        """The call order of the layers of a block, see `call_order`."""
        first = self._first[index]
        if first not in self._orders:
            self._orders[first] = call_order(module, layers, run)
        return self._orders[first]

    def residual_adds(self, index: int, module: nn.Module, run: Callable[[], Tensor]) -> dict[int, str]:
        """The residual adds of its layers, see `find_residual_adds`."""
        first = self._first[index]
        if first not in self._residual_adds:
            groups = self._orders[first].groups
            self._residual_adds[first] = find_residual_adds(module, groups, run)
        return self._residual_adds[first]

    def couplings(self, index: int) -> list[Coupling]:
        """Its coupled channels, from the block's form alone; none where they are not wanted or it is opaque."""
        first = self._first[index]
        if self.short is None:
            return []
        if first not in self._couplings:
            module, name = self.skeleton.blocks[first], self.skeleton.block_name(first)
            run = partial(run_isolated, self.short.calls[first])
            layers = find_layers(module, name, self.skeleton.config)
            hidden = self.short.entered().to(self.skeleton.device)
            try:
                self._couplings[first] = find_couplings(module, run, hidden, layers)
            except OpaqueBlockError as error:
                self._couplings[first], self.opaque[first] = [], str(error)
        return self._couplings[first]

    def movable(self, index: int, module: nn.Module) -> list[Coupling]:
        """Its coupled channels, and those of its experts, whose number per expert is one setting of the config."""
        return [*self.couplings(index), *expert_couplings(module)]

    @property
    def undescribed(self) -> list[int]:
        """The first blocks of the types that have experts whose coupled channels are not known."""
        blocks = {first: self.skeleton.blocks[first] for first in dict.fromkeys(self._first)}
        return [first for first, block in blocks.items() if has_experts(block) and not expert_couplings(block)]

    def norm_scales(self, index: int) -> dict[str, NormScale]:
        """The norms that feed its layers, see `find_norm_scales`."""
        first = self._first[index]
        if self.short is None:
            return {}
        if first not in self._norm_scales:
            module, hidden = self.skeleton.blocks[first], self.short.entered().to(self.skeleton.device)
            layers = find_layers(module, self.skeleton.block_name(first), self.skeleton.config)
            with self.skeleton.loaded(self.skeleton.block_parameters(first)):
                run = partial(run_isolated, self.short.calls[first], module, hidden)
                self._norm_scales[first] = find_norm_scales(module, {layer.local for layer in layers}, run)
        return self._norm_scales[first]

    def save(self) -> dict[str, Any]:
        """The results that need weights and activations of the types' first blocks, as JSON."""
        return {
            str(first): {"order": asdict(order), "residual_adds": list(self._residual_adds.get(first, {}).items())}
            for first, order in self._orders.items()
        }

    def load(self, saved: dict[str, Any]) -> None:
        """The inverse of `save`."""
        for first, found in saved.items():
            self._orders[int(first)] = CallOrder(**found["order"])
            self._residual_adds[int(first)] = dict(found["residual_adds"])
