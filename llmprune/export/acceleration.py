"""Linear layers of a model on kernels that make use of zeros or few bits, for inference."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmprune.errors import first_line, printable
from llmprune.export import semistructured
from llmprune.export.int4_kernels import Int4Linear, processor_obstacle, quantized_of

TOKENS = 64
TOLERANCE = 4.0
"""Allowed relative deviation of a layer's outputs, in units of its dtype's rounding error."""


@dataclass(slots=True)
class Acceleration:
    """The result of `accelerate`.

    Args:
        switched: layers that now run on such kernels -> relative deviation of their outputs.
        left: all other layers -> why.
    """

    switched: dict[str, float] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        reasons = defaultdict(list)
        for name, reason in self.left.items():
            reasons[reason].append(name)
        worst = f", outputs within {max(self.switched.values()):.1e}" if self.switched else ""
        lines = [f"switched {len(self.switched)} of {len(self.switched) + len(self.left)} linear layers{worst}"]
        lines += [
            f"left {len(names)}: {reason} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
            for reason, names in reasons.items()
        ]
        return "\n".join(map(printable, lines))


@torch.no_grad()
def accelerate(model: nn.Module, seed: int = 0) -> Acceleration:
    """Switch linear layers of a model, in place: on CPUs those in int4, on NVIDIA GPUs those that hold 2:4.

    In int4 are layers that transformers loaded from compressed-tensors, in bfloat16 (torch's int4 kernel); 2:4 layers
    go to `torch.sparse.to_sparse_semi_structured`. Every switched layer is tried on random inputs; one whose outputs
    deviate from the dense layer's by more than rounding is left as it was. A switched model is for inference: it can be
    neither trained nor saved.

    Args:
        model: on its device; on a GPU in float16 or bfloat16.
        seed: of the inputs.
    """
    done = Acceleration()
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        try:
            deviation = switch(model, name, module, seed)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            done.left[name] = first_line(error)
            continue
        if deviation is None:
            done.left[name] = "its outputs would deviate by more than rounding"
        else:
            done.switched[name] = deviation
    if done.switched and not any(hasattr(module, "weight_packed") for module in model.modules()):
        _end_decompression(model)
    return done


def switch(model: nn.Module, name: str, layer: nn.Linear, seed: int) -> float | None:
    """Put a layer on the kernel that suits it; undone if its outputs deviate too much.

    Args:
        model: with the layer.
        name: of the layer in it.
        layer: with 2:4 weights, or in int4.
        seed: of the inputs of the trial.

    Returns:
        the relative deviation of the outputs; None if it was too large.

    Raises:
        ValueError: no kernel suits it.
        RuntimeError: the kernel does not take it; the layer is unchanged.
    """
    device = next(chain(layer.parameters(), layer.buffers())).device
    if device.type == "cpu" and hasattr(layer, "weight_scale"):
        return _switch_int4(model, name, layer, seed)
    if reason := semistructured.device_obstacle(device):
        raise ValueError(reason)
    if hasattr(layer, "weight_packed"):
        raise ValueError("its weight is in codes: run the model once, which dequantises it")
    if reason := semistructured.weight_obstacle(layer.weight):
        raise ValueError(reason)
    weight, inputs = layer.weight, _inputs(layer, layer.weight, seed)
    wanted = layer(inputs)
    try:
        layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(weight.data), requires_grad=False)
        deviation = _deviation(layer(inputs), wanted)
    except Exception:
        layer.weight = weight
        raise
    if deviation is None:
        layer.weight = weight
    return deviation


def _switch_int4(model: nn.Module, name: str, layer: nn.Linear, seed: int) -> float | None:
    if reason := processor_obstacle():
        raise ValueError(reason)
    quantized = quantized_of(layer)
    other = Int4Linear(quantized, layer.bias)
    dense = quantized.dense()
    inputs = _inputs(layer, dense, seed)
    deviation = _deviation(other(inputs), functional.linear(inputs, dense, layer.bias))
    if deviation is not None:
        model.set_submodule(name, other.train(layer.training), strict=True)
    return deviation


def _inputs(layer: nn.Linear, weight: Tensor, seed: int) -> Tensor:
    """Random inputs of a layer, on the device and in the dtype of a weight."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, layer.in_features, generator=generator).to(weight.device, weight.dtype)


def _deviation(found: Tensor, wanted: Tensor) -> float | None:
    """The relative deviation of outputs; None where it is more than rounding."""
    deviation = float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-30))
    return deviation if deviation <= TOLERANCE * torch.finfo(wanted.dtype).eps else None


def _end_decompression(model: nn.Module) -> None:
    """Take off what transformers would dequantise all layers with at the first forward: there is none left."""
    for module in model.modules():
        if (hook := vars(module).pop("ct_decompress_hook", None)) is not None:
            hook.remove()
