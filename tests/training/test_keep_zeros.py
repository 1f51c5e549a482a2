"""Training goes on, the loss falls, and what is zero stays zero."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from finetuning import Repeated, sparse_model, train, zeros
from helpers import tiny_model

from llmprune.errors import InputError
from llmprune.training.keep_zeros import KeepZeros, sparse_layers


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


def test_a_dense_model_has_no_zeros_to_keep() -> None:
    with pytest.raises(InputError, match="no linear layer"):
        KeepZeros().on_train_begin(None, None, None, model=tiny_model("llama"))
