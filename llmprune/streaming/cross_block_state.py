"""Cross-block state: mappings that blocks write into for later blocks (shared KV), and what they return for them."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmprune.errors import PruneError
from llmprune.runtime.files import sha256
from llmprune.runtime.filesystem import sync
from llmprune.streaming.batch import Axes, Call, Carried
from llmprune.streaming.capture import BlockInputs, Wrap

PLAIN = (bool, int, float, str, type(None))


class CannotBeSavedError(TypeError):
    """A block's arguments may carry state in an object that cannot be written to a file."""


def mappings_of(calls: Iterable[Call]) -> list[MutableMapping[Any, Any]]:
    """The mappings among the arguments of blocks and with what they returned, each once, in order."""
    values = [value for call in calls for value in (*call.values, call.returned) if isinstance(value, MutableMapping)]
    return list({id(value): value for value in values}.values())


def _check(calls: Iterable[Call]) -> None:
    for call in calls:
        for value in call.values:
            if not isinstance(value, MutableMapping | Carried) and not _fixed(value):
                raise CannotBeSavedError(f"a block is called with {type(value).__name__}")


def _fixed(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_fixed, value))
    return isinstance(value, (*PLAIN, Tensor, torch.dtype, torch.device))


class CrossBlockState:
    """The mappings of all batches; their changes can be saved and restored.

    Args:
        inputs: their batches have not entered the first block.
    """

    def __init__(self, inputs: BlockInputs) -> None:
        self._wrap = inputs.wrap
        self._calls = [calls for batch in inputs.batches for calls in (batch.calls, batch.dense_calls)]
        self._fresh = {id(value): (value, dict(value)) for calls in self._calls for value in mappings_of(calls)}

    def save(self, index: int, folder: Path) -> dict[str, Any]:
        """Write the mappings that blocks from `index` on are called with, where the blocks before changed them.

        Raises:
            CannotBeSavedError: it is of a type that cannot be written, or may lie in something else than a mapping.
            OSError: the disk does not take it.
        """
        for calls in self._calls:
            _check(calls[index:])
        tensors: list[Tensor] = []
        contents = [
            [
                None if _untouched(*self._fresh[id(value)]) else _packed(dict(value), tensors)
                for value in mappings_of(calls[index:])
            ]
            for calls in self._calls
        ]
        rest = _packed(self._wrap.rest, tensors)
        path = folder / f"state-{index:05d}.safetensors"
        try:
            save_file({str(n): tensor.detach().cpu().contiguous().clone() for n, tensor in enumerate(tensors)}, path)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        sync(path)
        axes = list(astuple(self._wrap.axes))
        return {"file": path.name, "sha256": sha256(path), "contents": contents, "rest": rest, "axes": axes}

    def load(self, index: int, folder: Path, saved: dict[str, Any]) -> None:
        """Bring back what `save` wrote.

        Raises:
            PruneError: it belongs to batches of another size.
        """
        tensors = load_file(folder / saved["file"])
        if len(saved["contents"]) != len(self._calls):
            if any(content is not None for packed in saved["contents"] for content in packed):
                raise PruneError(
                    f"the {len(saved['contents'])} batches that were saved hold state from block to block, "
                    f"and now there are {len(self._calls)}",
                    "--restart starts over, with smaller batches from the first block on",
                )
            return
        for calls, packed in zip(self._calls, saved["contents"], strict=True):
            for value, content in zip(mappings_of(calls[index:]), packed, strict=True):
                if content is not None:
                    value.clear()
                    value.update(_unpacked(content, tensors))


def saved_wrap(folder: Path, saved: dict[str, Any]) -> Wrap:
    """The return convention of the blocks, as `CrossBlockState.save` wrote it."""
    return Wrap(_unpacked(saved["rest"], load_file(folder / saved["file"])), Axes(*saved["axes"]))


def _untouched(value: MutableMapping[Any, Any], fresh: dict[Any, Any]) -> bool:
    return value.keys() == fresh.keys() and all(value[key] is fresh[key] for key in fresh)


def _packed(value: Any, tensors: list[Tensor]) -> Any:
    """A value as JSON; what JSON lacks becomes an object of one key, its kind."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, dict):
        return {"dict": [[_packed(key, tensors), _packed(item, tensors)] for key, item in value.items()]}
    if type(value) in {tuple, list}:
        return {type(value).__name__: [_packed(item, tensors) for item in value]}
    if type(value) in PLAIN:
        return value
    raise CannotBeSavedError(f"a block passes on {type(value).__name__}")


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[str(content)]
    if kind == "dict":
        return {_unpacked(key, tensors): _unpacked(item, tensors) for key, item in content}
    items = [_unpacked(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
