"""The `quantization_config` of a model with layers on a grid: what readers must know, and what of it a config lacks."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from llmprune.model import compressed_tensors
from llmprune.model.blocks import find_layers
from llmprune.model.skeleton import Skeleton
from llmprune.pruning.grid import Grid


def config_section(grid: Grid, skeleton: Skeleton, quantized: Collection[str]) -> dict[str, Any]:
    """The `quantization_config` of a model.

    Args:
        grid: of the weights.
        skeleton: the model.
        quantized: full names of the layers on the grid.
    """
    on_grid = set(quantized)
    modules = dict(skeleton.model.named_modules())
    dense = {name for name, module in modules.items() if isinstance(module, nn.Linear)} - on_grid
    # Readers know a layer by the name of its module, or by that of its tensor on disk; and vLLM has linear layers where
    # transformers has routers and experts.
    stored = skeleton.checkpoint
    others = {name for name, module in modules.items() if _is_other_matrix(module)}
    names = {f"{name}.weight" for name in dense | others if f"{name}.weight" in stored}
    on_disk = {stored.origin(name).names[0].removesuffix(".weight") for name in names if stored.stored_as_is(name)}
    return compressed_tensors.config_of(grid, dense | others | _experts(skeleton) | on_disk - modules.keys())


def _is_other_matrix(module: nn.Module) -> bool:
    """Whether a module that is no linear layer multiplies with a matrix, as routers do."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 2 and not isinstance(module, (nn.Linear, nn.Embedding))


def _experts(skeleton: Skeleton) -> set[str]:
    """Patterns of the names on disk of the matrices of all experts, one for every mixture."""
    found = set()
    for index, block in enumerate(skeleton.blocks):
        layers = find_layers(block, skeleton.block_name(index), skeleton.config)
        for parameter in {layer.parameter for layer in layers if layer.expert is not None}:
            names = [name.replace(".", "/") for name in skeleton.checkpoint.origin(parameter).names]
            module = os.path.commonpath([name.rpartition("/")[0] for name in names]).replace("/", ".")
            found.add(f"re:{re.escape(module)}[.].*")
    return found


def wrong_section(found: Mapping[str, Any], wanted: Mapping[str, Any], quantized: Collection[str]) -> list[str]:
    """What of a `quantization_config` does not belong to the files, a line for each.

    Args:
        found: as it stands in a config.
        wanted: by `config_section`.
        quantized: full names of the layers on the grid.
    """
    own, wants = _settings(found), _settings(wanted)
    wrong = [f"{key} is {own.get(key)}, not {value}" for key, value in wants.items() if own.get(key) != value]
    said = found.get("ignore")
    ignored = {name for name in said if isinstance(name, str)} if isinstance(said, list) else set()
    lacking, extra = sorted(set(wanted["ignore"]) - ignored), sorted(ignored & set(quantized))
    wrong += [f"ignore lacks {lacking[0]!r}, which is in floating point"] if lacking else []
    return wrong + ([f"ignore names {extra[0]!r}, which is on the grid"] if extra else [])


def _settings(section: Mapping[str, Any]) -> dict[str, Any]:
    """How layers are stored, by a section of one scheme."""
    settings = {key: section.get(key) for key in ("quant_method", "format")}
    groups = section.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        settings |= {"targets": group.get("targets"), **weights} if isinstance(weights, Mapping) else {}
    return settings
