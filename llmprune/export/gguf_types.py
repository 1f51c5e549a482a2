"""Types of tensors in a GGUF file: which one a tensor gets, its bytes, and what they mean."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, LlamaFileType, dequantize, quantize
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quant_shape_to_byte_shape
from numpy.typing import NDArray
from torch import Tensor

from llmprune.errors import InputError
from llmprune.export import GGUF_TYPES

KINDS = {name: Kind[name.upper()] for name in GGUF_TYPES}
FILE_TYPES = {
    Kind.F32: LlamaFileType.ALL_F32, Kind.F16: LlamaFileType.MOSTLY_F16, Kind.BF16: LlamaFileType.MOSTLY_BF16,
    Kind.Q8_0: LlamaFileType.MOSTLY_Q8_0, Kind.Q4_0: LlamaFileType.MOSTLY_Q4_0,
}  # fmt: skip
LOSSLESS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_FLOATS = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
_SCALE = torch.finfo(torch.float16).max
"""The largest scale of a block."""
LARGEST = {kind: torch.finfo(dtype).max for kind, dtype in _FLOATS.items()}
LARGEST |= {Kind.Q8_0: 127 * _SCALE, Kind.Q4_0: 8 * _SCALE}
"""The largest weight of each type."""
PIECE = 2**22
"""Weights that are converted at a time."""
_TINY = 1e-30
"""Weights below it are 0 to any type of blocks; the inverse of so small a scale would not be finite."""


def kind_of(name: str, shape: tuple[int, ...], wanted: Kind) -> Kind:
    """The type of a tensor: what is wanted, but where llama.cpp or the shape asks for another.

    Vectors, norms and routers are float32, as llama.cpp expects. Embeddings and head keep 8 bits where 4 are wanted, as
    llama.cpp's own quantiser leaves them more. Rows that are no whole number of blocks are float16, as its converter
    does.

    Args:
        name: in GGUF.
        shape: `(..., out, in)`.
        wanted: of the file.
    """
    if len(shape) < 2 or "norm" in name or "ffn_gate_inp" in name:
        return Kind.F32
    if wanted == Kind.Q4_0 and name in ("token_embd.weight", "output.weight"):
        wanted = Kind.Q8_0
    return wanted if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else Kind.F16


def byte_shape(shape: tuple[int, ...], kind: Kind) -> tuple[int, ...]:
    """The shape of a tensor's bytes."""
    return tuple(quant_shape_to_byte_shape(shape, kind))


def encode(name: str, weight: Tensor, kind: Kind) -> NDArray[np.uint8]:
    """A tensor's bytes.

    Args:
        name: of the tensor, for errors.
        weight: float32, `(..., out, in)`.
        kind: its type.

    Raises:
        InputError: it holds NaN or Inf, or would in this type.
    """
    made = np.empty((prod(weight.shape[:-1]), byte_shape(weight.shape, kind)[-1]), np.uint8)
    for rows in pieces(weight.shape):
        made[rows] = _encoded(name, weight.reshape(-1, weight.shape[-1])[rows], kind)
    return made.reshape(-1)


def pieces(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows of a tensor that are computed with at a time."""
    rows = prod(shape[:-1])
    step = max(PIECE // max(shape[-1], 1), 1)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _encoded(name: str, weight: Tensor, kind: Kind) -> NDArray[np.uint8]:
    largest = float(torch.stack(torch.aminmax(weight)).abs().max())
    if not np.isfinite(largest):
        raise InputError(f"the weights of {name!r} hold NaN or Inf", "use an undamaged checkpoint")
    if largest > LARGEST[kind]:
        raise InputError(
            f"the weights of {name!r} reach {largest:,.0f}, the largest {kind.name.lower()} is {LARGEST[kind]:,.0f}",
            "choose another type, such as --type bf16",
        )
    if kind in _FLOATS:
        return weight.to(_FLOATS[kind]).contiguous().view(torch.uint8).numpy()
    quantized: NDArray[np.uint8] = quantize(torch.where(weight.abs() < _TINY, 0, weight).numpy(), kind)
    return quantized


def decode(data: NDArray[np.uint8], kind: Kind) -> Tensor:
    """What the bytes of some rows mean, float32, `(rows, in)`; from uint8, `(rows, bytes)`."""
    if kind in _FLOATS:
        return torch.from_numpy(data).view(_FLOATS[kind]).float()
    return torch.from_numpy(dequantize(data, kind))
