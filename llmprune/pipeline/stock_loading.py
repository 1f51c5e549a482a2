"""Which models stock transformers loads when some of their layers are quantised: asked before the first solve."""

from __future__ import annotations

import copy

from torch import nn
from transformers.quantizers import base

from llmprune.errors import InputError
from llmprune.model.selection import Plan
from llmprune.model.skeleton import Skeleton
from llmprune.pruning.grid import Grid

REPLACED: frozenset[str] = frozenset(getattr(base, "MODULES_TO_PATCH_FOR_QUANTIZATION", ()))
"""Classes that transformers replaces in quantised models; older versions replace none."""
HINT = "use fp8, and leave experts in floating point with --skip '*experts*'"


def check_loading(grid: Grid, skeleton: Skeleton, plan: Plan) -> None:
    """Refuse models that transformers would not load.

    Raises:
        InputError: naming what is not loaded.
    """
    kinds = {type(module).__name__ for module in skeleton.model.modules()}
    if replaced := kinds & REPLACED:
        raise InputError(
            f"transformers does not load {min(replaced)} of a quantised model: it puts other modules in their place",
            "leave out --quantize",
        )
    if grid.kind != "int":
        return
    if merged := next((name for name, _ in skeleton.model.named_parameters() if _is_merged(skeleton, name)), ""):
        count = len(skeleton.checkpoint.origin(merged).names)
        raise InputError(
            f"transformers does not load {merged!r} beside layers in {grid.name}: it expects the {count} tensors on "
            f"disk that make it in {grid.name}, too",
            HINT,
        )
    if not _initialises(skeleton, plan):
        raise InputError(
            f"transformers does not load {type(skeleton.model).__name__} in {grid.name}: it initialises weights that "
            "packed layers do not have",
            HINT.partition(",")[0],
        )


def _is_merged(skeleton: Skeleton, name: str) -> bool:
    """Whether transformers makes a parameter of weights on disk, which it then expects in the form of the layers."""
    stored = skeleton.checkpoint
    return not stored.stored_as_is(name) and all(one.endswith(".weight") for one in stored.origin(name).names)


def _initialises(skeleton: Skeleton, plan: Plan) -> bool:
    """Whether the initialisation of all modules, which is part of loading, passes over layers without a weight."""
    for index, block in enumerate(skeleton.blocks):
        bare = copy.deepcopy(block)
        for name, module in bare.named_modules():
            if f"{skeleton.block_name(index)}.{name}" in plan.names:
                del module.weight
        if not all(_is_initialised(skeleton, module) for module in bare.modules()):
            return False
    return True


def _is_initialised(skeleton: Skeleton, module: nn.Module) -> bool:
    """Whether the initialisation of a module finds all that it looks for."""
    try:
        skeleton.model._init_weights(module)
    except AttributeError:
        return False
    except (NotImplementedError, RuntimeError):  # a skeleton has no data to compute with
        pass
    return True
