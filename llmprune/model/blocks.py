"""Discovery of transformer blocks and linear layers in any causal language model; no model class is named here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from llmprune.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class LayerRef:
    """A linear layer inside a block.

    Args:
        name: full module name in the model.
        local: module name inside its block.
        shape: `(out, in)`.
        transposed: True where the module stores `(in, out)` (Conv1D).
        skip: why it is kept dense, or ''.
    """

    name: str
    local: str
    shape: tuple[int, int]
    transposed: bool
    skip: str = ""

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, slots=True)
class Skipped:
    """Block parameters that are kept dense, and why."""

    name: str
    weights: int
    reason: str


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name and the `ModuleList` of the transformer blocks, whose classes `_no_split_modules` names.

    Without these names, the outermost `ModuleList` with the most parameters.

    Raises:
        InputError: if the model has no list of blocks.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and module]
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
    """The linear layers of a block in definition order; routers are marked to be skipped.

    Args:
        block: one transformer block (any device, also meta).
        prefix: the block's module name.
        config: gives the number of experts.
    """
    from transformers.pytorch_utils import Conv1D

    layers = []
    for local, module in block.named_modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        transposed = isinstance(module, Conv1D)
        rows, columns = module.weight.shape[::-1] if transposed else module.weight.shape
        skip = "router" if _is_router(local, rows, config) else ""
        layers.append(LayerRef(f"{prefix}.{local}", local, (int(rows), int(columns)), transposed, skip))
    return layers


def _is_router(name: str, rows: int, config: PreTrainedConfig) -> bool:
    """Whether a layer is a router: named gate or router, with one output per expert, or a single one."""
    settings = config.get_text_config().to_dict()
    experts = {value for key, value in settings.items() if re.fullmatch(r"(moe_)?(n|num)_(\w+_)?experts", key)}
    return bool(re.search(r"(^|_)(gate|router)$", name.rpartition(".")[2])) and rows in experts | {1}


def find_other_weights(block: nn.Module, prefix: str) -> list[Skipped]:
    """Parameters of a block with two or more dimensions outside linear layers, which are kept dense."""
    from transformers.pytorch_utils import Conv1D

    return [
        Skipped(".".join(filter(None, (prefix, path, name))), parameter.numel(), _kind(owner, parameter))
        for path, owner in block.named_modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if parameter.dim() >= 2 and not (isinstance(owner, nn.Linear | Conv1D) and name == "weight")
    ]


def _kind(owner: nn.Module, parameter: nn.Parameter) -> str:
    if type(owner).__name__.startswith("Conv"):
        return "convolution"
    return "fused experts" if parameter.dim() == 3 else "not a linear layer"


def weight_of(module: nn.Module, transposed: bool) -> Tensor:
    """A layer's weight as `(out, in)`, a view."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight.data.T if transposed else weight.data


def is_scale(module: nn.Module) -> bool:
    """Whether a module is a norm, or anything else with one weight per channel."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 1 and not any(True for _ in module.children())
