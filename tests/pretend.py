"""A device that this machine does not have, pretended on the CPU.

Within `pretended_device()`, what is put on `FAR` are tensors of a class of their own that say so, and they cannot meet
others: what a GPU refuses is refused here too, with the same numbers otherwise. So a tensor that was made on the wrong
device is found without a GPU. What PyTorch allows is allowed: copies, scalars, indices on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

FAR = torch.device("cuda:0")
NEAR = torch.device("cpu")
MEET = {Tensor.copy_, Tensor.data.__set__, Tensor.grad.__set__, Tensor.to, Tensor.type_as, Tensor.__setitem__}
INDEX = {Tensor.__getitem__, Tensor.__setitem__, Tensor.index_put_}


class FarTensor(Tensor):
    """A tensor on the pretended device."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class pretended_device(TorchFunctionMode):  # noqa: N801, a context manager
    """Within, the device `FAR` is there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        far = [tensor for tensor in tensors if isinstance(tensor, FarTensor)]
        if func == Tensor.device.__get__:
            return FAR if far else func(*args)
        if func == Tensor.is_cuda.__get__:
            return bool(far)
        if func is Tensor.numpy and far:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        goal = _goal(func, args, kwargs)
        _check(func, args, kwargs, tensors, goal)
        result = func(*tree_map(_on_cpu, tuple(args)), **{key: tree_map(_on_cpu, arg) for key, arg in kwargs.items()})
        if func in {Tensor.copy_, Tensor.data.__set__, Tensor.grad.__set__, Tensor.tolist}:
            return result
        if goal == NEAR:
            return tree_map(_taken_back, result)
        return tree_map(_put_far, result) if goal == FAR or far else result


def _goal(func: Any, args: Any, kwargs: Any) -> torch.device | None:
    """The device that a call names, if it names one."""
    named = [kwargs.get("device"), *(arg for arg in args if isinstance(arg, torch.device))]
    if func is Tensor.to:
        named += [arg for arg in args[1:] if isinstance(arg, str)]
    if func in {Tensor.to, Tensor.type_as}:
        named += [FAR if isinstance(arg, FarTensor) else NEAR for arg in args[1:] if isinstance(arg, Tensor)]
    if func is Tensor.cpu:
        named.append(NEAR)
    types = [torch.device(name).type for name in named if name is not None]
    return None if not types else FAR if types[-1] == FAR.type else NEAR


def _check(func: Any, args: Any, kwargs: Any, tensors: list[Tensor], goal: torch.device | None) -> None:
    """Refuse what a GPU would refuse."""
    generator = kwargs.get("generator")
    if goal == FAR and not tensors and generator is not None:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    far = [tensor for tensor in tensors if isinstance(tensor, FarTensor)]
    if not far or func in MEET - INDEX:
        return
    if func in INDEX:
        indices = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)]
        if not isinstance(args[0], FarTensor) and any(isinstance(index, FarTensor) for index in indices):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    elif any(not isinstance(tensor, FarTensor) and tensor.dim() > 0 for tensor in tensors):
        name = getattr(func, "__name__", func)
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({name})")


def _on_cpu(value: Any) -> Any:
    named = isinstance(value, torch.device | str) and str(value).startswith("cuda")
    return (NEAR if isinstance(value, torch.device) else str(NEAR)) if named else value


def _put_far(value: Any) -> Any:
    plain = isinstance(value, Tensor) and not isinstance(value, FarTensor | nn.Parameter)
    return value.as_subclass(FarTensor) if plain else value  # type: ignore[arg-type]


def _taken_back(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, FarTensor) else value
