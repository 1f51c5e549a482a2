"""Which layers run on the sparse tensor cores of NVIDIA GPUs, which know 2:4."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.pruning.pattern import NM

PATTERN = NM(2, 4)
AMPERE = (8, 0)


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
