"""How a run stores weights on a grid: what the layers must fulfil, how much smaller files get, how they are read."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from llmprune.errors import InputError
from llmprune.model import compressed_tensors
from llmprune.model.blocks import LayerRef
from llmprune.model.dequantize import dequantized
from llmprune.model.quantization import quantization_of
from llmprune.model.reader import SafetensorsFolder
from llmprune.model.selection import Plan
from llmprune.model.skeleton import Skeleton
from llmprune.pipeline.stock_loading import check_loading
from llmprune.pruning.grid import Grid, parse_grid
from llmprune.structure.cut import Structure


def fitted_grid(grid: Grid, skeleton: Skeleton, plan: Plan, structure: Structure) -> Grid:
    """The grid with its group size and the dtype of its scales, for the layers of a plan.

    Raises:
        InputError: the weights of a layer cannot be stored on it, or transformers would not load the model.
    """
    shapes = _shapes(skeleton, plan, structure)
    dtypes = {skeleton.checkpoint.stored_dtype(layer.parameter) for layer in plan.layers}
    if len(dtypes) > 1:
        found = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise InputError(f"the weights are stored as {found}, and a config names one dtype", "choose one: --dtype")
    grid = grid.fitted((width for _, width in shapes.values()), dtypes.pop())
    for layer in plan.layers:
        if obstacle := _obstacle(layer, skeleton):
            raise InputError(
                f"{grid.name} does not fit layer {layer.name!r}: its weight is {obstacle}",
                "leave such layers in floating point with --skip GLOB",
            )
        if mismatch := compressed_tensors.mismatch(shapes[layer.name], grid):
            raise InputError(
                f"{grid.name} does not fit layer {layer.name!r}: {mismatch}",
                f"use {' or '.join(_fitting(shapes.values()))}, or leave such layers out with --skip GLOB",
            )
    check_loading(grid, skeleton, plan)
    return grid


def _fitting(shapes: Collection[tuple[int, int]]) -> list[str]:
    """The grids of which one fits all layers of these shapes; the last one always does."""
    grids = map(parse_grid, ("int4:g32", "int4:channel", "int8", "fp8"))
    return [grid.name for grid in grids if not any(compressed_tensors.mismatch(shape, grid) for shape in shapes)]


def _obstacle(layer: LayerRef, skeleton: Skeleton) -> str:
    """Why the format holds no layer of this kind, or ''."""
    if layer.expert is not None:
        return "a part of a tensor of all experts, and the format has linear layers only"
    if layer.transposed:
        return "stored transposed, and the format has linear layers only"
    if not skeleton.checkpoint.stored_as_is(layer.parameter):
        return "a part of another tensor on disk"
    return ""


def _shapes(skeleton: Skeleton, plan: Plan, structure: Structure) -> dict[str, tuple[int, int]]:
    """The shape `(out, in)` that every layer has in the end, by its full name."""
    smaller, shapes = structure.shapes(skeleton), {}
    for layer in plan.layers:
        rows, width = smaller.get(layer.parameter, layer.shape) if layer.expert is None else layer.shape
        shapes[layer.name] = (rows, width)
    return shapes


def saved_bytes(grid: Grid, skeleton: Skeleton, plan: Plan, structure: Structure) -> int:
    """Bytes by which the files of a model get smaller."""
    shapes = _shapes(skeleton, plan, structure).values()
    element = grid.scale_dtype.itemsize
    return sum(rows * width * element - compressed_tensors.written_bytes((rows, width), grid) for rows, width in shapes)


def open_quantized(folder: Path, grid: Grid) -> SafetensorsFolder:
    """The tensors of a folder with weights on a grid, in floating point."""
    how = quantization_of({"quantization_config": compressed_tensors.config_of(grid, ())})
    assert how is not None
    return dequantized(SafetensorsFolder(folder), how, grid.scale_dtype)
