"""2:4 layers are switched where the kernels can do them, checked, and all else is left as it was and named.

There is no GPU here: the kernels are played by a stand-in, the checks around them are real.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from llmprune import accelerate
from llmprune.export.semistructured import device_obstacle
from llmprune.pruning.pattern import NM


class Small(nn.Module):
    """A 2:4 layer with bias, one without, a dense one and an odd one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(32, 16), nn.Linear(16, 8, bias=False)
        self.dense, self.odd = nn.Linear(16, 8), nn.Linear(6, 8)
        for layer in (self.first, self.second):
            layer.weight.data[~NM(2, 4).project(layer.weight.data.abs())] = 0


@pytest.fixture
def switched(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """A GPU that can; the weights that were given to its kernels."""
    seen: list[Tensor] = []

    def stand_in(weight: Tensor) -> Tensor:
        seen.append(weight)
        return weight.clone()

    monkeypatch.setattr("llmprune.export.semistructured.device_obstacle", lambda device: "")
    monkeypatch.setattr("torch.sparse.to_sparse_semi_structured", stand_in)
    return seen


def test_on_a_cpu_nothing_is_switched_and_it_says_why() -> None:
    model = Small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = accelerate(model)
    assert not done.switched
    assert done.left.keys() == {"first", "second", "dense", "odd"}
    assert "switched 0 of 4 linear layers" in str(done)
    assert re.search(r"left 4: cpu has no 2:4 kernels.*\(first, second, \.\.\.\)", str(done))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_names_of_layers_are_shown_escaped() -> None:
    model = nn.Module()
    model.add_module("a\x1b[2J\nswitched 9", nn.Linear(4, 4))
    said = str(accelerate(model)).split("\n")
    assert len(said) == 2
    assert all(line.isprintable() for line in said)


@pytest.mark.parametrize(
    ("capability", "can"), [((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((12, 0), True)]
)
def test_gpus_since_ampere_can(capability: tuple[int, int], can: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    obstacle = device_obstacle(torch.device("cuda:0"))
    assert (obstacle == "") == can
    assert can or "7.5" in obstacle


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_2_4_layers_are_switched_and_no_others(dtype: torch.dtype, switched: list[Tensor]) -> None:
    model = Small().to(dtype)
    done = accelerate(model)
    assert done.switched == {"first": 0.0, "second": 0.0}
    assert done.left == {"dense": "not 2:4", "odd": "not 2:4"}
    assert [tuple(weight.shape) for weight in switched] == [(16, 32), (8, 16)]
    assert not model.first.weight.requires_grad
    assert model.dense.weight.requires_grad
    assert "switched 2 of 4 linear layers, outputs within 0.0e+00" in str(done)


def test_what_torch_refuses_is_left_with_its_reason(switched: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(weight: Tensor) -> Tensor:
        raise RuntimeError(f"shape {tuple(weight.shape)} is not supported!\nmore")

    monkeypatch.setattr("torch.sparse.to_sparse_semi_structured", refuse)
    model = Small().bfloat16()
    weight = model.first.weight
    done = accelerate(model)
    assert not done.switched
    assert done.left["first"] == "shape (16, 32) is not supported!"
    assert model.first.weight is weight


@pytest.mark.parametrize("wrong", [lambda w: w * 1.1, lambda w: w * torch.nan, torch.zeros_like])
def test_a_layer_whose_outputs_deviate_gets_its_weight_back(
    wrong: object, switched: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.sparse.to_sparse_semi_structured", wrong)
    model = Small().bfloat16()
    weight = model.first.weight
    done = accelerate(model)
    assert not done.switched
    assert "deviate" in done.left["first"]
    assert model.first.weight is weight


def test_an_error_in_the_kernel_itself_leaves_the_layer_as_it_was(
    switched: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.sparse.to_sparse_semi_structured", lambda weight: weight[:, :3])
    model = Small().bfloat16()
    weight = model.first.weight
    assert "first" in accelerate(model).left
    assert model.first.weight is weight


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_that_can_the_model_computes_the_same() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(256, 128).to("cuda", torch.bfloat16)
    layer.weight.data[~NM(2, 4).project(layer.weight.data.float().abs())] = 0
    if device_obstacle(layer.weight.device):
        pytest.skip("needs a GPU since Ampere")
    model, inputs = nn.Sequential(layer), torch.randn(5, 256, device="cuda", dtype=torch.bfloat16)
    wanted = model(inputs)
    assert accelerate(model).switched.keys() == {"0"}
    assert torch.allclose(model(inputs), wanted, rtol=0.02, atol=0.02)
