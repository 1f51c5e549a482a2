"""Runs that remove channels and heads: folders of stock models of the new size, and what is refused."""

from __future__ import annotations

import json
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    Toy,
    ToyConfig,
    job,
    on_disk,
    random_tokens,
    reload,
    skeleton_of,
    streamed_logits,
    token_file,
    whole_logits,
)
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from variants import source_of

from llmprune import InputError, PruneReport, prune
from llmprune.cli.terminal import summary
from llmprune.export.verify import verify_folder
from llmprune.reporting.words import parameters_text


def pruned(work: Path, sparsity: str, name: str = "llama", **options: Any) -> tuple[Path, Path, PruneReport]:
    source = source_of(name, work / "source", **options.pop("model", {}))
    report = prune(job(source, work / "out", token_file(work / "tokens.safetensors"), sparsity, **options))
    return source, work / "out", report


def test_without_a_refit_the_written_weights_are_slices(tmp_path: Path) -> None:
    source, out, report = pruned(tmp_path, "channels:25%", method="magnitude", refit=False)
    before, after = on_disk(source), on_disk(out)
    assert before.keys() == after.keys()
    for at in range(2):
        prefix = f"model.layers.{at}.mlp."
        size = before[f"{prefix}down_proj.weight"].norm(dim=0)
        kept = size.sort(stable=True).indices[32:].sort().values
        assert torch.equal(after[f"{prefix}down_proj.weight"], before[f"{prefix}down_proj.weight"][:, kept])
        for layer in ("gate_proj", "up_proj"):
            assert torch.equal(after[f"{prefix}{layer}.weight"], before[f"{prefix}{layer}.weight"][kept])
    assert all(torch.equal(before[n], after[n]) for n in before if ".mlp." not in n)
    assert report.size["pruned"] < report.size["dense"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3", "qwen3", "gemma3_text"])
def test_the_written_folder_is_a_stock_model_of_the_new_size(name: str, tmp_path: Path) -> None:
    source, out, report = pruned(tmp_path, "channels:25%", name)
    config = json.loads((out / "config.json").read_text())
    assert report.sparsity["config"].items() <= config.items()
    model, tokens = reload(out), random_tokens(3, seed=3)
    assert torch.equal(streamed_logits(skeleton_of(out), tokens), whole_logits(model, tokens))
    assert model.num_parameters() == report.model["parameters_left"] < report.model["parameters"]
    assert report.model["parameters"] == reload(source).num_parameters()
    assert parameters_text(report.model) in summary(report)
    assert "coverage" not in summary(report)  # of the layers that lose inputs: it would say nothing of what is gone
    assert verify_folder(out).violations == 0
    assert all(layer.error <= layer.stats["error_uncompensated"] + 1e-9 for layer in report.layers if layer.pruned)
    generated = model.generate(tokens[:1, :6], max_new_tokens=5, do_sample=False, use_cache=True, pad_token_id=0)
    again = model.generate(tokens[:1, :6], max_new_tokens=5, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(generated, again)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("sparsity", ["heads:50%", "channels:25%+heads:50%"])
def test_a_model_with_fewer_heads_generates_with_its_cache(name: str, sparsity: str, tmp_path: Path) -> None:
    _, out, report = pruned(tmp_path, sparsity, name)
    assert report.sparsity["config"]["num_key_value_heads"] == 1
    model, tokens = reload(out), random_tokens(3, seed=3)
    assert torch.equal(streamed_logits(skeleton_of(out), tokens), whole_logits(model, tokens))
    generated = model.generate(tokens[:1, :6], max_new_tokens=5, do_sample=False, use_cache=True, pad_token_id=0)
    again = model.generate(tokens[:1, :6], max_new_tokens=5, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(generated, again)


@pytest.mark.parametrize("options", [{}, {"method": "wanda"}, {"method": "lasso"}, {"method": "sparsegpt"}])
def test_first_smaller_then_sparse(options: dict[str, Any], tmp_path: Path) -> None:
    _, out, report = pruned(tmp_path, "channels:25%+2:4", **options)
    assert report.sparsity["pattern"] == "channels:25%+2:4"
    weights = {n: t for n, t in on_disk(out).items() if "proj" in n}
    assert weights["model.layers.0.mlp.down_proj.weight"].shape == (64, 96)
    for weight in weights.values():
        assert ((weight.reshape(len(weight), -1, 4) == 0).sum(-1) == 2).all()
    assert verify_folder(out).violations == 0
    assert len(report.layers) == 14


def test_a_layer_that_only_loses_inputs_is_reported_and_verified_as_such(tmp_path: Path) -> None:
    _, out, report = pruned(tmp_path, "channels:25%+2:4", method="wanda", skip=("*.down_proj",))
    assert {layer.name.rpartition(".")[2] for layer in report.layers if not layer.pattern} == {"down_proj"}
    check = verify_folder(out)
    assert check.violations == 0
    assert len(check.layers) == 12


def test_the_error_is_told_before_the_refit_after_it_and_with_weights_pruned(tmp_path: Path) -> None:
    _, out, report = pruned(tmp_path, "channels:25%+2:4", "opt", method="wanda")
    (sink, *_) = [layer for layer in report.layers if "error_uncompensated" in layer.stats]
    assert sink.stats["error_compensated"] < min(sink.stats["error_uncompensated"], sink.error)
    assert "with the weights pruned" in summary(report)
    removed = report.sparsity["removed"][0]
    for page in ("README.md", "prune_report.html"):
        assert removed in unescape((out / page).read_text(encoding="utf-8"))


def test_what_is_not_fitted_needs_no_dense_model(tmp_path: Path) -> None:
    _, _, report = pruned(tmp_path, "channels:25%", method="auto", effort="balanced", refit=False)
    assert report.recipe["targets"] == "pruned"


def test_a_share_of_the_rows_is_exact_after_rows_are_gone(tmp_path: Path) -> None:
    _, out, report = pruned(tmp_path, "channels:25%+50%", method="wanda")
    assert report.sparsity["scope"] == "row"
    for name, weight in on_disk(out).items():
        if "proj" in name:
            assert ((weight == 0).sum(1) == weight.shape[1] // 2).all()
    assert verify_folder(out).violations == 0


def test_a_tampered_config_is_a_violation(tmp_path: Path) -> None:
    _, out, report = pruned(tmp_path, "channels:25%")
    report_file = out / "prune_report.json"
    text = json.loads(report_file.read_text())
    text["sparsity"]["config"]["intermediate_size"] = 100
    report_file.write_text(json.dumps(text))
    check = verify_folder(out)
    assert check.violations == 1
    assert "intermediate_size is 96, not 100" in check.text()
    (out / "config.json").write_text((out / "config.json").read_text().replace("96", "104"))
    with pytest.raises(InputError, match="on disk"):
        verify_folder(out)
    assert report.sparsity["config"] == {"intermediate_size": 96}


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "no channel left": ("channels:100%", {}, "leaves none"),
    "nothing goes": ("channels:0%", {}, "removes none"),
    "twice": ("channels:10%+channels:20%", {}, "twice"),
    "two patterns": ("2:4+50%", {}, "two patterns"),
    "no column score": ("channels:25%", {"method": "sparsegpt"}, "score for whole channels"),
    "no score for weights": ("2:4", {"method": "lasso"}, "rule for single weights"),
    "no scale": ("channels:25%", {"method": "scaling"}, "no learned scale"),
    "unknown": ("tails:25%", {}, "unknown sparsity"),
    "skip": ("channels:25%", {"skip": ("*.0.*",)}, "--skip"),
    "round": ("2:4", {"round_to": 8}, "--round-to"),
    "allocate": ("channels:25%", {"allocate": "error"}, "--allocate"),
    "permute": ("channels:25%", {"permute": True}, "--permute"),
    "scope": ("channels:25%", {"scope": "row"}, "--scope"),
    "dense": ("channels:25%", {"refit": False, "targets": "dense"}, "--targets dense"),
    "layer scope": ("channels:25%+50%", {"scope": "layer"}, "--scope layer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    sparsity, options, message = BAD[case]
    with pytest.raises(InputError, match=message) as caught:
        pruned(tmp_path, sparsity, **options)
    assert caught.value.hint
    assert {path.name for path in tmp_path.iterdir()} <= {"source", "tokens.safetensors"}


@pytest.mark.parametrize("method", ["magnitude", "wanda", "obd", "obs", "lasso", "apoz"])
@pytest.mark.parametrize("steps", [1, 3])
def test_every_criterion_with_refit_beats_it_without(method: str, steps: int, tmp_path: Path) -> None:
    _, _, fitted = pruned(tmp_path / "a", "channels:25%", "opt", method=method, steps=steps)
    _, _, bare = pruned(tmp_path / "b", "channels:25%", "opt", method=method, steps=steps, refit=False)
    (first, *_), (plain, *_) = fitted.layers, bare.layers
    assert first.error < plain.error
    assert plain.error == pytest.approx(plain.stats["error_uncompensated"], rel=1e-4)


class PeatConfig(ToyConfig):
    """The toy of a kind whose config says how wide it is."""

    model_type = "toy-peat"

    def __init__(self, bog_width: int = 32, **kwargs: Any) -> None:
        self.bog_width = bog_width
        super().__init__(**kwargs)


class Stain(nn.Module):
    """A learned scale for every channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Bog(nn.Module):
    """A plain MLP with a learned scale in the middle."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.peat, self.stain, self.moss = nn.Linear(width, inner), Stain(inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moss(self.stain(self.peat(x).relu()))


class Peat(Toy):
    """Two such blocks."""

    config_class = PeatConfig

    def __init__(self, config: PeatConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Bog(config.hidden_size, config.bog_width) for _ in range(2))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register("toy-peat", PeatConfig)
AutoModelForCausalLM.register(PeatConfig, Peat)


def test_channels_go_by_their_learned_scale(tmp_path: Path) -> None:
    source, out, report = pruned(tmp_path, "channels:25%", "toy-peat", method="scaling", round_to=1)
    assert report.sparsity["config"] == {"bog_width": 24}
    before, after = on_disk(source), on_disk(out)
    for at in range(2):
        scale = before[f"layers.{at}.stain.weight"]
        kept = scale.abs().sort(stable=True).indices[8:].sort().values
        assert torch.equal(after[f"layers.{at}.stain.weight"], scale[kept])
        assert torch.equal(after[f"layers.{at}.peat.bias"], before[f"layers.{at}.peat.bias"][kept])
    tokens = random_tokens(2, seed=3)
    assert torch.equal(streamed_logits(skeleton_of(out), tokens), whole_logits(reload(out), tokens))


@pytest.mark.parametrize(("name", "offset"), [("llama", 0.0), ("gemma", 1.0), ("gpt2", 0.0)])
def test_weights_go_by_the_scale_of_the_norm_that_feeds_them(name: str, offset: float, tmp_path: Path) -> None:
    layer, norm = {
        "gpt2": ("transformer.h.1.mlp.c_fc", "transformer.h.1.ln_2"),
    }.get(name, ("model.layers.1.mlp.up_proj", "model.layers.1.post_attention_layernorm"))
    source, out, _ = pruned(tmp_path, "2:4", name, method="scaling", only=(layer,))
    before, after = on_disk(source), on_disk(out)
    weight, left = before[f"{layer}.weight"], after[f"{layer}.weight"]
    if name == "gpt2":
        weight, left = weight.T, left.T
    score = weight.abs() * (before[f"{norm}.weight"] + offset).abs()
    keep = torch.zeros(score.numel() // 4, 4, dtype=torch.bool)
    keep.scatter_(1, score.reshape(-1, 4).topk(2).indices, True)
    assert torch.equal(left, weight * keep.view_as(weight))


def test_layers_without_a_norm_before_them_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no norm feeds 'model\.layers\.0\.self_attn\.o_proj'"):
        pruned(tmp_path, "2:4", method="scaling")
    assert not (tmp_path / "out").exists()
