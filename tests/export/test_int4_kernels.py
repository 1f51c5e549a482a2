"""Layers in int4 run on torch's kernel with the codes of the file, and give what the dequantised model gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import job, random_tokens, save_tiny, token_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune import accelerate, load, pack, prune
from llmprune.export.int4_kernels import Int4Linear, Quantized, processor_obstacle, quantized_of
from llmprune.model.compressed_tensors import pack as words_of
from llmprune.pruning.grid import spread_scale

SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 96}
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is right on every processor; here it may be slow."""
    monkeypatch.setattr("llmprune.export.acceleration.processor_obstacle", lambda: "")


def quantized(rows: int, width: int, groups: int, seed: int = 0) -> Quantized:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, width), generator=generator, dtype=torch.int8)
    return Quantized(codes, (torch.rand(rows, groups, generator=generator) / 50 + 0.01).bfloat16())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("width", "groups"), [(64, 2), (64, 1), (128, 2), (256, 1), (512, 1), (96, 1)])
def test_the_kernel_multiplies_codes_and_scales(width: int, groups: int, bias: bool) -> None:
    weight = quantized(32, width, groups)
    added = torch.randn(32).bfloat16() if bias else None
    layer = Int4Linear(weight, added)
    exact = weight.codes.double() * spread_scale(weight.scales.double(), width)
    for shape in ((width,), (1, width), (3, 5, width)):
        inputs = torch.randn(shape).bfloat16()
        wanted = functional.linear(inputs.double(), exact, None if added is None else added.double())
        found = layer(inputs)
        assert (found.shape, found.dtype) == (wanted.shape, torch.bfloat16)
        assert float((found.double() - wanted).norm() / wanted.norm()) < 2**-7
    assert float((layer.weight.double() - exact).abs().max()) <= float(exact.abs().max()) * 2**-8


def loaded_layer(weight: Quantized, dequantised: bool) -> nn.Linear:
    """A linear layer as transformers holds one of compressed-tensors."""
    layer = nn.Linear(weight.codes.shape[1], len(weight.codes), bias=False, dtype=torch.bfloat16)
    layer.weight_scale = nn.Parameter(weight.scales, requires_grad=False)
    if dequantised:
        layer.weight.data = weight.dense()
    else:
        del layer.weight
        layer.weight_packed = nn.Parameter(words_of(weight.codes, 4), requires_grad=False)
    return layer


@pytest.mark.parametrize("dequantised", [False, True])
def test_codes_are_the_same_before_and_after_they_are_dequantised(dequantised: bool) -> None:
    weight = quantized(16, 64, 2)
    found = quantized_of(loaded_layer(weight, dequantised))
    assert torch.equal(found.codes, weight.codes)
    assert torch.equal(found.scales, weight.scales)


def test_what_the_kernel_does_not_take_is_left_and_told() -> None:
    weight = quantized(16, 64, 2)
    model = nn.ModuleDict({name: loaded_layer(weight, False) for name in ("good", "zeros", "single", "bits")})
    model["zeros"].weight_zero_point = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    model["single"].weight_scale.data = weight.scales.float()
    model["bits"].weight_packed.data = words_of(weight.codes, 8)
    model["moved"] = loaded_layer(weight, True)
    model["moved"].weight.data[0, 0] += 0.001
    model["narrow"] = loaded_layer(quantized(16, 48, 1), False)
    model["odd"] = loaded_layer(quantized(10, 64, 1), False)
    model["plain"] = nn.Linear(8, 8)
    before = dict(model.items())
    done = accelerate(model)
    assert done.switched.keys() == {"good"}
    wanted = {
        "zeros": "zero_point", "single": "load with dtype=bfloat16", "bits": "8 bits", "moved": "no product",
        "narrow": "48 inputs share", "odd": "16", "plain": "cpu has no 2:4 kernels",
    }  # fmt: skip
    assert done.left.keys() == wanted.keys()
    assert not {name for name, text in wanted.items() if text not in done.left[name]}
    assert all(model[name] is before[name] for name in wanted)
    assert "switched 1 of 8 linear layers" in str(done)


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Int4Linear, "_product", lambda self, inputs: 1.1 * functional.linear(inputs, layer_weight))
    layer_weight = quantized(16, 64, 2).dense()
    model = nn.ModuleDict({"layer": loaded_layer(quantized(16, 64, 2), False)})
    assert "deviate" in accelerate(model).left["layer"]
    assert type(model["layer"]) is nn.Linear


def test_processors_without_wide_registers_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, can in (("AVX2", True), ("AVX512", True), ("DEFAULT", False)):
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda found=found: found)
        assert (processor_obstacle() == "") == can
    monkeypatch.setattr("llmprune.export.acceleration.processor_obstacle", processor_obstacle)
    model = nn.ModuleDict({"layer": loaded_layer(quantized(16, 64, 2), False)})
    assert "torch found DEFAULT" in accelerate(model).left["layer"]


@pytest.fixture(scope="module", params=["int4:g32", "int4:channel"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on a grid."""
    place = tmp_path_factory.mktemp("model")
    model, calib = save_tiny("llama", place / "dense", **SIZES), token_file(place / "tokens.safetensors")
    options = {"method": "magnitude", "quantize": request.param, "skip": ("*1*down_proj",)}
    prune(job(model, place / "pruned", calib, "2:4", **options))
    return place / "pruned"


def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits.double()


@pytest.mark.parametrize("first", ["switched", "run"])
def test_a_model_gives_the_logits_of_the_dequantised_one(folder: Path, first: str) -> None:
    ids = random_tokens(2, 12)
    model, stock = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16) for _ in range(2))
    wanted = logits_of(stock, ids)
    if first == "run":
        model(ids)
    done = accelerate(model)
    assert len(done.switched) == 13
    assert {name.rpartition(".")[2] for name in done.left} == {"down_proj", "lm_head"}
    for name in NAMES[:-1]:
        assert type(model.get_submodule(next(one for one in done.switched if one.endswith(name)))) is Int4Linear
    assert float((logits_of(model, ids) - wanted).norm() / wanted.norm()) < 0.02
    assert not hasattr(model, "ct_decompress_hook")
    exact = load(folder, dtype=torch.float32)
    assert torch.equal(model.generate(ids[:, :4], max_new_tokens=2, do_sample=False)[:, :4], ids[:, :4])
    assert float((logits_of(exact, ids) - wanted).norm() / wanted.norm()) < 0.05


def test_layers_that_are_left_are_dequantised_as_ever(folder: Path) -> None:
    ids = random_tokens(2, 12)
    model, stock = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16) for _ in range(2))
    assert len(accelerate(model.model.layers[0]).switched) == 7
    wanted, found = logits_of(stock, ids), logits_of(model, ids)
    assert float((found - wanted).norm() / wanted.norm()) < 0.02
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, stock.model.layers[1].mlp.up_proj.weight)
    assert len(accelerate(model).switched) == 6
    assert float((logits_of(model, ids) - wanted).norm() / wanted.norm()) < 0.02


def test_a_packed_folder_is_accelerated_as_the_plain_one(folder: Path, tmp_path: Path) -> None:
    ids = random_tokens(2, 12)
    models = [load(one, dtype=torch.bfloat16) for one in (folder, Path(pack(folder, tmp_path / "packed").out))]
    assert [len(accelerate(model).switched) for model in models] == [13, 13]
    assert torch.equal(*(logits_of(model, ids) for model in models))


def test_a_model_in_float32_is_left_as_it_was(folder: Path) -> None:
    ids = random_tokens(2, 12)
    model, stock = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    done = accelerate(model)
    assert not done.switched
    assert "load with dtype=bfloat16" in str(done)
    assert torch.equal(logits_of(model, ids), logits_of(stock, ids))
