"""Couplings are found in any family, permuting them changes no function, and nothing else is taken for one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import job, random_tokens, save_tiny, tiny_model, token_file, toy_block, whole_logits
from torch import Tensor, nn
from transformers import PreTrainedModel
from variants import toy_couplings

from llmprune import prune
from llmprune.errors import InputError
from llmprune.model.blocks import find_blocks, find_layers
from llmprune.streaming.batch import Call
from llmprune.structure.coupling import Coupling, Producer, permute
from llmprune.structure.find_couplings import OpaqueBlockError, find_couplings
from llmprune.structure.float64 import Float64

GQA, MHA, MQA = (2, 2, 16), (4, 1, 16), (1, 4, 16)
"""Classes, copies and free columns of the attention of the tiny models."""
Found = dict[str, tuple[tuple[int, int, int], dict[str, int]]]


def gated(width: int = 128) -> Found:
    return {"down_proj": ((1, 1, width), {"gate_proj": 1, "up_proj": 1})}


def attention(consumer: str, producer: str, shape: tuple[int, int, int]) -> Found:
    return {consumer: (shape, {producer: 1})}


def plain(consumer: str, producer: str, width: int) -> Found:
    return {consumer: ((1, 1, width), {producer: 1})}


LLAMA = attention("o_proj", "v_proj", GQA) | gated()
NEOX = attention("dense", "query_key_value", MHA)
LATENT = {
    "q_b_proj": ((1, 1, 16), {"q_a_proj": 1, "q_a_layernorm": 1}),
    "kv_b_proj": ((1, 1, 16), {"kv_a_proj_with_mqa": 1, "kv_a_layernorm": 1}),
    "o_proj": (MHA, {"kv_b_proj": 1}),
}
EXPECTED: dict[str, Found] = {
    **dict.fromkeys(
        ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "stablelm", "olmo", "olmo2", "cohere"],
        LLAMA,
    ),
    **dict.fromkeys(["granite", "smollm3", "exaone4"], LLAMA),
    "phi": attention("dense", "v_proj", GQA) | plain("fc2", "fc1", 128),
    "phi3": attention("o_proj", "qkv_proj", GQA) | {"down_proj": ((1, 1, 128), {"gate_up_proj": 2})},
    "glm4": attention("o_proj", "v_proj", GQA) | {"down_proj": ((1, 1, 128), {"gate_up_proj": 2})},
    "nemotron": attention("o_proj", "v_proj", GQA) | plain("down_proj", "up_proj", 128),
    "starcoder2": attention("o_proj", "v_proj", GQA) | plain("c_proj", "c_fc", 128),
    **dict.fromkeys(["opt", "xglm", "biogpt"], attention("out_proj", "v_proj", MHA) | plain("fc2", "fc1", 128)),
    "gpt2": attention("attn.c_proj", "c_attn", MHA) | plain("mlp.c_proj", "c_fc", 256),
    "gpt_neo": attention("out_proj", "v_proj", MHA) | plain("c_proj", "c_fc", 128),
    "gptj": attention("out_proj", "v_proj", MHA) | plain("fc_out", "fc_in", 256),
    "gpt_neox": NEOX | plain("dense_4h_to_h", "dense_h_to_4h", 128),
    "bloom": NEOX | plain("dense_4h_to_h", "dense_h_to_4h", 256),
    "falcon": attention("dense", "query_key_value", MQA) | plain("dense_4h_to_h", "dense_h_to_4h", 256),
    "falcon-new": attention("dense", "query_key_value", GQA) | plain("dense_4h_to_h", "dense_h_to_4h", 256),
    "mpt": attention("out_proj", "Wqkv", MHA) | plain("down_proj", "up_proj", 256),
    "bitnet": {
        "o_proj": (GQA, {"v_proj": 1, "attn_sub_norm": 2}),
        "down_proj": ((1, 1, 128), {"gate_proj": 1, "up_proj": 1, "ffn_sub_norm": 1}),
    },
    **dict.fromkeys(["mixtral", "qwen3_moe", "olmoe", "gpt_oss"], attention("o_proj", "v_proj", GQA)),
    "qwen2_moe": attention("o_proj", "v_proj", GQA) | gated(64),
    "deepseek_v3": LATENT | gated(32),
    "lfm2": attention("out_proj", "v_proj", GQA) | {"w2": ((1, 1, 256), {"w1": 1, "w3": 1})},
    "jamba": attention("o_proj", "v_proj", GQA),
    "mamba": {},
}
"""What the last block of a family holds: consumer -> classes, and rows per column of every producer."""
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon-new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
}


@dataclass(frozen=True)
class Case:
    """A tiny model, and the couplings of all its blocks by the blocks' names."""

    model: PreTrainedModel
    couplings: dict[str, list[Coupling]]


def call_of(model: nn.Module, block: nn.Module) -> tuple[Tensor, Call]:
    """What a block is called with."""
    calls: list[tuple[Tensor, Call]] = []
    handle = block.register_forward_pre_hook(lambda _, a, k: calls.append(Call.split(a, k)), with_kwargs=True)
    whole_logits(model, random_tokens(1, 8))
    handle.remove()
    return calls[0]


def couplings_of(model: PreTrainedModel, block: nn.Module, name: str = "") -> list[Coupling]:
    hidden, call = call_of(model, block)
    return find_couplings(
        block, lambda b, x: (call.run(b, x), call.args, call.kwargs), hidden, find_layers(block, name, model.config)
    )


def case_of(name: str, **options: Any) -> Case:
    model_type, extra = OPTIONS.get(name, (name, {}))
    model = tiny_model(model_type, **extra, **options)
    path, blocks = find_blocks(model)
    return Case(model, {f"{path}.{at}": couplings_of(model, block) for at, block in enumerate(blocks)})


@pytest.fixture(scope="module", params=EXPECTED)
def family(request: pytest.FixtureRequest) -> tuple[str, Case]:
    return request.param, case_of(request.param)


def shapes(coupling: Coupling) -> tuple[tuple[int, int, int], dict[str, int]]:
    """How many classes of which shape, and how many rows of each producer go with a column."""
    (shape,) = {tuple(slots.shape) for slots in coupling.classes}
    rows = {}
    for producer in coupling.producers:
        (rows[producer.local.rpartition(".")[2]],) = {len(matrix) for matrix in producer.rows}
        assert [matrix.shape[1] for matrix in producer.rows] == [slots.shape[1] for slots in coupling.classes]
    return (len(coupling.classes), *shape), rows


def random_order(coupling: Coupling, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(coupling.width)
    for slots in coupling.classes:
        order[slots] = slots[:, torch.randperm(slots.shape[1], generator=generator)]
    return order


def folded(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """The model's tensors with everything permuted that may be."""
    state = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    for block, couplings in case.couplings.items():
        for coupling in couplings:
            state |= permute(coupling, random_order(coupling, seed), state, f"{block}.")
    return state


def test_the_couplings_of_a_family_are_found(family: tuple[str, Case]) -> None:
    name, case = family
    found = {coupling.consumer: shapes(coupling) for coupling in list(case.couplings.values())[-1]}
    assert len(found) == len(EXPECTED[name])
    for consumer, expected in EXPECTED[name].items():
        (match,) = [local for local in found if local.endswith(consumer)]
        assert found[match] == expected


def test_inputs_and_rows_are_each_in_one_place(family: tuple[str, Case]) -> None:
    _, case = family
    for couplings in case.couplings.values():
        for coupling in couplings:
            slots = torch.cat([slots.flatten() for slots in coupling.classes])
            assert torch.equal(slots.sort().values, torch.arange(coupling.width))
            for producer in coupling.producers:
                rows = torch.cat([matrix.flatten() for matrix in producer.rows])
                assert len(rows.unique()) == len(rows)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_permuted_model_computes_the_same(family: tuple[str, Case], precision: str) -> None:
    name, case = family
    tokens, state = random_tokens(2, seed=4), folded(case)
    dense, permuted = model_with(name, case.model.state_dict()), model_with(name, state)
    if precision == "float32":
        before, after = whole_logits(dense, tokens), whole_logits(permuted, tokens)
    else:
        dense, permuted = dense.double(), permuted.double()
        with Float64():
            before, after = whole_logits(dense, tokens), whole_logits(permuted, tokens)
    assert float((after - before).norm() / before.norm()) <= {"float32": 1e-5, "float64": 1e-12}[precision]
    assert all(torch.equal(state[key], tensor) for key, tensor in case.model.state_dict().items()) != bool(
        EXPECTED[name]
    )


def model_with(name: str, state: dict[str, Tensor]) -> PreTrainedModel:
    model_type, extra = OPTIONS.get(name, (name, {}))
    model = tiny_model(model_type, **extra)
    # The grouped kernels for experts have no float64.
    model.config._experts_implementation = "eager"
    model.load_state_dict(state)
    return model


def test_a_permutation_moves_rows_and_columns_and_nothing_else(family: tuple[str, Case]) -> None:
    _, case = family
    before, after = case.model.state_dict(), folded(case)
    assert before.keys() == after.keys()
    layers = [
        (block, coupling.consumer, [producer.local for producer in coupling.producers])
        for block, couplings in case.couplings.items()
        for coupling in couplings
    ]
    reached = {f"{block}.{consumer}.weight" for block, consumer, _ in layers}
    reached |= {
        f"{block}.{s}.{kind}" for block, _, producers in layers for s in producers for kind in ("weight", "bias")
    }
    for name, tensor in before.items():
        assert after[name].shape == tensor.shape
        assert torch.equal(after[name].flatten().sort().values, tensor.flatten().sort().values)
        assert torch.equal(after[name], tensor) or name in reached


def test_rows_and_columns_by_hand_in_a_llama() -> None:
    case = case_of("llama")
    attention, mlp = case.couplings["model.layers.0"]
    assert (attention.consumer, mlp.consumer) == ("self_attn.o_proj", "mlp.down_proj")
    assert [slots.tolist() for slots in attention.classes] == [
        [list(range(16)), list(range(16, 32))],
        [list(range(32, 48)), list(range(48, 64))],
    ]
    assert [(s.local, [rows.tolist() for rows in s.rows]) for s in attention.producers] == [
        ("self_attn.v_proj", [[list(range(16))], [list(range(16, 32))]])
    ]
    assert all(rows.tolist() == [list(range(128))] for producer in mlp.producers for rows in producer.rows)
    state, prefix = case.model.state_dict(), "model.layers.0."
    order = random_order(attention)
    rows = torch.cat([order[:16], order[32:48] - 16])
    changed = permute(attention, order, state, prefix)
    assert changed.keys() == {f"{prefix}self_attn.{name}.weight" for name in ("o_proj", "v_proj")}
    assert torch.equal(changed[f"{prefix}self_attn.o_proj.weight"], state[f"{prefix}self_attn.o_proj.weight"][:, order])
    assert torch.equal(changed[f"{prefix}self_attn.v_proj.weight"], state[f"{prefix}self_attn.v_proj.weight"][rows])


def test_rows_by_hand_in_fused_layers() -> None:
    attention, mlp = next(iter(case_of("phi3").couplings.values()))
    assert [rows.tolist() for rows in attention.producers[0].rows] == [[list(range(96, 112))], [list(range(112, 128))]]
    assert mlp.producers[0].rows[0].tolist() == [list(range(128)), list(range(128, 256))]
    (heads,) = [c for c in next(iter(case_of("gpt_neox").couplings.values())) if c.consumer.endswith("attention.dense")]
    assert [rows.tolist() for rows in heads.producers[0].rows] == [
        [list(range(48 * head + 32, 48 * head + 48))] for head in range(4)
    ]


def test_conv1d_weights_are_permuted_the_other_way_round() -> None:
    case = case_of("gpt2")
    mlp = next(c for c in case.couplings["transformer.h.0"] if "mlp" in c.consumer)
    assert mlp.transposed
    assert mlp.producers[0].transposed
    state, order = case.model.state_dict(), random_order(mlp)
    changed = permute(mlp, order, state, "transformer.h.0.")
    for name, expected in (
        ("c_proj.weight", state["transformer.h.0.mlp.c_proj.weight"][order]),
        ("c_fc.weight", state["transformer.h.0.mlp.c_fc.weight"][:, order]),
        ("c_fc.bias", state["transformer.h.0.mlp.c_fc.bias"][order]),
    ):
        assert torch.equal(changed[f"transformer.h.0.mlp.{name}"], expected)
    assert len(changed) == 3


@pytest.mark.parametrize("name", ["llama", "gpt2", "bitnet"])
def test_weights_are_neither_needed_nor_changed(name: str) -> None:
    model = tiny_model(name)
    block = find_blocks(model)[1][0]
    hidden, call = call_of(model, block)
    layers = find_layers(block, "", model.config)
    before = {key: tensor.clone() for key, tensor in block.state_dict().items()}
    state = torch.get_rng_state()
    found = find_couplings(block, call.run, hidden, layers)
    assert all(torch.equal(tensor, before[key]) for key, tensor in block.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32
    again = find_couplings(block.to("meta"), call.run, torch.zeros(hidden.shape), layers)
    assert found
    assert list(map(flat, again)) == list(map(flat, found))


def flat(coupling: Coupling) -> object:
    producers = [
        (producer.local, producer.transposed, [rows.tolist() for rows in producer.rows])
        for producer in coupling.producers
    ]
    return coupling.consumer, coupling.transposed, [slots.tolist() for slots in coupling.classes], producers


BROKEN_ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "into another class": lambda order: order.roll(1),
    "copies apart": lambda order: torch.cat([order[:16].flip(0), order[16:]]),
    "copies exchanged": lambda order: order.view(2, 2, 16).flip(1).flatten(),
    "one twice": lambda order: order.where(order % 16 != 3, order - 1),
}


@pytest.mark.parametrize("change", BROKEN_ORDERS.values(), ids=BROKEN_ORDERS)
def test_an_order_that_breaks_the_classes_is_refused(change: Callable[[Tensor], Tensor]) -> None:
    slots = torch.arange(64).view(2, 2, 16)
    rows = torch.arange(32).view(2, 1, 16)
    coupling = Coupling("consumer", False, 64, tuple(slots), (Producer("producer", False, tuple(rows)),))
    tensors = {"consumer.weight": torch.rand(8, 64), "producer.weight": torch.rand(32, 8)}
    assert torch.equal(permute(coupling, torch.arange(64), tensors)["consumer.weight"], tensors["consumer.weight"])
    with pytest.raises(ValueError, match="class"):
        permute(coupling, change(torch.arange(64)), tensors)


def test_an_invented_block_is_understood() -> None:
    """Gate and up interleaved in one layer, the other way round; a norm whose scale must move along."""

    (coupling,) = toy_couplings("Odd")
    assert coupling.consumer == "down"
    (slots,) = coupling.classes
    assert slots.tolist() == [list(range(32))]
    fused, norm = coupling.producers
    assert fused.local == "fused"
    assert fused.rows[0].T.tolist() == [[62 - 2 * at, 63 - 2 * at] for at in range(32)]
    assert (norm.local, norm.rows[0].tolist()) == ("norm", [list(range(32))])


def test_a_scale_that_heads_share_couples_them() -> None:
    (coupling,) = [c for c in toy_couplings("SharedScale") if c.consumer == "o"]
    assert [tuple(slots.shape) for slots in coupling.classes] == [(4, 4)]
    rows = {producer.local: producer.rows[0].tolist() for producer in coupling.producers}
    assert rows == {"v": [[4 * head + at for at in range(4)] for head in range(4)], "norm": [[0, 1, 2, 3]]}


def test_inputs_without_a_row_of_their_own_are_not_permuted() -> None:
    (coupling,) = [c for c in toy_couplings("Half") if c.consumer == "down"]
    assert [slots.tolist() for slots in coupling.classes] == [[list(range(16, 32))]]


@pytest.mark.parametrize(
    "kind",
    ["Cumulated", "Reused", "ResidualGate", "Repeated", "TwoSinks", "Leaking", "Scaled", "Unlike", "Direct"],
)
def test_what_is_no_coupling_is_not_taken_for_one(kind: str) -> None:
    assert toy_couplings(kind) == []


def test_an_opaque_block_is_reported() -> None:
    with pytest.raises(OpaqueBlockError, match="no kernel"):
        toy_couplings("Broken")


@pytest.mark.parametrize("error", [RuntimeError("no kernel\nat all"), AssertionError(), ValueError("no kernel")])
def test_a_run_warns_of_blocks_whose_channels_are_not_permuted(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("llmprune.structure.find_couplings._found", fail)
    model, calib = save_tiny("llama", tmp_path / "m"), token_file(tmp_path / "calib.safetensors")
    report = prune(job(model, tmp_path / "out", calib))
    (warning,) = [text for text in report.warnings if "reordered" in text]
    assert type(error).__name__ in warning
    assert "\n" not in warning
    assert not any("permuted" in layer.stats for layer in report.layers)
    with pytest.raises(InputError, match=f"on its own in float64: {type(error).__name__}"):
        prune(job(model, tmp_path / "smaller", calib, "channels:25%"))


def test_a_want_of_memory_is_no_property_of_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("llmprune.structure.find_couplings._found", fail)
    with pytest.raises(torch.OutOfMemoryError):
        toy_couplings("Half")


class Mlp(nn.Module):
    """Parts of the blocks below."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)


@toy_block
class SharedScale(nn.Module):
    """Attention of four heads whose values have a norm of the head's width, the same for all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.RMSNorm(width // 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, self.norm(v), is_causal=True)
        return x + self.o(mixed.transpose(1, 2).flatten(2))


@toy_block
class Half(Mlp):
    """One half of the consumer's inputs are mixed sums, the other half are not."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.up(x).chunk(2, -1)
        return x + self.down(torch.cat([first.softmax(-1).cumsum(-1), second.relu()], -1))


@toy_block
class Cumulated(Mlp):
    """An activation that mixes channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu().cumsum(-1))


@toy_block
class Reused(Mlp):
    """The producer's output is used a second time."""

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        return x + self.down(up.relu()) + up[..., : x.shape[-1]]


@toy_block
class ResidualGate(Mlp):
    """The residual stream gates the channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu() * torch.cat([x, x], -1))


@toy_block
class Repeated(Mlp):
    """The producer is called twice."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu() * self.up(-x))


@toy_block
class TwoSinks(Mlp):
    """Two consumers have the same producers."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.other = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x).relu()
        return x + self.down(up) * self.other(up)


@toy_block
class Leaking(Mlp):
    """Hands the producer's output to later blocks."""

    def forward(self, x: Tensor, shared: dict[str, Tensor]) -> Tensor:
        shared["values"] = self.up(x)
        return x + self.down(shared["values"].relu())


@toy_block
class Scaled(Mlp):
    """A vector of its own, no norm's, scales the channels."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.scale = nn.Parameter(torch.ones(2 * width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu() * self.scale)


@toy_block
class Unlike(Mlp):
    """Half of the channels have another activation."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.up(x).chunk(2, -1)
        return x + self.down(torch.cat([first.relu(), second.tanh()], -1))


@toy_block
class Direct(Mlp):
    """The consumer reads the residual stream."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.cat([x, x.flip(-1)], -1)) * self.up(x).mean(-1, keepdim=True)


@toy_block
class Broken(Mlp):
    """Cannot run in float64."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise RuntimeError("no kernel")
        return x + self.down(self.up(x))
