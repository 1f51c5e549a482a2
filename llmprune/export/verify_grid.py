"""Verification of the grid of a written folder, from its codes and scales alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from llmprune.model import compressed_tensors
from llmprune.model.blocks import LayerRef
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.reader import SafetensorsFolder
from llmprune.pruning.grid import Grid


def off_grid(
    folder: Path,
    checkpoint: Checkpoint,
    layers: Iterable[tuple[LayerRef, Grid]],
    step: Callable[[], None] = lambda: None,
) -> list[str]:
    """What is wrong with the codes and scales of layers, a line for each.

    Args:
        folder: with the tensors.
        checkpoint: of the model, which says the names on disk.
        layers: each with its grid.
        step: called after every layer.
    """
    raw, found = SafetensorsFolder(folder), []
    for ref, grid in layers:
        name = checkpoint.origin(ref.parameter).names[0].removesuffix("_packed")
        if wrong := _wrong(raw, name, ref.shape, grid):
            found.append(f"{ref.name}: {wrong}")
        step()
    return found


def _wrong(raw: SafetensorsFolder, name: str, shape: tuple[int, int], grid: Grid) -> str:
    """What is wrong with one layer, or ''."""
    rows, width = shape
    values, scales = (f"{name}_packed" if grid.kind == "int" else name), f"{name}_scale"
    wanted = (rows, width * grid.bits // compressed_tensors.WORD) if grid.kind == "int" else shape
    for one, sizes in ((values, wanted), (scales, (rows, grid.groups(width)))):
        if one not in raw.entries:
            return f"there is no {one!r}"
        if raw.entries[one].shape != sizes:
            return f"{one!r} is {raw.entries[one].shape}, not {sizes}"
    kind = "I32" if grid.kind == "int" else "F8_E4M3"
    if raw.entries[values].field.dtype != kind:
        return f"{values!r} is stored as {raw.entries[values].field.dtype}, not as {kind}"
    return _wrong_values(raw, name, shape, grid)


def _wrong_values(raw: SafetensorsFolder, name: str, shape: tuple[int, int], grid: Grid) -> str:
    """What is wrong with the values of one layer, or ''."""
    scale = raw[f"{name}_scale"].float()
    if bad := int((~(scale > 0) | ~scale.isfinite()).sum()):
        return f"{bad} of {scale.numel()} scales are not positive"
    if grid.kind == "int" and (said := raw[f"{name}_shape"].tolist()) != list(shape):
        return f"its shape is said to be {said}, not {list(shape)}"
    if grid.kind == "float" and not bool(raw[name].to(torch.float32).isfinite().all()):
        return "its codes hold NaN"
    return ""
