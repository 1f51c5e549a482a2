"""Tiny random models in FP8 and MXFP4, as such checkpoints are stored, and what they mean, computed apart."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from commands import edit_config
from helpers import rewrite, save_tiny
from torch import Tensor

MATRICES = r"_proj(_with_mqa)?\.weight$|_[ab]_proj\.weight$"
LARGEST = 448.0
Quantise = Callable[[Tensor], tuple[Tensor, Tensor]]


def fp8(block: tuple[int, int]) -> Quantise:
    """Float8, and a scale for every block of a matrix; 0 stands for all rows or columns."""

    def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
        rows, width = weight.shape
        high, wide = block[0] or rows, block[1] or width
        scale = torch.empty(-(-rows // high), -(-width // wide))
        made = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                part = slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide)
                scale[i, j] = weight[part].abs().max() / LARGEST
                made[part] = (weight[part] / scale[i, j]).to(torch.float8_e4m3fn)
        return made, scale

    return quantise


def meant(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """The product of every element with the scale of its block, in float32, row by row."""
    rows, width = values.shape
    high, wide = block[0] or rows, block[1] or width
    scales = scales.float().reshape(-(-rows // high), -(-width // wide))
    columns = [j // wide for j in range(width)]
    return torch.stack([values[i].float() * scales[i // high, columns] for i in range(rows)])


def save_fp8(
    model_type: str,
    folder: Path,
    block: tuple[int, int] = (32, 32),
    *,
    suffix: str = "_scale_inv",
    shape: Callable[[Tensor], Tensor] = lambda scale: scale,
    settings: dict[str, Any] | None = None,
    matrices: str = MATRICES,
    **options: Any,
) -> Path:
    """A model whose matrices are float8.

    Args:
        model_type: of transformers.
        folder: where to.
        block: of the scales, see `fp8`.
        suffix: behind the name of a weight, of its scales.
        shape: of the scales as stored.
        settings: of its config.
        matrices: names of those that are float8.
        options: of `save_tiny`.
    """
    save_tiny(model_type, folder, dtype=torch.bfloat16, **options)

    def edit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        made = {}
        for name, tensor in tensors.items():
            if not re.search(matrices, name):
                made[name] = tensor
                continue
            made[name], scale = fp8(block)(tensor.float())
            made[f"{name}{suffix}"] = shape(scale).contiguous()
        return made

    rewrite(folder, edit)
    usual = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    edit_config(folder, quantization_config=settings or usual)
    return folder


def save_per_tensor(model_type: str, folder: Path, **options: Any) -> Path:
    """A model of transformers' FP8 without blocks: a scalar a matrix."""
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": None}
    return save_fp8(model_type, folder, (0, 0), shape=lambda scale: scale.view(()), settings=settings, **options)


def compressed(strategy: str, **weights: Any) -> dict[str, Any]:
    """The settings of compressed-tensors for float8 weights."""
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False, **weights}
    return {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}}, "ignore": ["lm_head"],
    }  # fmt: skip


def save_compressed(model_type: str, folder: Path, strategy: str, block: tuple[int, int], **options: Any) -> Path:
    """A model as llm-compressor stores it, with scales in bfloat16 and input scales beside."""
    extra = {"block": {"block_structure": list(block)}, "group": {"group_size": block[1]}}.get(strategy, {})
    save_fp8(
        model_type,
        folder,
        block,
        suffix="_scale",
        shape=lambda scale: scale.bfloat16().view(1) if strategy == "tensor" else scale.bfloat16(),
        settings=compressed(strategy, **extra),
        **options,
    )
    rewrite(
        folder,
        lambda tensors: (
            tensors
            | {
                name.removesuffix("weight_scale") + "input_scale": torch.ones(1)
                for name in tensors
                if name.endswith("weight_scale")
            }
            | {"model.layers.0.self_attn.k_scale": torch.ones(1)}
        ),
    )
    return folder


def save_mxfp4(folder: Path, **options: Any) -> Path:
    """A tiny gpt-oss whose experts are random bytes."""
    save_tiny("gpt_oss", folder, dtype=torch.bfloat16, **options)
    chance = torch.Generator().manual_seed(0)

    def edit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        made = {}
        for name, tensor in tensors.items():
            if not re.search(r"experts\.\w+_proj$", name):
                made[name] = tensor
                continue
            experts, inputs, outputs = tensor.shape
            size = (experts, outputs, inputs // 32, 16)
            made[f"{name}_blocks"] = torch.randint(0, 256, size, generator=chance, dtype=torch.uint8)
            made[f"{name}_scales"] = torch.randint(120, 124, size[:3], generator=chance, dtype=torch.uint8)
        return made

    rewrite(folder, edit)
    edit_config(
        folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    )
    return folder


def save_fp4_experts(folder: Path) -> Path:
    """A tiny DeepSeek-V4 whose experts are random bytes of two values each, and whose other matrices are float8."""
    exponents = {"shape": lambda scale: scale.log2().round().add(127).to(torch.uint8).view(torch.float8_e8m0fnu)}
    save_fp8("deepseek_v4", folder, suffix="_scale_inv", matrices=r"wq_[ab]\.weight$", **exponents)
    chance = torch.Generator().manual_seed(0)

    def edit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        made = {}
        for name, tensor in tensors.items():
            if not (expert := re.search(r"(.*experts\.\d+\.w\d\.)weight$", name)):
                made[name.replace("weight_scale_inv", "scale")] = tensor
                continue
            rows, width = tensor.shape
            made[name] = torch.randint(-128, 128, (rows, width // 2), generator=chance, dtype=torch.int8)
            scales = torch.randint(120, 124, (rows, width // 32), generator=chance, dtype=torch.uint8)
            made[f"{expert[1]}scale"] = scales.view(torch.float8_e8m0fnu)
        return made

    rewrite(folder, edit)
    settings = {"quant_method": "fp8", "weight_block_size": [32, 32], "scale_fmt": "ue8m0", "expert_dtype": "fp4"}
    edit_config(folder, quantization_config=settings)
    return folder


def unpacked(blocks: Tensor, scales: Tensor) -> Tensor:
    """What bytes of MXFP4 mean, number by number: `(experts, in, out)`, in float32."""

    def value(bits: int) -> float:
        exponent, fraction = bits >> 1 & 3, bits & 1
        size = (1 + fraction / 2) * 2.0 ** (exponent - 1) if exponent else fraction / 2
        return -size if bits & 8 else size

    experts, outputs, groups, _ = blocks.shape
    made = torch.empty(experts, 32 * groups, outputs)
    for e in range(experts):
        for row in range(outputs):
            numbers = []
            for bytes_, scale in zip(blocks[e, row].tolist(), scales[e, row].tolist(), strict=True):
                numbers += [value(bits) * 2.0 ** (scale - 127) for byte in bytes_ for bits in (byte & 15, byte >> 4)]
            made[e, :, row] = torch.tensor(numbers)
    return made


def settings_of(folder: Path) -> dict[str, Any]:
    """The config of a folder."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found
