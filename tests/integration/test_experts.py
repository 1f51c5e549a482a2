"""A mixture of experts is pruned as the dense network that it is made of."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from helpers import (
    ROOT,
    chosen,
    job,
    on_disk,
    parameter_of,
    random_tokens,
    reload,
    rewrite,
    save_tiny,
    skeleton_of,
    stream_through,
    tiny_config,
    token_file,
    toy_block,
    weight_of,
    whole_logits,
)
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from llmprune import PruneReport, prune
from llmprune.pruning.methods import load_method
from llmprune.pruning.pattern import NM
from llmprune.pruning.problem import LayerSolution
from llmprune.streaming.perplexity import perplexity
from llmprune.streaming.schedule import Group

EXPERTS, HIDDEN, INNER = 4, 16, 32
STORIES = ROOT.parent / "shared" / "models" / "stories-moe"


@toy_block
class Whole(nn.Module):
    """A dense MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.silu(self.gate(x)) * self.up(x))


class _Cut(nn.Module):
    """The same cut into experts, to which every token is sent with the same weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = self.make(width)

    @staticmethod
    def make(width: int) -> nn.Module:
        config = tiny_config(
            "mixtral", hidden_size=width, intermediate_size=INNER // EXPERTS, num_local_experts=EXPERTS
        )
        return MixtralExperts(config)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        index = torch.arange(EXPERTS).expand(len(rows), -1)
        return x + self.experts(rows, index, torch.ones(len(rows), EXPERTS)).view_as(x)


@toy_block
class Concatenated(_Cut):
    """Gate and up one behind the other, inputs last."""


@toy_block
class Alternating(_Cut):
    """Gate and up alternate, inputs first."""

    @staticmethod
    def make(width: int) -> nn.Module:
        config = tiny_config(
            "gpt_oss", hidden_size=width, intermediate_size=INNER // EXPERTS, num_local_experts=EXPERTS
        )
        return GptOssExperts(config)


@toy_block
class Sorted(_Cut):
    """All experts in one product, inputs first, nothing said of the layout."""

    @staticmethod
    def make(width: int) -> nn.Module:
        config = tiny_config(
            "llama4_text", hidden_size=width, intermediate_size=INNER // EXPERTS, num_local_experts=EXPERTS
        )
        return Llama4TextExperts(config)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        return x + self.experts(rows.repeat(EXPERTS, 1)).view(EXPERTS, *x.shape).sum(0)


def halves(kind: str, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up of an expert from its rows `(2 inner, hidden)`."""
    if kind == "Alternating":
        return gate_up[::2], gate_up[1::2]
    return gate_up.tensor_split(2)[0], gate_up.tensor_split(2)[1]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense MLP, and its three cuts."""
    work = tmp_path_factory.mktemp("oracle")
    dense = on_disk(save_tiny("toy", work / "Whole", kind="Whole", hidden_size=HIDDEN))
    for kind in ("Concatenated", "Alternating", "Sorted"):
        folder = save_tiny("toy", work / kind, kind=kind, hidden_size=HIDDEN)
        values = {name: dense[name] for name in dense.keys() & on_disk(folder).keys()}
        for block in range(2):
            gate, up, down = (dense[f"layers.{block}.{name}.weight"] for name in ("gate", "up", "down"))
            pairs = zip(gate.tensor_split(EXPERTS), up.tensor_split(EXPERTS), strict=True)
            alternate = kind == "Alternating"
            gate_up = torch.stack([torch.stack(p, 1).flatten(0, 1) if alternate else torch.cat(p) for p in pairs])
            matrices = {"gate_up_proj": gate_up, "down_proj": torch.stack(down.tensor_split(EXPERTS, 1))}
            for name, value in matrices.items():
                values[f"layers.{block}.experts.{name}"] = value if kind == "Concatenated" else value.mT
            if alternate:
                values |= {f"layers.{block}.experts.gate_up_proj_bias": torch.zeros(EXPERTS, len(gate_up[0]))}
                values |= {f"layers.{block}.experts.down_proj_bias": torch.zeros(EXPERTS, HIDDEN)}
        new = {name: value.contiguous() for name, value in values.items()}
        rewrite(folder, lambda tensors, new=new: {**tensors, **new})
    return work


def test_the_cut_network_computes_the_same(oracle: Path) -> None:
    tokens = random_tokens()
    whole = whole_logits(reload(oracle / "Whole"), tokens)
    for kind in ("Concatenated", "Sorted"):  # the third has another activation
        assert torch.allclose(whole_logits(reload(oracle / kind), tokens), whole, atol=1e-5)


@pytest.mark.parametrize("options", [{"method": "wanda"}, {"method": "sparsegpt"}, {"effort": "balanced"}], ids=str)
@pytest.mark.parametrize("kind", ["Concatenated", "Alternating", "Sorted"])
def test_experts_that_get_all_tokens_are_pruned_as_the_dense_network(
    kind: str, options: dict[str, Any], oracle: Path, tmp_path: Path
) -> None:
    """Gate and up of all experts are the dense network's: to the bit where no product of matrices is taken.

    Products of other heights are summed in another order, which moves the last bits of SparseGPT and ADMM.
    """
    calib = token_file(tmp_path / "tokens.safetensors")
    models = {}
    for source in ("Whole", kind):
        prune(job(oracle / source, tmp_path / source, calib, only=("*gate*", "*up*"), **options))
        models[source] = reload(tmp_path / source)
    dense = on_disk(tmp_path / "Whole")
    names = [f"layers.0.experts.{e}.gate_up_proj" for e in range(EXPERTS)]
    experts = [halves(kind, slice_of(models[kind], name, turned=kind != "Concatenated")) for name in names]
    for at, name in enumerate(("gate", "up")):
        found, expected = torch.cat([pair[at] for pair in experts]), dense[f"layers.0.{name}.weight"]
        assert NM(2, 4).check(found).violations == 0
        if options == {"method": "wanda"}:
            assert torch.equal(found, expected)
        else:
            assert torch.allclose(found, expected, atol=1e-4)


def slice_of(model: nn.Module, layer: str, turned: bool) -> Tensor:
    matrix = model.get_parameter(parameter_of(model, layer)).data[int(layer.split(".")[-2])]
    return matrix.T if turned else matrix


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("memory", [2**30, 0], ids=["pausing", "repeating"])
def test_an_expert_is_fitted_to_the_dense_model_on_the_tokens_routed_to_it(
    model_type: str, memory: int, tmp_path: Path
) -> None:
    """Cross statistics pair an expert's tokens with the same tokens in the dense model, routed there or not."""
    save_tiny(model_type, tmp_path, tokenizer=False)
    tokens, skeleton = random_tokens(), skeleton_of(tmp_path)
    dense, pruned = reload(tmp_path), reload(tmp_path)
    stream = stream_through(skeleton, tokens, chosen=chosen(skeleton), block_memory=memory, dense_stream=True)
    checked = 0
    for block in stream:
        for group in stream.groups(block):
            (ref, *_), stats = group.refs, group.problem.stats
            if ref.expert:
                (X, index), (D, _) = (entered(model, ref.name, tokens) for model in (pruned, dense))
                if index is not None:
                    mine = (index == ref.expert.index).any(1)
                    X, D = X[mine], D[mine]
                if ref.local.endswith("down_proj"):
                    X, D = (inner(model, ref.name, rows) for model, rows in ((pruned, X), (dense, D)))
                assert stats.tokens == len(X)
                if len(X):
                    assert stats.cross is not None
                    assert torch.allclose(stats.gram, X.T @ X / len(X), rtol=1e-3, atol=1e-5)
                    assert torch.allclose(stats.cross, X.T @ D / len(X), rtol=1e-3, atol=1e-5)
                    checked += not torch.allclose(X, D, rtol=1e-2)
            solutions = magnitude(group)
            group.write(solutions, None)
            for one in group.refs:
                name = parameter_of(pruned, one.name)
                pruned.get_parameter(name).data.copy_(block.changed[name])
    assert checked > 8


def magnitude(group: Group) -> list[LayerSolution]:
    return load_method("magnitude").solve(group.problem, NM(2, 4))


@torch.no_grad()
def entered(model: Any, layer: str, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens and their routing, as they enter the module of an expert."""
    seen: list[tuple[Tensor, Tensor]] = []
    owner = model.get_submodule(".".join(layer.split(".")[:-2]))
    handle = owner.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[1])))
    whole_logits(model, tokens)
    handle.remove()
    return torch.cat([hidden for hidden, _ in seen]), torch.cat([index for _, index in seen])


@torch.no_grad()
def inner(model: Any, layer: str, rows: Tensor) -> Tensor:
    """The inputs of an expert's last matrix."""
    owner, index = model.get_submodule(".".join(layer.split(".")[:-2])), int(layer.split(".")[-2])
    gate_up = rows @ weight_of(model, layer.replace("down_proj", "gate_up_proj")).T
    if owner.has_bias:
        gate_up = gate_up + owner.gate_up_proj_bias[index]
    return owner._apply_gate(gate_up)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "nemotron_h"])
def test_permuted_experts_compute_the_same(model_type: str, tmp_path: Path) -> None:
    """The rows of gate and up move with the inputs of down, and with their biases; no weight that is kept changes."""
    source, calib = save_tiny(model_type, tmp_path / "source"), token_file(tmp_path / "tokens.safetensors")
    reports, models = {}, {}
    for permute in (False, True):
        out = tmp_path / f"{permute}"
        reports[permute] = prune(job(source, out, calib, method="magnitude", permute=permute))
        models[permute] = reload(out)
    moved = [layer.name for layer in reports[True].layers if layer.stats.get("permuted") and ".experts." in layer.name]
    assert moved
    dense = reload(source)
    for name in moved:
        first = name.replace("down_proj", "up_proj" if model_type == "nemotron_h" else "gate_up_proj")
        width, step = weight_of(dense, name).shape[1], 2 if model_type == "gpt_oss" else 1
        old, new = (weight_of(models[permute], first)[::step][:width] for permute in (False, True))
        order = (new[:, None] == old).all(-1).long().argmax(1)
        assert sorted(order.tolist()) == list(range(width))
        assert not torch.equal(order, torch.arange(width))
        wide, kept = weight_of(dense, name)[:, order], weight_of(models[True], name)
        assert torch.equal(kept[kept != 0], wide[kept != 0])
        assert NM(2, 4).check(kept).violations == 0
        if model_type == "gpt_oss":
            biases = (model.get_submodule(name.rsplit(".", 2)[0]).gate_up_proj_bias for model in (dense, models[True]))
            before, after = (bias[int(name.split(".")[-2])] for bias in biases)
            assert torch.equal(before[::2][order], after[::2])
            assert torch.equal(before[1::2][order], after[1::2])


@pytest.mark.parametrize("shrinkage", [False, True])
def test_the_report_tells_the_tokens_of_every_expert(shrinkage: bool, tmp_path: Path) -> None:
    source, calib = (
        save_tiny("qwen3_moe", tmp_path / "source"),
        token_file(tmp_path / "t.safetensors", random_tokens(1, 8)),
    )
    report = prune(job(source, tmp_path / "out", calib, method="sparsegpt", shrinkage=shrinkage))
    experts = [layer for layer in report.layers if ".experts." in layer.name]
    for block in range(2):
        tokens = [layer.tokens for layer in experts if f".{block}.mlp" in layer.name and "gate_up" in layer.name]
        assert len(tokens) == 4
        assert sum(tokens) == 2 * 8
        assert report.blocks[block].expert_tokens == [min(tokens), round(median(tokens)), max(tokens)]
    unseen = [layer for layer in experts if not layer.tokens]
    if shrinkage:
        assert all(0 < layer.stats["shrinkage"] <= 1 for layer in experts)
        assert all(layer.status == "ok" and layer.stats["shrinkage"] == 1 for layer in unseen)
    else:
        assert not any("shrinkage" in layer.stats for layer in experts)
        assert all("magnitude" in layer.status for layer in unseen)


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs ../shared/models")
def test_a_trained_mixture_is_pruned_by_every_method_and_still_speaks(tmp_path: Path) -> None:
    text = ROOT.parent / "shared" / "data" / "stories.txt"
    found, reports = {}, {}
    for name, options in {
        "magnitude": {"method": "magnitude"},
        "fast": {"effort": "fast"},
        "balanced": {"effort": "balanced"},
    }.items():
        reports[name] = prune(job(STORIES, tmp_path / name, text, samples=4, seq_len=128, seed=1, **options))
        found[name] = perplexity(skeleton_of(tmp_path / name), stories(text)).value
    dense = perplexity(skeleton_of(STORIES), stories(text)).value
    assert dense < found["balanced"] < found["fast"] < found["magnitude"]
    assert math.log(found["fast"] / found["balanced"]) > 0.3 * math.log(found["fast"] / dense)
    report: PruneReport = reports["balanced"]
    assert report.coverage["fraction"] > 0.99
    model = reload(tmp_path / "balanced")
    for layer in report.layers:
        assert NM(2, 4).check(weight_of(model, layer.name)).violations == 0
    assert on_disk(STORIES).keys() == on_disk(tmp_path / "balanced").keys()


def stories(text: Path) -> Tensor:
    """Windows from the end of the text."""
    ids = AutoTokenizer.from_pretrained(STORIES)(text.read_text(encoding="utf-8")[-12000:])["input_ids"]
    return torch.tensor(ids[: 8 * 128]).view(8, 128)
