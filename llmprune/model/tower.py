"""The language model inside of a wrapper for images: where it is, and what lies beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from llmprune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def tower_name(model: PreTrainedModel) -> str:
    """Module name of the language model inside of a wrapper; '' where that is the model itself."""
    decoder = model.get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder), "")


def parts_beside(model: PreTrainedModel) -> list[str]:
    """Module names of the parts of a wrapper that text does not pass through: vision towers, projectors.

    They are all that lies beside the decoder and the embeddings. A model whose config is that of its language model
    has none.
    """
    if model.config.get_text_config() is model.config:
        return []
    passed = {model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()} - {None}
    return list(_beside(model, "", passed))


def _beside(module: nn.Module, prefix: str, passed: set[nn.Module]) -> Iterator[str]:
    """The largest modules with parameters that neither hold one of `passed` nor belong to one."""
    for name, child in module.named_children():
        if child in passed:
            continue
        if not passed.isdisjoint(child.modules()):
            yield from _beside(child, f"{prefix}{name}.", passed)
        elif any(True for _ in child.parameters()):
            yield f"{prefix}{name}"


def closed(model: PreTrainedModel, part: str, dtype: torch.dtype, device: torch.device) -> None:
    """Close a part of a model that text does not pass through: its call is refused, its parameters are one NaN each.

    They take no memory, but tell their shapes and where the model is: some models ask that of any parameter.
    """

    def refuse(*_: object) -> None:
        raise InputError(f"{type(model).__name__} sends text through {part!r}", TEXT_ALONE)

    module = model.get_submodule(part)
    module.register_forward_pre_hook(refuse)
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            value = torch.full((), torch.nan, dtype=dtype, device=device)
            owner._parameters[name] = nn.Parameter(value.expand(parameter.shape), requires_grad=False)


TEXT_ALONE = "of wrappers only such can be pruned whose language model runs on text alone"
