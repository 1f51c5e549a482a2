"""2:4 layers on the sparse tensor cores of NVIDIA GPUs, for inference."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmprune.errors import first_line, printable
from llmprune.pruning.pattern import NM

PATTERN = NM(2, 4)
TOKENS = 64
TOLERANCE = 4.0
"""Allowed relative deviation of a layer's outputs, in units of its dtype's rounding error."""
AMPERE = (8, 0)


@dataclass(slots=True)
class Acceleration:
    """The result of `accelerate`.

    Args:
        switched: layers that now run on 2:4 kernels -> relative deviation of their outputs.
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
    """Switch the 2:4 layers of a model to `torch.sparse.to_sparse_semi_structured`, in place, where the GPU can.

    Every switched layer is tried on random inputs; one whose outputs deviate from the dense layer's by more than
    rounding keeps its dense weight. A switched model is for inference: it can be neither trained nor saved.

    Args:
        model: on the GPU, in float16 or bfloat16.
        seed: of the inputs.
    """
    done = Acceleration()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if reason := device_obstacle(module.weight.device) or weight_obstacle(module.weight):
            done.left[name] = reason
            continue
        try:
            deviation = switch(module, seed)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            done.left[name] = first_line(error)
            continue
        if deviation is None:
            done.left[name] = "its outputs would deviate by more than rounding"
        else:
            done.switched[name] = deviation
    return done


def device_obstacle(device: torch.device) -> str:
    """Why a device cannot run 2:4 kernels, or ''."""
    if device.type != "cuda":
        return f"{device.type} has no 2:4 kernels, NVIDIA GPUs since Ampere have"
    capability = torch.cuda.get_device_capability(device)
    if capability < AMPERE:
        return "this GPU has compute capability {}.{}, 2:4 kernels need {}.{}".format(*capability, *AMPERE)
    return ""


def weight_obstacle(weight: Tensor) -> str:
    """Why a weight does not suit 2:4 kernels, or ''; torch checks shape and dtype itself."""
    if type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}"
    rows, width = weight.shape
    if PATTERN.mismatch(rows, width) or PATTERN.check(weight.data).violations:
        return "not 2:4"
    return ""


def switch(layer: nn.Linear, seed: int) -> float | None:
    """Replace the weight of a layer by a semi-structured one; undone if its outputs deviate too much.

    Args:
        layer: with 2:4 weights.
        seed: of the inputs of the trial.

    Returns:
        the relative deviation of the outputs; None if it was too large.

    Raises:
        RuntimeError: torch's kernels do not take the weight; the layer is unchanged.
    """
    weight = layer.weight
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(TOKENS, layer.in_features, generator=generator).to(weight.device, weight.dtype)
    wanted = layer(inputs).float()
    try:
        layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(weight.data), requires_grad=False)
        deviation = float((layer(inputs).float() - wanted).norm() / wanted.norm().clamp(min=1e-30))
    except Exception:
        layer.weight = weight
        raise
    if not deviation <= TOLERANCE * torch.finfo(weight.dtype).eps:
        layer.weight = weight
        return None
    return deviation
