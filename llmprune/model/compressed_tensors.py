"""The format of compressed-tensors in which quantised weights are written; transformers and vLLM load it.

A matrix `X.weight` on a grid of integers becomes `X.weight_packed`, `X.weight_scale` and `X.weight_shape` (format
`pack-quantized`: codes from the lowest on, in whole 32-bit words, the first in the lowest bits); one in float8 stays
`X.weight`, with `X.weight_scale` beside it (format `float-quantized`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from llmprune.pruning.grid import Grid, spread_scale

WORD = 32
SUFFIX = ".weight"


def format_of(grid: Grid) -> str:
    """The name of the format for a grid."""
    return "pack-quantized" if grid.kind == "int" else "float-quantized"


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes `(out, in)` of so many bits, from `-2^(bits-1)` on, as int32 words `(out, in · bits / 32)`."""
    unsigned = (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    if bits == 4:
        unsigned = unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)
    words: Tensor = unsigned.contiguous().view(torch.int32)
    return words


def unpack(words: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`, int8."""
    unsigned: Tensor = words.contiguous().view(torch.uint8)
    if bits == 4:
        unsigned = torch.stack((unsigned & 15, unsigned >> 4), dim=-1).flatten(-2)
    codes: Tensor = unsigned.to(torch.int16) - 2 ** (bits - 1)
    return codes.to(torch.int8)


def written(name: str, weight: Tensor, scale: Tensor, grid: Grid) -> Iterator[tuple[str, Tensor]]:
    """The tensors on disk of a weight on a grid.

    Args:
        name: of the weight on disk; it ends in `.weight`.
        weight: `(out, in)`, values `s q` in the dtype that they are read in.
        scale: `(out, groups)`, in the same dtype.
        grid: of the weight.
    """
    codes = grid.nearest(weight.float() / spread_scale(scale.float(), weight.shape[1]))
    if grid.kind == "int":
        yield f"{name}_packed", pack(codes, grid.bits)
        yield f"{name}_scale", scale.contiguous()
        yield f"{name}_shape", torch.tensor(weight.shape)
    else:
        yield name, (codes + 0.0).to(torch.float8_e4m3fn)  # -0.0 would be a value of its own to `llmprune pack`
        yield f"{name}_scale", scale.contiguous()


def written_bytes(shape: tuple[int, int], grid: Grid) -> int:
    """Bytes on disk of a weight `(out, in)` on a grid."""
    rows, width = shape
    shape_bytes = 16 if grid.kind == "int" else 0
    return rows * (width * grid.bits // 8 + grid.groups(width) * grid.scale_dtype.itemsize) + shape_bytes


def mismatch(shape: tuple[int, int], grid: Grid) -> str:
    """Why a weight `(out, in)` cannot be written on a grid, or '' if it can."""
    per_word = WORD // grid.bits
    if grid.kind == "int" and shape[1] % per_word:
        return f"{shape[1]} inputs are not divisible by {per_word}, the weights of a 32-bit word"
    return grid.mismatch(shape[1])


def config_of(grid: Grid, dense: Iterable[str]) -> dict[str, Any]:
    """What a config says of a model whose linear layers are on a grid.

    Args:
        grid: of the weights.
        dense: names of linear layers that are not.
    """
    weights = {
        "num_bits": grid.bits,
        "type": grid.kind,
        "symmetric": True,
        "strategy": "group" if grid.group else "channel",
        "group_size": grid.group or None,
        "dynamic": False,
    }
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format_of(grid),
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": sorted(set(dense)),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
