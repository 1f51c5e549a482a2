"""A tiny sparse model, and a short training of it."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers import tiny_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from llmprune.pruning.pattern import NM
from llmprune.training.keep_zeros import KeepZeros, sparse_layers


class Repeated(Dataset[dict[str, Tensor]]):
    """A few short rows that can be learnt by heart."""

    def __init__(self) -> None:
        self.rows = torch.randint(3, 96, (8, 12), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[at], "labels": self.rows[at]}


def sparse_model(family: str = "llama") -> PreTrainedModel:
    """A model whose block layers hold 2:4."""
    model = tiny_model(family)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name and "lm_head" not in name and "wte" not in name:
            parameter.data[~NM(2, 4).project(parameter.data.abs())] = 0
    return model


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.weight == 0 for name, layer in sparse_layers(model).items()}


def train(model: PreTrainedModel, folder: Path, *callbacks: KeepZeros, optimizer: str = "adamw_torch") -> list[float]:
    """Loss before, and after a few epochs with weight decay and clipping."""
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=30, learning_rate=5e-3, weight_decay=0.1, optim=optimizer, logging_steps=1,
        per_device_train_batch_size=8, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Repeated(), callbacks=list(callbacks))
    trainer.train()
    model.eval()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [losses[0], losses[-1]]
