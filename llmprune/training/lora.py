"""LoRA of sparse layers whose merge keeps the sparsity pattern."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from llmprune.errors import InputError
from llmprune.training.keep_zeros import sparse_layers


class MaskedLora(nn.Module):
    """A parametrization `W + α/r · (B A) ∘ (W ≠ 0)`: low-rank adaptation of the nonzero weights.

    LoRA (Hu et al. 2021) adds `α/r · B A`, which fills in the zeros when it is merged. Here the update is masked during
    training too, so that the merged model is the trained one.

    Args:
        weight: W, of any orientation; kept in the parametrization as `original`, without gradient.
        rank: r.
        alpha: α.
        generator: of the initial A, uniform in ±1/√columns; B starts at zero.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        initial = (2 * torch.rand(rank, columns, generator=generator) - 1) / math.sqrt(columns)
        self.a = nn.Parameter(initial.to(weight.device))
        self.b = nn.Parameter(torch.zeros(rows, rank, device=weight.device))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight."""
        update = (self.scale * (self.b @ self.a)).to(weight.dtype)
        return weight + update.masked_fill(weight == 0, 0)


def add_lora(
    model: nn.Module, only: Iterable[str] = ("*",), *, rank: int = 8, alpha: float = 16.0, seed: int = 0
) -> list[str]:
    """Freeze a model and put a `MaskedLora` on each of its sparse linear layers; train it with any trainer.

    Args:
        model: changed in place.
        only: globs over the names of the layers.
        rank: r.
        alpha: α; the update is scaled with α/r.
        seed: of the initial A.

    Returns:
        The names of the layers.

    Raises:
        InputError: no sparse layer matches.
    """
    layers = sparse_layers(model, only)
    if not layers:
        raise InputError(f"no sparse linear layer matches {', '.join(only)}", "use a pruned model, or other globs")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        parametrize.register_parametrization(layer, "weight", MaskedLora(weight, rank, alpha, generator))
    return list(layers)


def merge_lora(model: nn.Module) -> list[str]:
    """Merge the updates of `add_lora` into the weights; the model computes the same, and every zero is still zero.

    Returns:
        The names of the layers.
    """
    merged = []
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight") and isinstance(module.parametrizations.weight[0], MaskedLora):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
            merged.append(name)
    return merged
