"""Every product with an expert's matrix is seen, whatever the layout, and what changes is written as it was stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import chosen, on_disk, parameter_of, random_tokens, reload, save_tiny, skeleton_of, tiny_model, weight_of
from torch import Tensor, nn
from torch.nn import functional

from llmprune.model.blocks import find_layers
from llmprune.model.expert_probe import probe_experts
from llmprune.model.experts import Layout, Product, WatchedParameter
from llmprune.model.hooks import hooked

E, OUT, IN = 3, 4, 6
PLAIN, TURNED = Layout(E, (OUT, IN), False), Layout(E, (OUT, IN), True)


def watched(*shape: int) -> tuple[WatchedParameter, list[Product]]:
    seen: list[Product] = []
    return WatchedParameter(torch.randn(*shape), tell=seen.append), seen


@pytest.mark.parametrize(
    ("shape", "layout", "product"),
    [
        ((E, OUT, IN), PLAIN, lambda x, w: functional.linear(x, w[1])),
        ((E, OUT, IN), PLAIN, lambda x, w: x @ w[torch.tensor(1)].T),
        ((E, OUT, IN), PLAIN, lambda x, w: x.matmul(w.unbind(0)[1].t())),
        ((E * OUT, IN), PLAIN, lambda x, w: x.mm(w.view(E, OUT, IN)[1].T)),
        ((E * OUT, IN), PLAIN, lambda x, w: functional.linear(x, w.chunk(E)[1])),
        ((E, IN, OUT), TURNED, lambda x, w: x @ w[1]),
        ((E * IN, OUT), TURNED, lambda x, w: torch.matmul(x, w.view(E, IN, OUT)[1])),
    ],
)
def test_a_product_with_a_slice_tells_which_one_and_where_its_inputs_lie(
    shape: tuple[int, ...], layout: Layout, product: object
) -> None:
    parameter, seen = watched(*shape)
    inputs = torch.randn(5, IN)
    matrix = parameter.data.clone().view(E, *((IN, OUT) if layout.transposed else (OUT, IN)))[1]
    result = product(inputs, parameter)  # type: ignore[operator]
    assert type(result) is Tensor
    assert torch.allclose(result, inputs @ (matrix if layout.transposed else matrix.T))
    assert [(one.layout, one.index) for one in seen] == [(layout, 1)]
    assert seen[0].inputs is inputs


def test_a_product_with_all_slices_tells_of_each_without_the_rows_of_others() -> None:
    parameter, seen = watched(E, IN, OUT)
    inputs = torch.randn(E, 5, IN)
    inputs[1, 2:] = inputs[2] = 0
    assert torch.equal(torch.bmm(inputs, parameter), torch.bmm(inputs, parameter.data.clone()))
    assert [(one.layout, one.index) for one in seen] == [(TURNED, 0), (TURNED, 1), (TURNED, 2)]
    assert [one.inputs.tolist() for one in seen] == [inputs[0].tolist(), inputs[1, :2].tolist(), []]


def test_a_product_uses_what_the_slice_holds_when_it_has_been_told_of() -> None:
    parameter = WatchedParameter(torch.ones(E, OUT, IN))
    part = parameter[1]
    parameter.tell = lambda product: parameter.data[product.index].zero_()
    assert torch.equal(functional.linear(torch.ones(2, IN), part), torch.zeros(2, OUT))
    # The same where the whole parameter has been exchanged.
    parameter.tell = lambda product: None
    parameter.data = torch.full((E, OUT, IN), 2.0)
    assert torch.equal(functional.linear(torch.ones(2, IN), part), torch.full((2, OUT), 2.0 * IN))


def test_what_is_no_slice_is_not_told_of() -> None:
    parameter, seen = watched(E, OUT, IN)
    functional.linear(torch.randn(2, IN), parameter[1, 1:3])
    functional.linear(torch.randn(2, IN), parameter[1].clone())
    functional.linear(torch.randn(2, IN - 2), parameter[1, :, :-2])
    assert not seen
    assert type(parameter[1] * 2) is Tensor


MIXTURES = ["mixtral", "gpt_oss", "deepseek_v3", "granitemoe", "llama4_text", "dbrx", "jetmoe", "nemotron_h"]


@pytest.mark.parametrize("model_type", MIXTURES)
def test_the_layers_of_experts_are_the_slices_that_transformers_uses(model_type: str, tmp_path: Path) -> None:
    skeleton = skeleton_of(save_tiny(model_type, tmp_path, tokenizer=False))
    probe_experts(skeleton)
    model = reload(tmp_path)
    for index in range(len(skeleton.blocks)):
        layers = find_layers(skeleton.blocks[index], skeleton.block_name(index), skeleton.config)
        found = {layer.name: layer for layer in layers if layer.expert}
        for name, layer in found.items():
            assert torch.equal(
                layer.weight_in(skeleton.checkpoint[layer.parameter].contiguous()), weight_of(model, name)
            )
            assert layer.parameter == parameter_of(model, name)
        whole = {layer.parameter: 0 for layer in found.values()}
        for layer in found.values():
            whole[layer.parameter] += layer.weights
        assert whole == {name: model.get_parameter(name).numel() for name in whole}


@pytest.mark.parametrize("model_type", [*MIXTURES, "olmoe", "qwen3_moe", "jamba"])
def test_new_values_are_stored_as_transformers_would_store_them(model_type: str, tmp_path: Path) -> None:
    skeleton = skeleton_of(save_tiny(model_type, tmp_path / "source", tokenizer=False))
    probe_experts(skeleton)
    model = tiny_model(model_type)
    wanted = {parameter_of(model, name) for name in chosen(skeleton)}
    assert all(skeleton.checkpoint.writable(name) for name in wanted)
    changed = {}
    for name in wanted:
        changed[name] = torch.randn(model.get_parameter(name).shape)
        model.get_parameter(name).data.copy_(changed[name])
    model.save_pretrained(tmp_path / "theirs")
    theirs = on_disk(tmp_path / "theirs")
    ours = dict(skeleton.checkpoint.export(list(skeleton.checkpoint), changed))
    assert ours.keys() == on_disk(tmp_path / "source").keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("model_type", ["mixtral", "llama4_text"])
def test_an_experts_matrix_is_hooked_like_a_linear_layer(model_type: str, tmp_path: Path) -> None:
    skeleton = skeleton_of(save_tiny(model_type, tmp_path, tokenizer=False))
    probe_experts(skeleton)
    names = [name for name in chosen(skeleton) if skeleton.model.get_submodule(name)._parameters == {}]
    rows = dict.fromkeys(names, 0)

    def count(name: str, inputs: Tensor) -> None:
        rows[name] += len(inputs)

    def note(name: str) -> object:
        module: nn.Module = skeleton.model.get_submodule(name)
        return module.register_forward_pre_hook(lambda _, args: count(name, args[0]))

    tokens = random_tokens(2)
    with skeleton.loaded(list(skeleton.checkpoint)), hooked(map(note, names)):  # type: ignore[arg-type]
        skeleton.model(input_ids=tokens, use_cache=False)
    active = skeleton.config.num_experts_per_tok
    assert sum(rows.values()) == 2 * active * tokens.numel() * len(skeleton.blocks)
