"""Routers: layers among whose outputs a block chooses, and what else belongs to their modules; known by a forward."""

from __future__ import annotations

from collections.abc import Collection, MutableMapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from llmprune.model.blocks import find_other_weights
from llmprune.model.experts import ExpertMatrix

CHOOSING = {"topk", "argmax", "argsort", "sort", "kthvalue", "multinomial"}
MIXING = {
    "linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv1d",
    "scaled_dot_product_attention", "embedding",
}  # fmt: skip
"""Functions whose results have other features than their operands."""


class RouterWatch(TorchFunctionMode):
    """While it is on, follows the outputs of layers, and notes from which of them a block chooses (top-k, argmax).

    An output is followed through functions that keep its features apart: softmax, a bias, a mask. Only layers with
    fewer outputs than inputs count: a choice among more than that is a sparse activation.

    Attributes:
        chosen_from: local names of the layers, with the names of those that had been called by then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.chosen_from: dict[str, frozenset[str]] = {}
        self._called: list[str] = []
        self._source: MutableMapping[Tensor, str] = WeakTensorKeyDictionary()

    def follow(self, local: str, width: int, output: Any) -> None:
        """Note the output of a layer of `width` inputs."""
        self._called.append(local)
        if isinstance(output, Tensor) and output.shape[-1] < width:
            self._source[output] = local

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in MIXING:
            return result
        for operand in (value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)):
            source = self._source.get(operand)
            if source is not None and name in CHOOSING:
                self.chosen_from.setdefault(source, frozenset(self._called))
            elif source is not None and isinstance(result, Tensor) and result.shape[-1:] == operand.shape[-1:]:
                self._source[result] = source
        return result


def routers(module: nn.Module, watch: RouterWatch, layers: Collection[str]) -> set[str]:
    """The layers of a block that belong to routers.

    Beside the layer that a block chooses from, these are the others in the largest module around it that holds nothing
    but such layers, all called before the choice.

    Args:
        module: the block.
        watch: what it saw of a forward.
        layers: local names of the block's layers.
    """
    found: set[str] = set()
    for local, called in watch.chosen_from.items():
        found.add(local)
        parts = local.split(".")
        for depth in range(len(parts) - 1, 0, -1):
            path = ".".join(parts[:depth])
            inner = {layer for layer in layers if layer.startswith(f"{path}.")}
            part = module.get_submodule(path)
            if not inner <= called or find_other_weights(part, "") or _holds_experts(part):
                break
            found |= inner
    return found


def _holds_experts(module: nn.Module) -> bool:
    """Whether a module holds what is chosen, too; then other layers in it need not belong to the choice."""
    return any(isinstance(part, ExpertMatrix) for part in module.modules())
