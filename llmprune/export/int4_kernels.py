"""Layers in int4 on torch's int4 kernel for CPUs, for inference: the codes are multiplied as they are, in bfloat16."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmprune.model.compressed_tensors import WORD, unpack
from llmprune.pruning.grid import spread_scale

BITS = 4
GROUPS = (256, 128, 64, 32)
"""Numbers of inputs that may share a scale."""
INNER_TILES = 2
"""Of the packed codes; torch's kernel for CPUs knows one layout and does not look at it."""


def processor_obstacle() -> str:
    """Why this processor is slow with the kernel, or ''."""
    found = torch.backends.cpu.get_cpu_capability()
    return "" if found.startswith("AVX") else f"the int4 kernel needs AVX2 or AVX-512 to be fast, torch found {found}"


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight `w = s q` of a linear layer.

    Args:
        codes: q, int8, `(out, in)`, -8 to 7.
        scales: s, bfloat16, `(out, groups)`.
    """

    codes: Tensor
    scales: Tensor

    def dense(self) -> Tensor:
        """The weight in bfloat16, `(out, in)`, rounded once."""
        return (self.codes * spread_scale(self.scales.float(), self.codes.shape[1])).to(self.scales.dtype)


class Int4Linear(nn.Module):
    """A linear layer on the kernel.

    Args:
        weight: its weight.
        bias: `(out,)`, or None.

    Raises:
        ValueError: inputs that share a scale are no multiple of a group of the kernel.
        RuntimeError: torch's kernel does not take the weight.
    """

    def __init__(self, weight: Quantized, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        sharing = self.in_features // weight.scales.shape[1]
        self.group = next((size for size in GROUPS if sharing % size == 0), 0)
        if not self.group:
            raise ValueError(f"{sharing} inputs share a scale, the kernel has groups of {', '.join(map(str, GROUPS))}")
        scales = weight.scales.repeat_interleave(sharing // self.group, dim=1).T
        # The kernel computes s (u - 8) + z of unsigned codes u.
        unsigned = weight.codes.to(torch.int32) + 8
        self.codes = nn.Buffer(torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, INNER_TILES))
        self.scales = nn.Buffer(torch.stack((scales, torch.zeros_like(scales)), dim=-1).contiguous())
        self.bias = bias

    def _product(self, inputs: Tensor) -> Tensor:
        """`x Wᵀ` of `(tokens, in)`."""
        made: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(inputs, self.codes, self.group, self.scales)
        return made

    def forward(self, inputs: Tensor) -> Tensor:
        """`x Wᵀ + b`, `(..., out)`."""
        found = self._product(inputs.reshape(-1, self.in_features)).view(*inputs.shape[:-1], self.out_features)
        return found if self.bias is None else found + self.bias

    @property
    def weight(self) -> Tensor:
        """The weight, `(out, in)`, for models that look at it; made by every call."""
        return self._product(torch.eye(self.in_features, dtype=self.scales.dtype)).T

    def extra_repr(self) -> str:
        """Its sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, group={self.group}"


def quantized_of(layer: nn.Linear) -> Quantized:
    """The codes and scales of a layer that transformers loaded from compressed-tensors, dequantised or not yet.

    Raises:
        ValueError: why it has none that the kernel takes.
    """
    scales = getattr(layer, "weight_scale", None)
    if not isinstance(scales, Tensor):
        raise ValueError("it has no scales")
    if other := next((one for one in ("zero_point", "g_idx") if hasattr(layer, f"weight_{one}")), ""):
        raise ValueError(f"its codes have a {other} each group or input")
    if scales.dtype != torch.bfloat16:
        kind = str(scales.dtype).removeprefix("torch.")
        raise ValueError(f"the int4 kernel is fast in bfloat16 only, its scales are {kind}: load with dtype=bfloat16")
    words = getattr(layer, "weight_packed", None)
    codes = _codes(layer.weight, scales) if words is None else _unpacked(words, layer.in_features)
    return Quantized(codes, scales.detach())


def _unpacked(words: Tensor, width: int) -> Tensor:
    """Codes `(out, in)` from words."""
    if (bits := words.shape[1] * WORD // width) != BITS:
        raise ValueError(f"its codes have {bits} bits, the kernel takes {BITS}")
    return unpack(words.detach(), BITS)


def _codes(weight: Tensor, scales: Tensor) -> Tensor:
    """Codes `(out, in)` of a dequantised weight, which they give again to the last bit."""
    if weight.dtype != scales.dtype or weight.shape[1] % scales.shape[1]:
        raise ValueError(f"its weight is {weight.dtype}, its scales are {scales.dtype}")
    codes = (weight.detach().float() / spread_scale(scales.float(), weight.shape[1])).round()
    if bool((codes.abs() > 8).any()) or bool((codes == 8).any()):
        raise ValueError(f"its codes have more than {BITS} bits")
    found = codes.to(torch.int8)
    if not torch.equal(Quantized(found, scales).dense(), weight):
        raise ValueError("its weight is no product of codes and scales")
    return found
