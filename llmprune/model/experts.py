"""Experts: matrices that are slices of one parameter, made visible as layers; no model class is named here.

Mixtures store the matrices of all experts in one parameter, `(experts, out, in)` or `(experts, in, out)`, and multiply
tokens with one slice of it at a time. Every slice gets an `ExpertMatrix`, a module without parameters below the one
that owns the parameter: `mlp.experts.3.down_proj`. Whenever a product with the slice is computed, that module is called
with the tokens first, so hooks see an expert's matrix as they see any linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from llmprune.model.expert_slices import SlicedValues

DECORATED = ("is_transposed", "is_concatenated", "has_bias", "has_gate")
"""What transformers' `use_experts_implementation` says of a module that holds experts."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a parameter holds the matrices of experts, one behind the other.

    Args:
        count: number of matrices.
        shape: of a matrix, `(out, in)`.
        transposed: whether each is stored as `(in, out)`.
    """

    count: int
    shape: tuple[int, int]
    transposed: bool

    def matrix(self, parameter: Tensor, index: int) -> Tensor:
        """A matrix as it is stored, a view; the parameter must be contiguous."""
        return parameter.view(self.count, *(self.shape[::-1] if self.transposed else self.shape))[index]


@dataclass(frozen=True, slots=True)
class Place:
    """Where the matrix of an expert is stored.

    Args:
        attribute: name of the parameter in the module that owns it, two levels up.
        layout: of that parameter.
        index: of the matrix in it.
    """

    attribute: str
    layout: Layout
    index: int


class ExpertMatrix(nn.Module):
    """Stands for the matrix of one expert: called with its inputs `(tokens, in)` whenever it is used."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    def forward(self, inputs: Tensor) -> Tensor:
        """The inputs; the product is left to the module that owns the parameter."""
        return inputs


@dataclass(frozen=True, slots=True)
class Product:
    """A product of rows with a part of a parameter.

    Args:
        layout: of the parameter, as the part suggests it.
        index: of the part.
        inputs: `(..., in)`.
    """

    layout: Layout
    index: int
    inputs: Tensor


class WatchedParameter(nn.Parameter):
    """A parameter that tells of every product with a part of it before the product is computed.

    Only tensor subclasses can do so for forwards that pause in the middle and are continued in any order: a mode would
    stay on for the others. When the product has been told of, the part's present values are used: it may have been
    pruned in between.
    """

    tell: Callable[[Product], None]
    sliced: SlicedValues | None
    """Its values, where they are not in memory; the parameter is then on the meta device, and says another."""

    def __new__(cls, data: Tensor, requires_grad: bool = False, tell: Callable[[Product], None] | None = None) -> Self:
        """A parameter that shares the memory of `data`, which is copied unless it fills its memory from the start."""
        data = data.clone() if data.storage_offset() else data.contiguous()
        made = torch.Tensor._make_subclass(cls, data, requires_grad)
        made.tell, made.sliced = tell or (lambda product: None), None
        return made

    def filled(self, data: Tensor) -> Self:
        """The same parameter with values."""
        return type(self)(data, tell=self.tell)

    def sliced_into(self, values: SlicedValues) -> Self:
        """The same parameter with values that are read when they are needed."""
        made = self.filled(torch.empty(values.slices.shape, dtype=self.dtype, device="meta"))
        made.sliced = values
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class _Part(Tensor):
    """A view of a watched parameter."""

    whole: WatchedParameter

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


_LINEAR = {torch.nn.functional.linear}
_MATMUL = {
    torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm, torch.bmm, torch.Tensor.bmm,
}  # fmt: skip


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function that is given a watched parameter or a part of it."""
    if func in _LINEAR | _MATMUL and len(args) > 1 and isinstance(args[1], WatchedParameter | _Part):
        args = (args[0], _told(args[0], args[1], transposed=func in _MATMUL), *args[2:])
    whole = next((_whole(value) for value in args if isinstance(value, WatchedParameter | _Part)), None)
    if whole is not None and whole.sliced is not None:
        return _call_sliced(func, args, kwargs, whole)
    with torch._C.DisableTorchFunctionSubclass():
        return _watched(func(*args, **kwargs), whole)


def _call_sliced(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], whole: WatchedParameter) -> Any:
    """The same where the parameter's values are not in memory: views stay without them, all else reads them."""
    if func is torch.Tensor.device.__get__:
        return cast("SlicedValues", whole.sliced).device
    # What is no view fails here, or gives a tensor of its own.
    with suppress(RuntimeError), torch._C.DisableTorchFunctionSubclass():
        found = _watched(func(*args, **kwargs), whole)
        values = found if isinstance(found, tuple | list) else (found,)
        if all(isinstance(value, WatchedParameter | _Part) for value in values if isinstance(value, Tensor)):
            return found
    return func(*map(_values, args), **{key: _values(value) for key, value in kwargs.items()})


def _values(value: Any) -> Any:
    """The present values of a watched parameter or a part of it; anything else as it is."""
    if not isinstance(value, WatchedParameter | _Part):
        return value
    whole = _whole(value)
    with torch._C.DisableTorchFunctionSubclass():
        place = tuple(value.size()), value.stride(), int(value.storage_offset())
        return whole.data.as_strided(*place) if whole.sliced is None else whole.sliced.part(*place)


def _whole(value: Tensor) -> WatchedParameter:
    return value if isinstance(value, WatchedParameter) else cast("_Part", value).whole


def _watched(value: Any, whole: WatchedParameter | None) -> Any:
    """What a function returned; views of the parameter stay watched."""
    if whole is None or isinstance(value, WatchedParameter | _Part):
        return value
    if isinstance(value, tuple | list):
        return type(value)(_watched(item, whole) for item in value)
    if not isinstance(value, Tensor) or value.is_sparse or (value.is_meta and whole.sliced is None):
        return value
    if value.untyped_storage()._cdata != whole.untyped_storage()._cdata:
        return value
    part = value.as_subclass(_Part)
    part.whole = whole
    return part


def _told(inputs: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """Tell of a product; returns the weight's present values.

    Args:
        inputs: `(..., in)`.
        weight: `(out, in)`; or `(in, out)` where `transposed`, of all matrices where there is a dimension more.
        transposed: see above.
    """
    whole = _whole(weight)
    with torch._C.DisableTorchFunctionSubclass():
        matrix = weight.mT if transposed else weight
        products = [
            product for each, rows in _pairs(matrix, inputs) if (product := _product(whole, each, rows)) is not None
        ]
    for product in products:
        whole.tell(product)
    return cast("Tensor", _values(weight))


def _pairs(matrix: Tensor, inputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The matrices in a product, each with its inputs.

    Where all experts run on all tokens at once, `(experts, tokens, in)`, rows of zeros are tokens of other experts.
    """
    if matrix.dim() == 2:
        yield matrix, inputs
    elif matrix.dim() == inputs.dim() == 3 and len(matrix) == len(inputs):
        for each, rows in zip(matrix, inputs, strict=True):
            yield each, rows[rows.ne(0).any(-1)]


def _product(whole: Tensor, matrix: Tensor, inputs: Tensor) -> Product | None:
    """A product with a matrix `(out, in)` that is a part of a parameter; None if it is no slice of it."""
    rows, width = matrix.shape
    transposed = matrix.stride() == (1, rows) and rows > 1
    index, rest = divmod(int(matrix.storage_offset()), rows * width)
    if rest or whole.numel() % (rows * width) or not (transposed or matrix.stride() == (width, 1)):
        return None
    return Product(Layout(whole.numel() // (rows * width), (rows, width), transposed), index, inputs)


def attach(owner: nn.Module, attribute: str, layout: Layout) -> None:
    """Make the matrices of a parameter visible as modules `INDEX.ATTRIBUTE` below the module that owns it."""
    for index in range(layout.count):
        if str(index) not in owner._modules:
            owner.add_module(str(index), nn.Module())
        owner.get_submodule(str(index)).add_module(attribute, ExpertMatrix(Place(attribute, layout, index)))

    def tell(product: Product) -> None:
        if product.layout == layout:
            owner.get_submodule(f"{product.index}.{attribute}")(product.inputs)

    watch(owner, attribute, tell)


def is_attached(owner: nn.Module, attribute: str) -> bool:
    """Whether the matrices of a parameter have been made visible."""
    first = owner._modules.get("0")
    return first is not None and isinstance(first._modules.get(attribute), ExpertMatrix)


def storage_of(block: nn.Module, name: str) -> tuple[str, Callable[[Tensor], Tensor]] | None:
    """Where a layer's weight or bias is stored: the parameter's name in the block, and the part of it, a view.

    Args:
        block: the block.
        name: local, `LAYER.weight` or `LAYER.bias`.

    Returns:
        None where the layer has no such thing.
    """
    local, _, kind = name.rpartition(".")
    layer = block.get_submodule(local)
    if not isinstance(layer, ExpertMatrix):
        return (name, lambda whole: whole) if isinstance(getattr(layer, kind, None), nn.Parameter) else None
    place = layer.place
    owner = local.rpartition(".")[0].rpartition(".")[0]
    if kind == "weight":
        return f"{owner}.{place.attribute}", lambda whole: place.layout.matrix(whole, place.index)
    bias = f"{place.attribute}_bias"
    return (f"{owner}.{bias}", lambda whole: whole[place.index]) if hasattr(block.get_submodule(owner), bias) else None


def sliced_parameters(module: nn.Module) -> Iterator[tuple[str, SlicedValues]]:
    """The parameters below a module whose values are not in memory."""
    for name, parameter in module.named_parameters():
        if isinstance(parameter, WatchedParameter) and parameter.sliced is not None:
            yield name, parameter.sliced


def watch(owner: nn.Module, attribute: str, tell: Callable[[Product], None]) -> None:
    """Have a parameter tell of the products with its parts."""
    owner._parameters[attribute] = WatchedParameter(owner.get_parameter(attribute).data, tell=tell)


def attach_experts(model: nn.Module) -> None:
    """Make the experts of a model visible whose modules say how they hold them, and have them run one by one.

    Only the plain implementation computes one product per expert; others sort the tokens or copy the weights.
    """
    for owner, attribute, layout in list(_described(model)):
        owner.config._experts_implementation = "eager"  # type: ignore[union-attr]
        attach(owner, attribute, layout)


ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "top_k_experts")


def active_experts(config: PreTrainedConfig) -> int:
    """How many experts a token is sent to, for an estimate; 1 where the config has another word for it."""
    text = config.get_text_config()
    parts = [text, getattr(text, "ffn_config", None)]
    found = (getattr(part, name, None) for part in parts if part is not None for name in ACTIVE)
    return next((number for number in found if isinstance(number, int) and number > 0), 1)


def _described(model: nn.Module) -> Iterator[tuple[nn.Module, str, Layout]]:
    for module in filter(says_how, model.modules()):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3:
                count, *shape = parameter.shape
                rows, width = shape[::-1] if module.is_transposed else shape
                yield module, name, Layout(count, (rows, width), bool(module.is_transposed))


def says_how(module: nn.Module) -> bool:
    """Whether a module that holds experts says how."""
    return all(hasattr(module, name) for name in DECORATED)
