"""The language model inside of a wrapper for images: where it is, and what lies beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING

import torch
from torch import nn

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


def put_aside(
    model: PreTrainedModel,
    part: str,
    dtype: torch.dtype,
    device: torch.device,
    load: Callable[[], AbstractContextManager[None]],
) -> None:
    """Put aside a part beside the language model: its parameters are in memory only while it is called.

    Some models send text through their embedding of images, and use nothing of what comes out. In between the
    parameters are one NaN each: they take no memory, but tell their shapes and where the model is, as some models ask
    that of any parameter.

    Args:
        model: on the meta device.
        part: its module name.
        dtype: of the NaN.
        device: of the NaN.
        load: loads the parameters of the part as long as its context lasts.
    """
    module, loaded = model.get_submodule(part), ExitStack()
    module.register_forward_pre_hook(lambda *_: loaded.enter_context(load()))
    module.register_forward_hook(lambda *_: loaded.close(), always_call=True)
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            value = torch.full((), torch.nan, dtype=dtype, device=device)
            owner._parameters[name] = nn.Parameter(value.expand(parameter.shape), requires_grad=False)


TEXT_ALONE = "of wrappers only such can be pruned whose language model runs on text alone"
