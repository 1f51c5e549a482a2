"""A copy of a block with random float64 weights, run in float64 throughout: mathematical identities hold to 1e-10."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmprune.model.experts import WatchedParameter


def random_copy(block: nn.Module, device: torch.device, generator: torch.Generator) -> nn.Module:
    """A copy of the block with random float64 parameters: matrices keep the scale of inputs, vectors are positive.

    Args:
        block: the block; its own values are never read.
        device: of the copy.
        generator: of the values.
    """
    fresh: dict[int, Any] = {}
    for parameter in block.parameters():
        # Experts are all one: a block's are too many to be copied, and whichever a token is sent to, it is the same.
        same = isinstance(parameter, WatchedParameter) and parameter.dim() == 3
        shape = (1, *parameter.shape[1:]) if same else parameter.shape
        value = torch.rand(shape, generator=generator, dtype=torch.float64)
        if parameter.dim() < 2:
            value += 0.5
        else:
            value.sub_(0.5).mul_((12 / parameter.shape[-1]) ** 0.5)
        fresh[id(parameter)] = nn.Parameter(value.to(device).expand(parameter.shape), requires_grad=False)
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
