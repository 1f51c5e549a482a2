"""Search for config settings that express the sizes of a model without some channels or heads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from llmprune.errors import InputError
from llmprune.model.auto_class import text_section
from llmprune.model.skeleton import build_on_meta
from llmprune.structure.slicing import Shapes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_MLP = r"inner|intermediate|ffn|ff_|_ff|mlp"
_WIDTH = rf"{_MLP}|hidden"


def channel_settings(config: PreTrainedConfig, widths: Mapping[int, int]) -> Iterator[dict[str, int]]:
    """Candidate settings for new MLP widths, likely ones first.

    Args:
        config: of the model; its language model's part is searched.
        widths: old width -> new width.
    """
    settings = config.get_text_config().to_dict()
    for parts in product(*(list(_width_settings(settings, old, new)) for old, new in widths.items())):
        found: dict[str, int] = {}
        for part in parts:
            found |= part
        yield found


def _width_settings(settings: Mapping[str, Any], old: int, new: int) -> Iterator[dict[str, int]]:
    """Candidates for one width: a setting equal to the old one, all such that have a name like an MLP's, then unset
    ones with a name like a width, then other numbers with a name like an MLP's, scaled in proportion: the model may
    derive its width from them.
    """
    numbers = {key: value for key, value in settings.items() if type(value) is int}
    equal = [key for key, value in numbers.items() if value == old]
    yield from ({key: new} for key in equal)
    if len(alike := [key for key in equal if re.search(_MLP, key)]) > 1:
        yield dict.fromkeys(alike, new)
    yield from ({key: new} for key, value in settings.items() if value is None and re.search(_WIDTH, key))
    for key, value in numbers.items():
        if value != old and re.search(_MLP, key):
            # The model may round in between, either way.
            scaled = sorted({value * new // old, -(-value * new // old)})
            yield from ({key: number} for number in scaled if 0 < number != value)


def head_settings(config: PreTrainedConfig, heads: int, groups: int, width: int) -> Iterator[dict[str, int]]:
    """Candidate settings for a number of query heads, kv heads, and the head dimension.

    Args:
        config: of the model; its language model's part is searched.
        heads: new number of query heads.
        groups: new number of kv heads.
        width: head dimension; it does not change, but many configs derive it from the number of heads unless it is set.
    """
    config = config.get_text_config()
    settings = config.to_dict()
    wanted = {"num_attention_heads": heads, "num_key_value_heads": groups, "num_kv_heads": groups}
    names = {name: getattr(config, "attribute_map", {}).get(name, name) for name in wanted}
    found = {names[name]: value for name, value in wanted.items() if names[name] in settings}
    derived = isinstance(getattr(type(config), "head_dim", None), property)
    if not derived and settings.get("head_dim") in {None, width}:
        yield {**found, "head_dim": width}
    yield found


def changed_config(config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """A copy of a config with some settings of its language model changed, validated as a new one is."""
    return type(config).from_dict(with_changes(config.to_dict(), text_section(config), changes))


def with_changes(settings: Mapping[str, Any], section: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with changes in one of their sections; in themselves where it is ''."""
    if not section:
        return {**settings, **changes}
    return {**settings, section: {**settings.get(section, {}), **changes}}


def find_settings(
    config: PreTrainedConfig, candidates: Iterable[Mapping[str, Any]], shapes: Shapes, dtype: torch.dtype, trust: bool
) -> tuple[dict[str, Any], str]:
    """The first candidate settings that give a model with exactly these shapes.

    Args:
        config: of the model.
        candidates: settings to try.
        shapes: of all parameters after the removal, by module name.
        dtype: of the model that is instantiated, on the meta device.
        trust: whether code that comes with the model may run.

    Returns:
        the settings; or none, and why the first candidate failed.
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
            return dict(changes), ""
        if number == 0:
            first = differing[0]
            reason = (
                f"with {', '.join(f'{k}={v}' for k, v in changes.items())}, {first!r} would be "
                f"{made.get(first)} instead of {shapes.get(first)}"
            )
    return {}, reason


def _last_line(text: str) -> str:
    """The last line of a validator's message, without the names of exceptions before it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"^(\w+(Error|Exception): *)+", "", lines[-1]) if lines else text
