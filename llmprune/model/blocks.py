"""Discovery of transformer blocks and linear layers in any causal language model; no model class is named here."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from llmprune.errors import InputError
from llmprune.model.experts import ExpertMatrix, Place, is_attached

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class LayerRef:
    """A linear layer inside a block: a module, or the matrix of an expert, which is a slice of a parameter.

    Args:
        name: full module name in the model.
        local: module name inside its block.
        shape: `(out, in)`.
        transposed: True where the weight is stored as `(in, out)` (Conv1D).
        skip: why it is kept dense, or ''.
        expert: place of its weight in the parameter that holds it; None where it has one of its own.
    """

    name: str
    local: str
    shape: tuple[int, int]
    transposed: bool
    skip: str = ""
    expert: Place | None = None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def local_parameter(self) -> str:
        """Name inside the block of the parameter that holds the weight."""
        if self.expert is None:
            return f"{self.local}.weight"
        return ".".join([*self.local.split(".")[:-2], self.expert.attribute])

    @property
    def parameter(self) -> str:
        """Full name of the parameter that holds the weight."""
        return self.name.removesuffix(self.local) + self.local_parameter

    def weight_in(self, parameter: Tensor) -> Tensor:
        """The layer's weight as `(out, in)`, a view of the parameter that holds it."""
        stored = parameter if self.expert is None else self.expert.layout.matrix(parameter, self.expert.index)
        return stored.T if self.transposed else stored


@dataclass(frozen=True, slots=True)
class Skipped:
    """Block parameters that are kept dense, and why."""

    name: str
    weights: int
    reason: str


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name and the `ModuleList` of the transformer blocks, whose classes `_no_split_modules` names.

    Without these names, the outermost `ModuleList` with the most parameters. Lists outside of the decoder (the
    towers of other modalities) count only if it holds none.

    Raises:
        InputError: if the model has no list of blocks.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and module]
    decoder = set(model.get_decoder().modules())
    lists = [(name, module) for name, module in lists if module in decoder] or lists
    named = set(model._no_split_modules or ())
    candidates = [(name, module) for name, module in lists if any(type(item).__name__ in named for item in module)]
    outer = [
        (name, module)
        for name, module in candidates or lists
        if not any(name.startswith(other + ".") for other, _ in candidates or lists)
    ]
    if not outer:
        raise InputError(
            f"{type(model).__name__} has no list of transformer blocks",
            "only models built of repeated blocks can be pruned",
        )
    return max(outer, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def find_layers(block: nn.Module, prefix: str, config: PreTrainedConfig) -> list[LayerRef]:
    """The linear layers of a block in definition order, experts' matrices too; routers are marked to be skipped.

    Args:
        block: one transformer block (any device, also meta).
        prefix: the block's module name.
        config: gives the number of experts.
    """
    from transformers.pytorch_utils import Conv1D

    layers, experts = [], expert_counts(config)
    for local, module in block.named_modules():
        if isinstance(module, ExpertMatrix):
            layout = module.place.layout
            layers.append(LayerRef(f"{prefix}.{local}", local, layout.shape, layout.transposed, expert=module.place))
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        transposed = isinstance(module, Conv1D)
        rows, columns = module.weight.shape[::-1] if transposed else module.weight.shape
        skip = "router" if _is_named_router(local, rows, experts) else ""
        layers.append(LayerRef(f"{prefix}.{local}", local, (int(rows), int(columns)), transposed, skip))
    return layers


def expert_counts(config: PreTrainedConfig) -> set[int]:
    """The numbers of experts that a config names, its parts included."""

    def counts(settings: dict[Any, Any]) -> Iterator[int]:
        for key, value in settings.items():
            if isinstance(value, dict):
                yield from counts(value)
            elif re.fullmatch(r"(moe_)?(n|num)_(\w+_)?experts", str(key)):
                yield from (number for number in (value if isinstance(value, list) else [value]) if number)

    return set(counts(config.get_text_config().to_dict()))


def _is_named_router(name: str, rows: int, experts: set[int]) -> bool:
    """Whether a layer is, or is part of, what is called a router; or a gate with an output per expert, or only one.

    Routers of other names are found by what they do, see `streaming.routers`.
    """
    parts = name.split(".")
    named = any(re.search(r"(^|_)router(_|$)", part) for part in parts)
    return named or (any(re.search(r"(^|_)gate$", part) for part in parts) and rows in experts | {1})


def find_other_weights(block: nn.Module, prefix: str, experts: Collection[int] = ()) -> list[Skipped]:
    """Parameters of a block with two or more dimensions outside linear layers, which are kept dense.

    Args:
        block: one transformer block.
        prefix: the block's module name.
        experts: numbers of experts that there may be.
    """
    from transformers.pytorch_utils import Conv1D

    return [
        Skipped(full, parameter.numel(), _kind(owner, parameter, full.removeprefix(prefix), experts))
        for path, owner in block.named_modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if parameter.dim() >= 2
        and not (isinstance(owner, nn.Linear | Conv1D) and name == "weight")
        and not is_attached(owner, name)
        for full in [".".join(filter(None, (prefix, path, name)))]
    ]


FUSED = "fused experts"


def _kind(owner: nn.Module, parameter: nn.Parameter, local: str, experts: Collection[int]) -> str:
    if type(owner).__name__.startswith("Conv"):
        return "convolution"
    stacked = parameter.dim() == 3 and parameter.shape[0] in experts
    named = re.search(r"(^|[._])experts?[._]", local) and "bias" not in local
    return FUSED if stacked or named else "not a linear layer"


def is_scale(module: nn.Module) -> bool:
    """Whether a module is a norm, or anything else with one weight per channel."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 1 and not any(True for _ in module.children())
