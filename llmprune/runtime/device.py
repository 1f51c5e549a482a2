"""The device that blocks run on."""

from __future__ import annotations

import torch

from llmprune.errors import InputError, first_line


def pick_device(name: str) -> torch.device:
    """The device that blocks run on; `auto` takes cuda, then cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error).partition(". ")[0]  # torch goes on to list all its backends
        raise InputError(f"--device {name!r} cannot be used: {reason}", "use --device auto or cpu") from error
    if device.type == "meta":
        raise InputError("--device meta holds no data", "use --device auto or cpu")
    try:
        torch.empty(1, device=device, dtype=torch.float64)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"--device {name!r} has no float64, which sums and checks need", "use --device cpu") from error
    return device
