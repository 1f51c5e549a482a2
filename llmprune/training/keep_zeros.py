"""Fine-tuning of a pruned model that keeps its sparsity pattern."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from llmprune.errors import InputError


def sparse_layers(model: nn.Module, only: Iterable[str] = ("*",), threshold: float = 0.05) -> dict[str, nn.Module]:
    """The linear layers of a model with more than `threshold` zero weights, by module name.

    Args:
        model: with its weights in memory.
        only: globs over module names.
        threshold: fraction of the weights; a dense layer may hold a zero by chance.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and any(fnmatchcase(name, glob) for glob in only)
        and float((module.weight == 0).float().mean()) > threshold
    }


class KeepZeros(TrainerCallback):  # type: ignore[misc]
    """A `transformers.Trainer` callback that keeps the zeros of pruned layers zero while all else is trained.

    `Trainer(..., callbacks=[KeepZeros()])`. Gradients of zeros are set to zero as soon as they are accumulated, before
    gradient clipping and the optimizer's moments, and after every step the zeros are masked again, whatever the
    optimizer did. The masks take one byte a weight. For one process with whole weights (no FSDP, no DeepSpeed ZeRO 3).

    Args:
        only: globs over the names of the layers; of these, every sparse one is masked.
        parameters: names of parameters to mask instead, of any kind and however few zeros they have, such as those that
            hold all experts of a block.
    """

    def __init__(self, only: Iterable[str] = ("*",), parameters: Collection[str] | None = None) -> None:
        self.only, self.parameters = tuple(only), parameters
        self.masks: dict[nn.Parameter, Tensor] = {}
        self._hooks: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the masks of all sparse layers.

        Raises:
            InputError: the model has none.
        """
        weights = self._weights(kwargs["model"])
        self.masks = {weight: weight.data == 0 for weight in weights}
        trained = [weight for weight in weights if weight.requires_grad]
        self._hooks = [weight.register_post_accumulate_grad_hook(self._drop) for weight in trained]  # type: ignore[no-untyped-call]

    def _weights(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters to mask."""
        if self.parameters is not None:
            return [model.get_parameter(name) for name in self.parameters]
        layers = sparse_layers(model, self.only)
        if not layers:
            raise InputError("no linear layer of this model has zeros to keep", "train a pruned model")
        return [layer.weight for layer in layers.values() if isinstance(layer.weight, nn.Parameter)]

    def _drop(self, weight: Tensor) -> None:
        assert isinstance(weight, nn.Parameter)
        if weight.grad is not None:
            weight.grad.masked_fill_(self.masks[weight], 0)

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mask the weights again."""
        for weight, zeros in self.masks.items():
            weight.masked_fill_(zeros, 0)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the hooks and drop the masks."""
        for hook in self._hooks:
            hook.remove()
        self.masks, self._hooks = {}, []
