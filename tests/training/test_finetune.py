"""Training goes on, the loss falls, and what is zero stays zero."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import reload, tiny_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from llmprune.errors import InputError
from llmprune.pruning.pattern import NM
from llmprune.training.finetune import KeepZeros, add_lora, merge_lora, sparse_layers


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


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd", "adafactor"])
def test_zeros_stay_zero_and_the_loss_falls(optimizer: str, tmp_path: Path) -> None:
    model = sparse_model()
    before, start = zeros(model), {name: value.clone() for name, value in model.named_parameters()}
    assert len(before) == 14
    callback = KeepZeros()
    first, last = train(model, tmp_path, callback, optimizer=optimizer)
    assert last < first
    assert all(torch.equal(mask, before[name]) for name, mask in zeros(model).items())
    changed = [name for name, value in model.named_parameters() if not torch.equal(value, start[name])]
    assert len(changed) == len(start)
    assert not callback.masks
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_without_the_callback_they_do_not(tmp_path: Path) -> None:
    model = sparse_model()
    train(model, tmp_path)
    assert not sparse_layers(model)


def test_what_an_optimizer_does_to_zeros_is_undone() -> None:
    model, callback = sparse_model(), KeepZeros()
    before = zeros(model)
    callback.on_train_begin(None, None, None, model=model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    callback.on_optimizer_step(None, None, None)
    assert all(torch.equal(mask, before[name]) for name, mask in zeros(model).items())


def test_gradients_of_zeros_never_reach_clipping() -> None:
    model, callback = sparse_model(), KeepZeros()
    callback.on_train_begin(None, None, None, model=model)
    rows = Repeated().rows
    model(input_ids=rows, labels=rows).loss.backward()
    for layer in sparse_layers(model).values():
        assert layer.weight.grad is not None
        assert not layer.weight.grad[layer.weight == 0].any()
        assert layer.weight.grad[layer.weight != 0].any()


def test_only_chosen_layers_are_watched() -> None:
    model, callback = sparse_model(), KeepZeros(only=("*.mlp.*",))
    callback.on_train_begin(None, None, None, model=model)
    assert len(callback.masks) == 6


@pytest.mark.parametrize("action", [add_lora, lambda model: KeepZeros().on_train_begin(0, 0, 0, model=model)])
def test_a_dense_model_is_refused(action: object) -> None:
    with pytest.raises(InputError):
        action(tiny_model("llama"))  # type: ignore[operator]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_masked_lora_starts_at_the_model_and_merges_exactly(family: str, tmp_path: Path) -> None:
    model = sparse_model(family)
    rows, before = Repeated().rows, zeros(model)
    with torch.no_grad():
        dense = model(input_ids=rows).logits
    names = add_lora(model, rank=4)
    assert names == list(before)
    with torch.no_grad():
        assert torch.equal(model(input_ids=rows).logits, dense)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(names)
    first, last = train(model, tmp_path / "run")
    assert last < first
    with torch.no_grad():
        wanted = model(input_ids=rows).logits
    assert not torch.equal(wanted, dense)
    assert merge_lora(model) == names
    with torch.no_grad():
        assert torch.equal(model(input_ids=rows).logits, wanted)
    assert all(torch.equal(mask, before[name]) for name, mask in zeros(model).items())
    model.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(reload(tmp_path / "merged")(input_ids=rows).logits, wanted)


def test_a_masked_lora_is_the_formula() -> None:
    model = sparse_model()
    names = add_lora(model, ("*.0.mlp.up_proj",), rank=3, alpha=6.0)
    assert names == ["model.layers.0.mlp.up_proj"]
    layer = model.get_submodule(names[0])
    lora = layer.parametrizations.weight[0]
    torch.nn.init.normal_(lora.b)
    original = layer.parametrizations.weight.original
    wanted = original + 2.0 * (lora.b @ lora.a) * (original != 0)
    assert torch.allclose(layer.weight, wanted)
