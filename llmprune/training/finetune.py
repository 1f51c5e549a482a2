"""Going on with training after pruning, without losing a zero."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from llmprune.errors import InputError


def sparse_layers(model: nn.Module, only: Iterable[str] = ("*",), share: float = 0.05) -> dict[str, nn.Module]:
    """The linear layers of a model whose weights are zero in more than `share` of all places, by module name.

    Args:
        model: with its weights in memory.
        only: globs over module names.
        share: fraction of the weights; a dense layer may hold a zero by chance.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and any(fnmatchcase(name, glob) for glob in only)
        and float((module.weight == 0).float().mean()) > share
    }


class KeepZeros(TrainerCallback):  # type: ignore[misc]
    """Keeps the zeros of pruned layers zero while a `transformers.Trainer` trains all else.

    `Trainer(..., callbacks=[KeepZeros()])`. Gradients of zeros are dropped as soon as they arrive, so that neither
    gradient clipping nor the optimizer's moments know them, and after every step the zeros are set again, whatever the
    optimizer did. The masks take one byte a weight. For one process with whole weights (no FSDP, no DeepSpeed ZeRO 3).

    Args:
        only: globs over the names of the layers to watch; all sparse ones are found by themselves.
    """

    def __init__(self, only: Iterable[str] = ("*",)) -> None:
        self.only = tuple(only)
        self.masks: dict[nn.Parameter, Tensor] = {}
        self._hooks: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember where the zeros are.

        Raises:
            InputError: the model has none.
        """
        layers = sparse_layers(kwargs["model"], self.only)
        if not layers:
            raise InputError("no linear layer of this model has zeros to keep", "train a pruned model")
        weights = [layer.weight for layer in layers.values() if isinstance(layer.weight, nn.Parameter)]
        self.masks = {weight: weight.data == 0 for weight in weights}
        trained = [weight for weight in weights if weight.requires_grad]
        self._hooks = [weight.register_post_accumulate_grad_hook(self._drop) for weight in trained]  # type: ignore[no-untyped-call]

    def _drop(self, weight: Tensor) -> None:
        assert isinstance(weight, nn.Parameter)
        if weight.grad is not None:
            weight.grad.masked_fill_(self.masks[weight], 0)

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the zeros again."""
        for weight, zeros in self.masks.items():
            weight.masked_fill_(zeros, 0)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the model."""
        for hook in self._hooks:
            hook.remove()
        self.masks, self._hooks = {}, []


class MaskedLora(nn.Module):
    """`W + α/r · (B A) ∘ (W ≠ 0)`: a low-rank change of the weights that are there.

    LoRA (Hu et al. 2021) adds `α/r · B A`, which fills every zero when it is merged. Here the change is masked while it
    is trained, so that what is trained is what is merged.

    Args:
        weight: W, of any orientation; kept in the parametrization as `original`, without gradient.
        rank: r.
        alpha: α.
        generator: of the start of A, uniform in ±1/√columns; B starts at zero.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        start = (2 * torch.rand(rank, columns, generator=generator) - 1) / math.sqrt(columns)
        self.a = nn.Parameter(start.to(weight.device))
        self.b = nn.Parameter(torch.zeros(rows, rank, device=weight.device))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight."""
        change = (self.scale * (self.b @ self.a)).to(weight.dtype)
        return weight + change.masked_fill(weight == 0, 0)


def add_lora(
    model: nn.Module, only: Iterable[str] = ("*",), *, rank: int = 8, alpha: float = 16.0, seed: int = 0
) -> list[str]:
    """Freeze a model and put a `MaskedLora` on each of its sparse linear layers; train it with any trainer.

    Args:
        model: changed in place.
        only: globs over the names of the layers.
        rank: r.
        alpha: α; the change is scaled with α/r.
        seed: of the start.

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
    """Put the changes of `add_lora` into the weights; the model computes the same, and every zero is still zero.

    Returns:
        The names of the layers.
    """
    merged = []
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight") and isinstance(module.parametrizations.weight[0], MaskedLora):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
            merged.append(name)
    return merged
