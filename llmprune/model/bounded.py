"""A bound on what a config may ask for while its model is built, so that a few bytes cannot fill a machine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

MOST_BYTES = 2**29
"""The largest tensor that may be made, such as a table of positions, where the stored weights are no larger."""
MOST_TENSORS = 64
"""The largest number of tensors for each one that is stored: experts may be stored together, and buffers are not."""


class Stored(NamedTuple):
    """How much is stored: number of tensors, and of weights in them."""

    tensors: int
    weights: int


class Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses tensors that are too many or too large, before they are made; those on the meta device are free.

    Args:
        stored: what a model of that size must have.

    Raises:
        ValueError: within the context, in the line that would make it.
    """

    def __init__(self, stored: Stored) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._most = MOST_TENSORS * stored.tensors + 10_000
        self._largest = max(MOST_BYTES, 8 * stored.weights)
        self._made = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._made += 1
        if self._made > self._most:
            raise ValueError(f"its config asks for more than {self._most:,} tensors")
        # Memory that is only reserved costs nothing: so weights are made before they go to the meta device.
        if not func.is_view and func not in _RESERVE and (size := _result_bytes(func, args, kwargs)) > self._largest:
            raise ValueError(f"its config asks for a tensor of {size:,} bytes, the most are {self._largest:,}")
        return func(*args, **kwargs)


_RESERVE = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default}


def _result_bytes(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Bytes of what an operation would make, or more where that is little; 0 where it is unknown, or costs nothing.

    Found by the same operation on the meta device, unless no operation on such arguments makes much.
    """
    device = torch.device(kwargs.get("device") or "cpu")
    if device.type == "meta" or any(isinstance(item, Tensor) and item.is_meta for item in args):
        return 0
    if (most := 16 * _product([*args, *kwargs.values()])) <= MOST_BYTES:
        return most
    meta_args, meta_kwargs = tree_map(
        lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, (list(args), dict(kwargs))
    )
    if "device" in kwargs:
        meta_kwargs["device"] = torch.device("meta")
    try:
        made = func(*meta_args, **meta_kwargs)
    except (NotImplementedError, RuntimeError, TypeError):
        return 0
    return sum(leaf.nbytes for leaf in tree_leaves(made) if isinstance(leaf, Tensor))


def _product(values: Iterable[Any]) -> int:
    """The product of all sizes and numbers, of whatever they are the sizes."""
    found = 1
    for value in values:
        if isinstance(value, Tensor):
            found *= max(value.numel(), 1)
        elif isinstance(value, list | tuple):
            found *= _product(value)
        elif isinstance(value, int | float) and math.isfinite(value):
            found *= max(math.ceil(abs(value)), 1)
    return found
