"""Routing without some of the experts, as a router without their rows would do it; no router's class is named."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

PRODUCTS = {torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm}
CHOICES = {torch.topk, torch.Tensor.topk}


class RouterMask(TorchFunctionMode):
    """While it is on, a router's logits of some experts are as low as they can be, and it does not choose these.

    Both are needed: the softmax must not count the experts that are gone, and a correction bias that is added behind it
    must not bring them back.

    Args:
        routers: the routers' weights, `(experts, hidden)`, known by their memory.
        gone: `(experts,)` or `(tokens, experts)`, bool.
    """

    def __init__(self, routers: Collection[Tensor], gone: Tensor) -> None:
        super().__init__()
        self.gone = gone
        self._routers = {weight.data_ptr() for weight in routers}
        self._kept: list[Tensor] = []  # so that their memory is not given to others

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in CHOICES and self._fits(args[0]):
            args = (self._masked(args[0], -torch.inf), *args[1:])
        result = func(*args, **kwargs)
        if func in PRODUCTS and len(args) > 1:
            fits = self._is_router(args[1]) and self._fits(result)
            return self._masked(result, torch.finfo(result.dtype).min) if fits else result
        if args and isinstance(args[0], Tensor) and isinstance(result, Tensor) and self._is_router(args[0]):
            self._routers.add(result.data_ptr())  # converted to another dtype
            self._kept.append(result)
        return result

    def _is_router(self, value: Tensor) -> bool:
        return value.device.type != "meta" and value.data_ptr() in self._routers

    def _fits(self, scores: Tensor) -> bool:
        width = self.gone.shape[-1]
        return scores.shape[-1] == width and (self.gone.dim() == 1 or scores.numel() == self.gone.numel())

    def _masked(self, scores: Tensor, value: float) -> Tensor:
        gone = self.gone if self.gone.dim() == 1 else self.gone.view(scores.shape)
        return scores.masked_fill(gone, value)
