"""Folders with weights on a grid: stock transformers loads them, verify reads their codes, sizes are what bits say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import edit_tensor, random_tokens, save_tiny, stopped_behind_the_first_block, token_file
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmprune import Job, prune
from llmprune.errors import InputError
from llmprune.export.verify import verify_folder
from llmprune.model.compressed_tensors import written_bytes
from llmprune.model.skeleton import Skeleton
from llmprune.progress import Progress
from llmprune.pruning.grid import parse_grid
from llmprune.reporting.report import PruneReport
from llmprune.run import dry_run
from llmprune.sources.models import open_source

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 96}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_file(tmp_path_factory.mktemp("tokens") / "tokens.safetensors", random_tokens(16, 32))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama") / "model", **SIZES)


def job_of(model: Path, tokens: Path, out: Path, **options: Any) -> Job:
    settings = {"sparsity": "2:4", "quantize": "int4:g32", "effort": "fast", **options}
    return Job(str(model), calib=str(tokens), evaluate=False, out=out, **settings)


def weights_of(folder: Path) -> Skeleton:
    """The folder as llmprune itself reads it."""
    source = open_source(str(folder), revision=None, cache=folder, trust_remote_code=False, progress=Progress())
    return Skeleton(source.config, source.weights(source.dtype))


def loads_alike(folder: Path) -> None:
    """Stock transformers has the very weights that llmprune reads, and computes with them."""
    model, own = AutoModelForCausalLM.from_pretrained(folder), weights_of(folder)
    ids = random_tokens(2, 12)
    logits = model(ids).logits
    found = dict(model.named_parameters())
    same = [name for name in own.checkpoint if name in found]
    assert sum(name.endswith("_proj.weight") for name in same) >= 14
    for name in same:
        assert torch.equal(found[name], own.checkpoint[name]), name
    plain = AutoModelForCausalLM.from_config(own.config).to(model.dtype)
    plain.load_state_dict({name: own.checkpoint[name] for name in own.checkpoint}, strict=False)
    plain.tie_weights()
    torch.testing.assert_close(
        plain.eval()(ids).logits, logits, rtol=0, atol=1e-5 if model.dtype == torch.float32 else 0.1
    )


CASES: dict[str, dict[str, Any]] = {
    "2:4 and int4": {},
    "balanced": {"effort": "balanced"},
    "int8 alone": {"sparsity": "none", "quantize": "int8"},
    "fp8, unstructured": {"sparsity": "50%", "quantize": "fp8"},
    "half precision": {"dtype": "bfloat16", "effort": "balanced"},
    "narrower": {"sparsity": "channels:25%", "quantize": "int8"},
    "narrower and sparse": {"sparsity": "channels:25%+2:4", "effort": "balanced"},
    "reconstructed": {"effort": "balanced", "reconstruct": 1},
    "some layers": {"skip": ("down_proj",)},
}


@pytest.mark.parametrize("case", CASES)
def test_stock_transformers_reads_what_was_solved(case: str, llama: Path, tokens: Path, tmp_path: Path) -> None:
    options = CASES[case]
    report = prune(job_of(llama, tokens, tmp_path / "out", **options))
    loads_alike(tmp_path / "out")
    found = verify_folder(tmp_path / "out")
    layers = 12 if case == "some layers" else 14
    assert (found.violations, found.on_grid, found.wrong_grids) == (0, layers, [])
    assert {layer.grid for layer in report.layers} == {report.quantization["grid"]}
    grid = replace(parse_grid(report.quantization["grid"]), scale_dtype=getattr(torch, options.get("dtype", "float32")))
    own = weights_of(tmp_path / "out").checkpoint
    wanted = sum(written_bytes(tuple(own[f"{layer.name}.weight"].shape), grid) for layer in report.layers) + sum(
        own[name].nbytes for name in own if name.removesuffix(".weight") not in {layer.name for layer in report.layers}
    )
    stored = sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / "model.safetensors").values())
    assert stored == wanted
    planned = dry_run(job_of(llama, tokens, tmp_path / "other", **options))
    assert planned["size"]["pruned"] == pytest.approx(stored, rel=0.03)


@pytest.mark.parametrize("kind", ["qwen2", "gpt_neox", "phi3"])
def test_other_families_load_as_well(kind: str, tokens: Path, tmp_path: Path) -> None:
    model = save_tiny(kind, tmp_path / "model", **SIZES)
    report = prune(job_of(model, tokens, tmp_path / "out", quantize="int8"))
    quantised, own = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), weights_of(tmp_path / "out").checkpoint
    quantised(random_tokens(1, 8))
    found = dict(quantised.named_parameters())
    assert {f"{layer.name}.weight" for layer in report.layers} <= found.keys()
    assert all(torch.equal(found[name], own[name]) for name in own if name in found)
    assert verify_folder(tmp_path / "out").violations == 0


def test_a_pruned_folder_is_quantised_with_its_zeros_held(llama: Path, tokens: Path, tmp_path: Path) -> None:
    prune(job_of(llama, tokens, tmp_path / "pruned", quantize=None))
    report = prune(job_of(tmp_path / "pruned", tokens, tmp_path / "out", sparsity="none", quantize="int8"))
    zeros, codes = (weights_of(tmp_path / name).checkpoint for name in ("pruned", "out"))
    for layer in report.layers:
        before, after = zeros[f"{layer.name}.weight"], codes[f"{layer.name}.weight"]
        assert not bool(after[before == 0].any())
    assert report.sparsity["pattern"] == "2:4"
    found = verify_folder(tmp_path / "out")
    assert (found.violations, len(found.layers), found.on_grid) == (0, 14, 14)
    with pytest.raises(InputError, match="already quantised"):
        prune(job_of(tmp_path / "out", tokens, tmp_path / "again"))


def test_a_pruned_folder_whose_zeros_are_gone_is_refused(llama: Path, tokens: Path, tmp_path: Path) -> None:
    prune(job_of(llama, tokens, tmp_path / "pruned", quantize=None))
    edit_tensor(tmp_path / "pruned", "model.layers.1.mlp.up_proj.weight", lambda weight: weight.add_(0.01))
    with pytest.raises(InputError, match=r"up_proj' misses \d+ zeros of 2:4.*prune_report.json") as refused:
        prune(job_of(tmp_path / "pruned", tokens, tmp_path / "out", sparsity="none"))
    assert "remove its prune_report.json" in refused.value.hint
    assert not (tmp_path / "out").exists()


def test_a_stopped_run_goes_on_to_the_same_bytes(
    llama: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(job_of(llama, tokens, tmp_path / "whole", effort="balanced"))
    with stopped_behind_the_first_block(monkeypatch):
        prune(job_of(llama, tokens, tmp_path / "out", effort="balanced"))
    prune(job_of(llama, tokens, tmp_path / "out", effort="balanced"))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


DAMAGE: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = {
    "a filled zero": ("q_proj.weight_packed", lambda words: words.add_(1), "zeros missing"),
    "a scale of zero": ("q_proj.weight_scale", lambda scale: scale.zero_(), "not positive"),
    "another shape": ("q_proj.weight_shape", lambda shape: shape.add_(1), "shape is said to be"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_verify_finds_what_is_off_the_grid(case: str, llama: Path, tokens: Path, tmp_path: Path) -> None:
    name, change, says = DAMAGE[case]
    prune(job_of(llama, tokens, tmp_path / "out"))
    edit_tensor(tmp_path / "out", f"model.layers.1.self_attn.{name}", change)
    found = verify_folder(tmp_path / "out")
    assert found.violations
    assert says in found.text()
    assert json.loads(json.dumps(found.to_json()))["violations"] == found.violations


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another group": (lambda it: it["config_groups"]["group_0"]["weights"].update(group_size=64), "group_size is 64"),
    "a dense layer": (lambda it: it.update(ignore=[]), "ignore lacks 'lm_head'"),
    "a layer on the grid": (lambda it: it["ignore"].append("model.layers.0.mlp.up_proj"), "which is on the grid"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_verify_finds_a_config_that_does_not_belong_to_the_files(
    case: str, llama: Path, tokens: Path, tmp_path: Path
) -> None:
    change, says = CONFIGS[case]
    prune(job_of(llama, tokens, tmp_path / "out"))
    assert verify_folder(tmp_path / "out").violations == 0
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    found = verify_folder(tmp_path / "out")
    assert (found.violations, len(found.wrong_config)) == (1, 1)
    assert says in found.text()


@pytest.mark.parametrize("ignore", [None, "lm_head", [["lm_head"]], 3])
def test_a_config_whose_list_is_none_is_told(ignore: Any, llama: Path, tokens: Path, tmp_path: Path) -> None:
    prune(job_of(llama, tokens, tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["ignore"] = ignore
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert "VIOLATED config: ignore lacks 'lm_head'" in verify_folder(tmp_path / "out").text()


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no grid": ({"quantize": "int3"}, "unknown grid 'int3'", "int4:g64"),
    "a width": ({"quantize": "int4:g128"}, "64 inputs are not divisible by 128", "int4:g32"),
    "nothing to do": ({"sparsity": "none", "quantize": None}, "leaves nothing to be done", "--quantize"),
    "a method of no use": ({"sparsity": "none", "method": "wanda"}, "--method wanda does not apply", "--effort"),
    "passes without a grid": ({"quantize": None, "grid_passes": 2}, "--grid-passes 2 does not apply", "--quantize"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused_before_anything_is_written(
    case: str, llama: Path, tokens: Path, tmp_path: Path
) -> None:
    options, says, hint = BAD[case]
    with pytest.raises(InputError) as refused:
        prune(job_of(llama, tokens, tmp_path / "out", **options))
    assert says in refused.value.message
    assert hint in refused.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "says"), [("gpt2", "stored transposed"), ("mixtral", "all experts")])
def test_layers_that_the_format_has_not_are_refused(kind: str, says: str, tokens: Path, tmp_path: Path) -> None:
    model = save_tiny(kind, tmp_path / "model")
    with pytest.raises(InputError, match=says) as refused:
        prune(job_of(model, tokens, tmp_path / "out", quantize="int8"))
    assert "--skip" in refused.value.hint


SKIP = ("*experts*",)
READERS: dict[str, tuple[str, str, tuple[str, ...], str]] = {
    "merged experts in integers": (
        "qwen3_moe",
        "int8",
        SKIP,
        "does not load 'model.layers.0.mlp.experts.gate_up_proj'",
    ),
    "replaced experts": ("llama4_text", "fp8", SKIP, "does not load Llama4TextExperts"),
    "packed layers that are initialised": ("falcon", "int8", (), "initialises weights that packed layers do not have"),
}


@pytest.mark.parametrize("case", READERS)
def test_models_that_transformers_does_not_load_quantised_are_refused(case: str, tokens: Path, tmp_path: Path) -> None:
    kind, grid, skip, says = READERS[case]
    model = save_tiny(kind, tmp_path / "model")
    with pytest.raises(InputError) as refused:
        prune(job_of(model, tokens, tmp_path / "out", quantize=grid, skip=skip))
    assert says in refused.value.message


def test_experts_and_routers_in_floating_point_are_loaded_and_named(tokens: Path, tmp_path: Path) -> None:
    model = save_tiny("qwen3_moe", tmp_path / "model")
    prune(job_of(model, tokens, tmp_path / "out", quantize="fp8", skip=SKIP))
    found = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    own = weights_of(tmp_path / "out").checkpoint
    experts = [name for name in own if ".experts." in name]
    assert experts
    assert all(torch.equal(found[name], own[name]) for name in experts)
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    on_disk = [name for name in load_file(tmp_path / "out" / "model.safetensors") if ".mlp." in name]
    patterns = [name.removeprefix("re:") if name.startswith("re:") else re.escape(name) for name in ignored]
    assert all(any(re.fullmatch(rf"{one}(\.weight)?", name) for one in patterns) for name in on_disk)


def test_a_tied_head_stays_in_floating_point(tokens: Path, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", tie_word_embeddings=True, **SIZES)
    prune(job_of(model, tokens, tmp_path / "out"))
    loads_alike(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert PruneReport.read(tmp_path / "out").quantization["format"] == "compressed-tensors, pack-quantized"
