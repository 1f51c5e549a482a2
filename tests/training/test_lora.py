"""A low-rank update of a sparse model is masked while it is trained, and merged exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from finetuning import Repeated, sparse_model, train, zeros
from helpers import reload, tiny_model

from llmprune.errors import InputError
from llmprune.training.lora import add_lora, merge_lora


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


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(InputError, match="no sparse linear layer"):
        add_lora(tiny_model("llama"))
