"""Forward hooks that are removed again, whatever happens within."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Register hooks (the handles are made lazily, one by one) and remove all of them at the end."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def before(module: nn.Module, tell: Callable[[Tensor], None]) -> RemovableHandle:
    """A hook that is told the first input of a module before each call."""
    return module.register_forward_pre_hook(lambda _, args, kwargs: tell(inputs_of(args, kwargs)), with_kwargs=True)


def inputs_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor that a linear layer or a norm is called with."""
    found = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(found, Tensor)
    return found
