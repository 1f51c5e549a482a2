"""Finds experts in modules that do not say how they hold them, by watching products with parts of their parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import torch
from torch import nn

from llmprune.model.experts import Layout, Product, attach, is_attached, watch
from llmprune.model.hooks import hooked
from llmprune.runtime.oom import out_of_memory

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from llmprune.model.skeleton import Skeleton

LEAST_SHARE = 0.02
"""Of a block's parameters: what is smaller (routers, tables) is not worth a look."""
TOKENS = 32


class _Seen(Exception):
    """Ends the forward behind the last block of interest."""


def probe_experts(skeleton: Skeleton) -> None:
    """Make the experts of a model visible whose modules do not say how they hold them.

    Where a product takes a part of a parameter, the part's place, shape and strides say which slice it is and along
    which dimension its inputs lie; the other slices lie beside it. One block of every kind is run for that, on a few
    tokens. What is never seen as slices stays as it is.
    """
    kinds: dict[object, list[int]] = defaultdict(list)
    for index, block in enumerate(skeleton.blocks):
        kinds[type(block), tuple((name, p.shape) for name, p in block.named_parameters())].append(index)
    wanted = {indices[0]: names for indices in kinds.values() if (names := _unexplained(skeleton.blocks[indices[0]]))}
    if not wanted:
        return
    products = _products(skeleton, wanted)
    for first, *others in kinds.values():
        for name, layouts in products[first].items():
            stacked = skeleton.blocks[first].get_parameter(name).dim() == 3
            if len(layouts) == 1 and (stacked or next(iter(layouts)).count > 1):
                for index in (first, *others):
                    path, _, attribute = name.rpartition(".")
                    attach(skeleton.blocks[index].get_submodule(path), attribute, next(iter(layouts)))


def _unexplained(block: nn.Module) -> list[str]:
    """Local names of the larger parameters of a block that belong to no layer."""
    from transformers.pytorch_utils import Conv1D

    least = LEAST_SHARE * sum(parameter.numel() for parameter in block.parameters())
    return [
        ".".join(filter(None, (path, name)))
        for path, owner in block.named_modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if parameter.dim() in {2, 3}
        and parameter.numel() >= least
        and not is_attached(owner, name)
        and not isinstance(owner, nn.Linear | Conv1D | nn.Embedding | nn.Conv1d)
    ]


def _products(skeleton: Skeleton, wanted: dict[int, list[str]]) -> dict[int, dict[str, set[Layout]]]:
    """How the parameters `wanted` (by block) are used in products; the blocks run up to the last of these."""
    seen: dict[int, dict[str, set[Layout]]] = defaultdict(lambda: defaultdict(set))

    def note(index: int, name: str, product: Product) -> None:
        if min(product.layout.shape) > 1:
            seen[index][name].add(product.layout)

    slots = [(skeleton.blocks[index], index, name) for index, names in wanted.items() for name in names]
    plain = {}
    for block, index, name in slots:
        path, _, attribute = name.rpartition(".")
        owner = block.get_submodule(path)
        plain[owner, attribute] = owner._parameters[attribute]
        watch(owner, attribute, lambda product, index=index, name=name: note(index, name, product))  # type: ignore[misc]
    try:
        _run(skeleton, max(wanted))
    except Exception as error:  # a model that cannot run is refused later, with its reason
        if out_of_memory(error):
            raise
    finally:
        for (owner, attribute), parameter in plain.items():
            owner._parameters[attribute] = parameter
    return seen


@torch.no_grad()
def _run(skeleton: Skeleton, last: int) -> None:
    """Run the blocks up to `last`, each with its weights in memory only while it runs."""
    loaded = ExitStack()

    def load(index: int) -> None:
        loaded.enter_context(skeleton.loaded(skeleton.block_parameters(index)))

    def release(index: int) -> None:
        loaded.close()
        if index == last:
            raise _Seen

    def handles() -> Iterator[RemovableHandle]:
        for index, block in enumerate(skeleton.blocks):
            yield block.register_forward_pre_hook(lambda *_, index=index: load(index))
            yield block.register_forward_hook(lambda *_, index=index: release(index))

    vocabulary = skeleton.config.get_text_config().vocab_size
    tokens = (torch.arange(TOKENS)[None] % vocabulary).to(skeleton.device)
    with skeleton.loaded(skeleton.before_blocks()), hooked(handles()), loaded, suppress(_Seen):
        skeleton.model(input_ids=tokens, use_cache=False)
