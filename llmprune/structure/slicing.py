"""Removing channels and heads from a block's tensors, and the config that says so."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmprune.errors import InputError
from llmprune.model.skeleton import build_on_meta
from llmprune.pruning.permutation import classes_left
from llmprune.structure.coupling import Coupling, Source, fold

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_MLP = r"inner|intermediate|ffn|ff_|_ff|mlp"
_WIDTH = rf"{_MLP}|hidden"
Shapes = dict[str, tuple[int, ...]]


def rearrange(coupling: Coupling, order: Tensor, tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Give a sink the inputs `order`, and its sources the rows that feed them; the block computes the same.

    Inputs that are not in `order` are gone: their rows go with them where they feed nothing else, as physical slices.

    Args:
        coupling: what hangs together.
        order: `(kept,)`, int64: position p of the sink gets input `order[p]`.
        tensors: at least all parameters of these layers, as the modules store them, by name.
        prefix: stands before the local names.

    Returns:
        The tensors that changed, new ones, by name.

    Raises:
        ValueError: the order moves inputs out of their class or apart from their copies.
    """
    if len(order) == coupling.width:
        return fold(coupling, order, tensors, prefix)
    kept = order.sort().values
    changed = cut(coupling, kept, tensors, prefix)
    if torch.equal(order, kept):
        return changed
    place = _numbered(kept, coupling.width)
    return changed | fold(restricted(coupling, kept), place[order], {**tensors, **changed}, prefix)


def cut(coupling: Coupling, kept: Tensor, tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The sink with the inputs `kept (k,)` only, and its sources without the rows that feed nothing else.

    A tensor that has no data (meta device) gives its new shape.
    """
    gone = _gone(coupling, kept)
    changed = {}
    for feed in coupling.feeds:
        rows = feed.staying(gone)
        for name in (f"{prefix}{feed.local}.weight", f"{prefix}{feed.local}.bias"):
            if name in tensors and len(rows) < len(feed.single):
                axis = tensors[name].dim() - 1 if feed.transposed else 0
                changed[name] = tensors[name].index_select(axis, rows.to(tensors[name].device))
    name = f"{prefix}{coupling.sink}.weight"
    changed[name] = tensors[name].index_select(int(not coupling.transposed), kept.to(tensors[name].device))
    return changed


def restricted(coupling: Coupling, kept: Tensor) -> Coupling:
    """The coupling of what is left, with inputs and rows counted anew: what may still change places."""
    left = classes_left(coupling.classes, kept, coupling.width)
    gone = _gone(coupling, kept)
    rows = {feed.local: _numbered(feed.staying(gone), len(feed.single)) for feed in coupling.feeds}
    sources = tuple(
        Source(
            source.local,
            source.transposed,
            tuple(rows[source.local][m[:, s]] for m, (_, s) in zip(source.rows, left, strict=True) if s.any()),
        )
        for source in coupling.sources
    )
    classes = tuple(slots for slots, stays in left if stays.any())
    return replace(coupling, width=len(kept), classes=classes, sources=sources, feeds=())


def _gone(coupling: Coupling, kept: Tensor) -> Tensor:
    gone = torch.ones(coupling.width, dtype=torch.bool)
    gone[kept] = False
    return gone


def _numbered(kept: Tensor, size: int) -> Tensor:
    """For every old number its new one, −1 for what is gone."""
    numbers = torch.full((size,), -1)
    numbers[kept] = torch.arange(len(kept))
    return numbers


def channel_settings(config: PreTrainedConfig, widths: Mapping[int, int]) -> Iterator[dict[str, int]]:
    """Settings that may express new MLP widths, likely ones first.

    Args:
        config: the model's.
        widths: new width by old width.
    """
    settings = config.to_dict()
    for pairs in product(*(list(_width_settings(settings, old, new)) for old, new in widths.items())):
        yield dict(pairs)


def _width_settings(settings: Mapping[str, Any], old: int, new: int) -> Iterator[tuple[str, int]]:
    """What may say one width: numbers equal to the old one, then unset ones that are called like a width, then those
    that are called like an MLP's and are another number, in proportion: the model may compute its width from them.
    """
    numbers = {key: value for key, value in settings.items() if type(value) is int}
    yield from ((key, new) for key, value in numbers.items() if value == old)
    yield from ((key, new) for key, value in settings.items() if value is None and re.search(_WIDTH, key))
    for key, value in numbers.items():
        if value != old and re.search(_MLP, key):
            # The model may round in between, either way.
            scaled = sorted({value * new // old, -(-value * new // old)})
            yield from ((key, number) for number in scaled if 0 < number != value)


def head_settings(config: PreTrainedConfig, heads: int, groups: int, width: int) -> Iterator[dict[str, int]]:
    """Settings that may express a number of heads, of kv groups, and the head's width.

    Args:
        config: the model's.
        heads: new number of query heads.
        groups: new number of kv heads.
        width: of a head; it does not change, but many configs derive it from the number of heads unless it is said.
    """
    settings = config.to_dict()
    wanted = {"num_attention_heads": heads, "num_key_value_heads": groups, "num_kv_heads": groups}
    names = {name: getattr(config, "attribute_map", {}).get(name, name) for name in wanted}
    found = {names[name]: value for name, value in wanted.items() if names[name] in settings}
    derived = isinstance(getattr(type(config), "head_dim", None), property)
    if not derived and settings.get("head_dim") in {None, width}:
        yield {**found, "head_dim": width}
    yield found


def changed_config(config: PreTrainedConfig, changes: Mapping[str, int]) -> PreTrainedConfig:
    """The config with some settings changed, checked as a new one is."""
    return type(config).from_dict({**config.to_dict(), **changes})


def find_settings(
    config: PreTrainedConfig, candidates: Iterator[dict[str, int]], shapes: Shapes, dtype: torch.dtype, trust: bool
) -> tuple[dict[str, int], str]:
    """The first settings with which the model has just these shapes.

    Args:
        config: the model's.
        candidates: settings to try.
        shapes: of all parameters, by module name, as the cuts leave them.
        dtype: of the model that is instantiated, on the meta device.
        trust: whether code that comes with the model may run.

    Returns:
        the settings; or none, and why the first candidates failed.
    """
    reason = "it has no setting for that"
    for number, changes in enumerate(candidates):
        try:
            model = build_on_meta(changed_config(config, changes), dtype, trust)
        except Exception as error:  # every config class has checks of its own
            found = error.message if isinstance(error, InputError) else str(error) or type(error).__name__
            reason = _last_line(found) if number == 0 else reason
            continue
        made = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        differing = [name for name in {**made, **shapes} if made.get(name) != shapes.get(name)]
        if not differing:
            return changes, ""
        if number == 0:
            first = differing[0]
            reason = (
                f"with {', '.join(f'{k}={v}' for k, v in changes.items())}, {first!r} would be "
                f"{made.get(first)} instead of {shapes.get(first)}"
            )
    return {}, reason


def _last_line(text: str) -> str:
    """What a validator says in the end, without the names of exceptions before it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"^(\w+(Error|Exception): *)+", "", lines[-1]) if lines else text


def shapes_after(cuts: Sequence[tuple[Coupling, Tensor, str]], tensors: Mapping[str, Tensor]) -> Shapes:
    """All shapes once some inputs have been removed.

    Args:
        cuts: coupling, the inputs that stay, and the block's prefix.
        tensors: the model's, on the meta device.
    """
    shapes: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for coupling, kept, prefix in cuts:
        shapes |= {name: tuple(t.shape) for name, t in cut(coupling, kept, tensors, prefix).items()}
    return shapes
