"""Types of tensors in a GGUF file: which one a tensor gets, its bytes, and what they mean."""

from __future__ import annotations

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
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    if not np.isfinite(largest):
        raise InputError(f"the weights of {name!r} hold NaN or Inf", "use an undamaged checkpoint")
    if kind in _FLOATS:
        stored = weight.to(_FLOATS[kind])
        if not bool(torch.isfinite(stored).all()):
            raise InputError(
                f"the weights of {name!r} reach {largest:,.0f}, the largest {kind.name.lower()} is "
                f"{torch.finfo(_FLOATS[kind]).max:,.0f}",
                "choose another type, such as --type bf16",
            )
        return stored.contiguous().flatten().view(torch.uint8).numpy()
    scaled = torch.where(weight.abs() < _TINY, 0, weight).contiguous().numpy()
    return np.ascontiguousarray(quantize(scaled, kind)).reshape(-1)


def decode(data: NDArray[np.generic], kind: Kind, shape: tuple[int, ...]) -> Tensor:
    """What a tensor's bytes mean, float32, of a shape `(..., out, in)`."""
    raw = np.array(data).reshape(-1).view(np.uint8)
    if kind in _FLOATS:
        return torch.from_numpy(raw).view(_FLOATS[kind]).float().view(shape)
    return torch.from_numpy(dequantize(raw.reshape(byte_shape(shape, kind)), kind)).view(shape)
