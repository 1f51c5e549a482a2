"""A model on the meta device whose parameters are loaded from the checkpoint part by part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmprune.errors import InputError
from llmprune.model.auto_class import CAUSAL, auto_class
from llmprune.model.blocks import find_blocks
from llmprune.model.bounded import Bounded, Stored
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.expert_slices import EXPERT_MEMORY, SliceCache, SlicedValues
from llmprune.model.experts import WatchedParameter, attach_experts, says_how
from llmprune.model.reader import SafetensorsFolder
from llmprune.model.slices import CheckpointSlices, find_slices
from llmprune.model.tower import parts_beside, put_aside
from llmprune.runtime.foreign import reading
from llmprune.runtime.memory import mmap_large_allocations

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class Skeleton:
    """A language model whose parameters are on the meta device (its rotary buffers are real).

    It may be the tower of a wrapper; the parts beside the tower are never loaded, only copied.

    Args:
        config: of the model.
        folder: its weights.
        dtype: of floating tensors in the result; None for the dtype of the source.
        compute: dtype of activations and of weights in use.
        device: where blocks run.
        trust_remote_code: whether code that comes with the model may run.
        expert_memory: bytes of experts that are in memory at a time; None for `EXPERT_MEMORY`.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        folder: SafetensorsFolder,
        *,
        dtype: torch.dtype | None = None,
        compute: torch.dtype = torch.float32,
        device: torch.device | None = None,
        trust_remote_code: bool = False,
        expert_memory: int | None = None,
    ) -> None:
        self.config = config
        self.expert_memory = EXPERT_MEMORY if expert_memory is None else expert_memory
        self.compute = compute
        self.device = device or torch.device("cpu")
        self.model = build_on_meta(config, compute, trust_remote_code, folder.stored)
        attach_experts(self.model)
        self.checkpoint = Checkpoint(folder, self.model, dtype)
        self.block_path, self.blocks = find_blocks(self.model)
        self.beside = tuple(parts_beside(self.model))
        for part in self.beside:
            put_aside(self.model, part, compute, self.device, partial(self._loaded_part, part))
        self._trust = trust_remote_code
        self._place_buffers(self.model)

    def blocks_of(self, config: PreTrainedConfig) -> nn.ModuleList:
        """The blocks of a model that differs in the sizes of its config, on the meta device, with real buffers."""
        model = build_on_meta(config, self.compute, self._trust)
        attach_experts(model)
        self._place_buffers(model)
        found = model.get_submodule(self.block_path)
        assert isinstance(found, nn.ModuleList)
        return found

    def _place_buffers(self, model: PreTrainedModel) -> None:
        for owner in model.modules():
            for name, buffer in owner._buffers.items():
                if buffer is not None and buffer.device.type != "meta":
                    owner._buffers[name] = buffer.to(self.device)

    @property
    def width(self) -> int:
        """Width of the residual stream; that of the embedding where the config does not say."""
        if (width := getattr(self.config.get_text_config(), "hidden_size", None)) is None:
            embedding = self.model.get_input_embeddings().weight
            assert isinstance(embedding, Tensor)
            width = embedding.shape[-1]
        return int(width)

    def block_name(self, index: int) -> str:
        """Module name of a block."""
        return f"{self.block_path}.{index}"

    def block_parameters(self, index: int) -> list[str]:
        """Names of the parameters and persistent buffers of a block."""
        prefix = self.block_name(index) + "."
        return [name for name in self.checkpoint if name.startswith(prefix)]

    def outside(self) -> list[str]:
        """Names of what text passes through outside the blocks: embeddings, last norm, head."""
        beside = tuple(f"{part}." for part in (self.block_path, *self.beside))
        return [name for name in self.checkpoint if not name.startswith(beside)]

    def text_parameters(self) -> list[str]:
        """Names of all parameters and persistent buffers that text passes through."""
        left = set(self.parameters_beside())
        return [name for name in self.checkpoint if name not in left]

    def sizes(self) -> dict[str, int]:
        """Number of elements of every parameter by its name; of tied ones, under one of their names."""
        tied = self.model.all_tied_weights_keys
        return {name: parameter.numel() for name, parameter in self.model.named_parameters() if name not in tied}

    def parameters_beside(self) -> list[str]:
        """Names of the parameters and persistent buffers of a wrapper that text does not pass through."""
        parts = tuple(f"{part}." for part in self.beside)
        return [name for name in self.checkpoint if name.startswith(parts)] if parts else []

    def before_blocks(self) -> list[str]:
        """Those of them that a forward needs up to the last block: all but an untied head."""
        head = self.model.get_output_embeddings()
        untied = {id(parameter) for parameter in head.parameters()} if head is not None else set()
        slots = {name: self._slot(name)[2] for name in self.outside()}
        return [name for name, tensor in slots.items() if id(tensor) not in untied or self._is_tied(name)]

    def _is_tied(self, name: str) -> bool:
        return self.checkpoint.shared(name)

    def export_outside(self) -> Iterator[tuple[str, Tensor]]:
        """Names on disk and tensors outside the blocks, those that text or the model does not use included."""
        yield from self.checkpoint.export([*self.outside(), *self.parameters_beside()], {})
        for name in self.checkpoint.unused:
            yield name, self.checkpoint.stored(self.checkpoint.folder[name])

    def sliced(self, names: Iterable[str]) -> dict[str, CheckpointSlices]:
        """Those of the parameters that are not loaded whole: experts, where they exceed the memory for them."""
        experts = [name for name in names if self._holds_experts(name)]
        nbytes = sum(self._slot(name)[2].numel() * self.compute.itemsize for name in experts)
        if nbytes <= self.expert_memory:
            return {}
        found = {name: find_slices(self.checkpoint, name) for name in experts}
        return {name: slices for name, slices in found.items() if slices is not None}

    def _holds_experts(self, name: str) -> bool:
        owner, _, parameter = self._slot(name)
        watched = isinstance(parameter, WatchedParameter) and parameter.dim() == 3
        return watched and says_how(owner) and not self.checkpoint.shared(name)

    @contextmanager
    def loaded(self, names: list[str], whole: bool = False) -> Iterator[None]:
        """Load the named tensors; they return to the meta device at the end.

        Args:
            names: of parameters and buffers.
            whole: load experts, too, where they exceed the memory for them.
        """
        previous = {name: self._slot(name) for name in names}
        sliced = {} if whole else self.sliced(names)
        with mmap_large_allocations():
            self._load([name for name in names if name not in sliced])
        self._slice(sliced)
        memory = {name: self._slot(name)[2].data_ptr() for name in names}
        try:
            yield
            if moved := [name for name in names if self._slot(name)[2].data_ptr() != memory[name]]:
                raise InputError(
                    f"{type(self.model).__name__} replaces its own parameter {moved[0]!r} while it runs",
                    "such a model cannot be streamed",
                )
        finally:
            for owner, attribute, tensor in previous.values():
                self._restore(owner, attribute, tensor)

    def _loaded_part(self, part: str) -> AbstractContextManager[None]:
        return self.loaded([name for name in self.checkpoint if name.startswith(f"{part}.")])

    def _load(self, names: list[str]) -> None:
        shared: dict[str, Tensor] = {}
        for name in names:
            # Tied parameters are one tensor on disk: read once, held once. A converted one has a value of its own.
            key = self.checkpoint.disk_names([name])[0] if self.checkpoint.stored_as_is(name) else f"converted {name}"
            if key not in shared:
                shared[key] = self._to_compute(self.checkpoint[name])
            self._fill(name, shared[key])

    def _slice(self, sliced: Mapping[str, CheckpointSlices]) -> None:
        cache = SliceCache(self.expert_memory)
        for name, slices in sliced.items():
            owner, attribute, old = self._slot(name)
            assert isinstance(old, WatchedParameter)
            values = SlicedValues(slices, cache, self._to_compute, self.device)
            owner._parameters[attribute] = old.sliced_into(values)

    def _to_compute(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.compute if tensor.is_floating_point() else tensor.dtype)

    def _slot(self, name: str) -> tuple[nn.Module, str, Tensor]:
        path, _, attribute = name.rpartition(".")
        owner = self.model.get_submodule(path)
        return owner, attribute, getattr(owner, attribute)

    def _fill(self, name: str, tensor: Tensor) -> None:
        owner, attribute, old = self._slot(name)
        if isinstance(old, WatchedParameter):
            owner._parameters[attribute] = old.filled(tensor)
        elif attribute in owner._parameters:
            owner._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
        else:
            owner._buffers[attribute] = tensor

    @staticmethod
    def _restore(owner: nn.Module, attribute: str, tensor: Tensor) -> None:
        if attribute in owner._parameters:
            assert isinstance(tensor, nn.Parameter)
            owner._parameters[attribute] = tensor
        else:
            owner._buffers[attribute] = tensor


SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size",
)  # fmt: skip


def check_sizes(config: PreTrainedConfig, stored: Stored) -> None:
    """Compare what a config announces with what is there, before anything of that size is made.

    Raises:
        InputError: a size that is no number of at least 0, or larger than the number of weights, or of tensors.
    """
    text = config.get_text_config()
    for key in SIZES:
        try:
            value = getattr(text, key, None)
        except Exception:  # noqa: S112 - it differs from block to block, and such a config refuses to tell one for all
            continue
        most = stored.tensors if key == "num_hidden_layers" else stored.weights
        for size in value if isinstance(value, list | tuple) else [value]:
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= most):
                raise InputError(
                    f"the config says {key} {str(size)[:40]}, but {stored.tensors} tensors hold "
                    f"{stored.weights:,} weights",
                    "the config does not belong to these weights",
                )


LARGEST = 2**26
"""Elements of a tensor that may be allocated while a model is built; larger ones are made on the meta device."""


class LargeOnMeta(TorchFunctionMode):
    """While it is on, tensors of more elements than `most` are made on the meta device.

    What is registered as a parameter goes there anyway, but is allocated before: the fused experts of one block may be
    more than a machine has. Small tensors must be real, as buffers that no file holds are computed from them.
    """

    def __init__(self, most: float) -> None:
        super().__init__()
        self.most = most

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FACTORIES and kwargs.get("device") is None and kwargs.get("generator") is None:
            shape = func(*args, **{**kwargs, "device": "meta"})
            if shape.numel() > self.most:
                return shape
        return func(*args, **kwargs)


FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}


def build_on_meta(
    config: PreTrainedConfig, compute: torch.dtype, trust_remote_code: bool = False, stored: Stored | None = None
) -> PreTrainedModel:
    """Build the language model of `config`, with all that a wrapper holds beside it, without allocating its weights.

    Buffers that no file holds are real.

    Args:
        config: of the model.
        compute: dtype of the parameters.
        trust_remote_code: whether code that comes with the model may run.
        stored: what is on disk, with which the sizes of a config of others are compared; None for a config of ours.

    Raises:
        InputError: the architecture is no language model, or far larger than what is stored.
    """
    if stored is not None:
        check_sizes(config, stored)
    bound = nullcontext if stored is None else partial(Bounded, stored)
    with bound():
        model = _built(config, compute, trust_remote_code, LARGEST)
    if any(
        buffer is not None and buffer.is_meta and name in module._non_persistent_buffers_set
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ):
        with bound():
            model = _built(config, compute, trust_remote_code, math.inf)
    model.config.return_dict = True  # a config may ask for bare tuples
    return model.eval().requires_grad_(False)


def _built(config: PreTrainedConfig, compute: torch.dtype, trust_remote_code: bool, most: float) -> PreTrainedModel:
    import transformers
    from accelerate import init_empty_weights

    kind = getattr(transformers, auto_class(config) or CAUSAL)
    with (
        reading(
            f"model type {config.model_type!r} cannot be built as a causal language model",
            "llmprune prunes decoder-only language models; remote code needs --trust-remote-code",
        ),
        init_empty_weights(include_buffers=False),
        LargeOnMeta(most),
    ):
        model: PreTrainedModel = kind.from_config(config, dtype=compute, trust_remote_code=trust_remote_code)
    return model
