"""Whole experts are removed: the rest is a stock model that routes as the dense one would without them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    ROOT,
    job,
    on_disk,
    random_tokens,
    reload,
    rewrite,
    save_tiny,
    stopped_behind_the_first_block,
    token_file,
)
from torch import Tensor
from transformers import PreTrainedModel

from llmprune import InputError, PruneReport, prune
from llmprune.cli.terminal import summary
from llmprune.export.verify import verify_folder
from llmprune.run import dry_run
from llmprune.streaming.router_mask import RouterMask

STORIES = ROOT.parent / "shared" / "models" / "stories-moe"
FAMILIES = {
    "mixtral": {"num_local_experts": 8},
    "qwen3_moe": {"num_experts": 8, "norm_topk_prob": False},
    "qwen2_moe": {"num_experts": 8},
    "olmoe": {"num_experts": 8},
    "gpt_oss": {"num_local_experts": 8},
    "granitemoe": {"num_local_experts": 8},
    "deepseek_v3": {
        "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 0,
    },
    "glm4_moe": {"n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 0},
}  # fmt: skip


def removed(work: Path, model_type: str = "mixtral", sparsity: str = "experts:50%", **options: Any) -> PruneReport:
    source = work / "source"
    if not source.exists():
        save_tiny(model_type, source, **FAMILIES[model_type])
    out, tokens = options.pop("out", work / "out"), options.pop("tokens", None)
    return prune(job(source, out, token_file(work / "tokens.safetensors", tokens), sparsity, **options))


def routers_of(model: PreTrainedModel, block: int, experts: int) -> list[Tensor]:
    """The router rows of a block."""
    layer = model.get_decoder().layers[block]
    named = [(name, p) for name, p in layer.named_parameters() if "gate." in name or "router." in name]
    return [p for _, p in named if p.dim() == 2 and len(p) == experts]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_is_left_computes_what_the_dense_model_would_without_the_others(model_type: str, tmp_path: Path) -> None:
    # One block: the mask hides the same experts wherever a router chooses.
    options = {**FAMILIES[model_type], "num_hidden_layers": 1}
    options |= {"layer_types": ["full_attention"]} if model_type == "gpt_oss" else {}
    save_tiny(model_type, tmp_path / "source", **options)
    report = removed(tmp_path, model_type, method="frequency", refit=False)
    (mixture,) = report.mixtures
    assert mixture.experts == 8
    assert len(mixture.kept) == 4
    dense, smaller = reload(tmp_path / "source"), reload(tmp_path / "out")
    gone = torch.ones(8, dtype=torch.bool)
    gone[mixture.kept] = False
    tokens = random_tokens(2, 24, dense.config.get_text_config().vocab_size)
    with torch.no_grad(), RouterMask(routers_of(dense, 0, 8), gone):
        expected = dense(tokens).logits
    with torch.no_grad():
        found = smaller(tokens).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert sum(p.numel() for p in smaller.parameters()) == report.model["parameters_left"]


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("targets", ["pruned", "dense"])
def test_the_refit_lowers_the_error_and_is_what_is_stored(model_type: str, targets: str, tmp_path: Path) -> None:
    many = random_tokens(16, 64)
    bare = removed(tmp_path, model_type, tokens=many, method="reap", refit=False, out=tmp_path / "bare")
    report = removed(tmp_path, model_type, tokens=many, method="reap", targets=targets)
    first, plain = report.mixtures[0], bare.mixtures[0]
    assert first.kept == plain.kept
    if targets == "pruned":
        assert first.error_uncompensated == pytest.approx(plain.error)
    assert first.error < first.error_uncompensated
    assert first.ridge is not None
    before, after = on_disk(tmp_path / "bare"), on_disk(tmp_path / "out")
    assert before.keys() == after.keys()
    block = [name for name in after if "layers.0." in name and not torch.equal(after[name], before[name])]
    assert block
    assert all(any(part in name for part in ("down_proj", "w2")) for name in block)
    assert not verify_folder(tmp_path / "out").violations
    assert reload(tmp_path / "out")(random_tokens(1, 8)).logits.isfinite().all()


def test_experts_and_then_weights(tmp_path: Path) -> None:
    report = removed(tmp_path, "qwen3_moe", "experts:50%+2:4", effort="balanced")
    found = on_disk(tmp_path / "out")
    experts = [value for name, value in found.items() if ".experts." in name]
    assert len(experts) == 2 * 4 * 3
    for weight in experts:
        assert ((weight.view(len(weight), -1, 4) == 0).sum(-1) == 2).all()
    assert report.coverage["fraction"] > 0.9
    assert {layer.name for layer in report.layers if ".experts.3." in layer.name}
    assert not {layer.name for layer in report.layers if ".experts.4." in layer.name}
    assert not verify_folder(tmp_path / "out").violations
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_local_experts"] == 4


def test_experts_and_channels_of_the_shared_expert(tmp_path: Path) -> None:
    report = removed(tmp_path, "qwen2_moe", "experts:25%+channels:50%", round_to=1)
    assert [text.partition(":")[0] for text in report.sparsity["removed"]] == ["channels", "experts"]
    smaller = reload(tmp_path / "out")
    assert len(smaller.model.layers[0].mlp.gate.weight) == 6


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = removed(tmp_path, method="reap", out=tmp_path / "whole")
    with stopped_behind_the_first_block(monkeypatch):
        removed(tmp_path, method="reap")
    report = removed(tmp_path, method="reap")
    assert report.mixtures == whole.mixtures
    assert len(report.mixtures) == 2
    before, after = on_disk(tmp_path / "whole"), on_disk(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_super_expert_stays_whatever_its_score(tmp_path: Path) -> None:
    source = save_tiny("qwen3_moe", tmp_path / "source", num_experts=8, num_hidden_layers=1)
    plain = removed(tmp_path, method="frequency", out=tmp_path / "plain", sparsity="experts:25%")
    victim = next(e for e in range(8) if e not in plain.mixtures[0].kept and plain.mixtures[0].tokens[e])

    def swell(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        (name,) = [name for name in tensors if f"experts.{victim}.down_proj" in name]
        tensors[name] = torch.cat([1e7 * tensors[name][:1], tensors[name][1:]])
        return tensors

    rewrite(source, swell)
    guarded = removed(tmp_path, method="frequency", sparsity="experts:25%").mixtures[0]
    assert guarded.super_experts == [victim]
    assert victim in guarded.kept
    told = f"super experts: 1 found ({victim} of {guarded.block}), 1 kept"
    assert told in summary(PruneReport.read(tmp_path / "out"))
    assert told in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "super experts" in (tmp_path / "out" / "prune_report.html").read_text(encoding="utf-8")
    free = removed(tmp_path, method="frequency", sparsity="experts:25%", guard=False, out=tmp_path / "free").mixtures[0]
    assert free.super_experts == [victim]
    assert victim not in free.kept


@pytest.mark.parametrize(
    ("model_type", "sparsity", "options", "message"),
    [
        ("llama", "experts:25%", {}, "no experts to remove"),
        ("mixtral", "experts:90%", {}, "leaves 1 of 8 experts, but every token is sent to 2"),
        ("mixtral", "experts:1%", {}, "rounds to none"),
        ("mixtral", "experts:100%", {}, "leaves none"),
        ("mixtral", "experts:25%", {"method": "lasso"}, "no score for whole experts"),
        ("mixtral", "experts:25%", {"steps": 2}, "--steps 2 does not apply"),
        ("mixtral", "2:4", {"guard": False}, "--no-guard does not apply"),
        ("mixtral", "experts:25%", {"only": ("*q_proj",)}, "do not apply"),
        ("llama4_text", "experts:25%", {}, "do not say how they are called"),
        ("deepseek_v4", "experts:50%", {}, "depends on their order"),  # a table sends tokens to experts by their ids
    ],
)
def test_bad_input(model_type: str, sparsity: str, options: Any, message: str, tmp_path: Path) -> None:
    save_tiny(model_type, tmp_path / "source", **FAMILIES.get(model_type, {}))
    with pytest.raises(InputError, match=message):
        removed(tmp_path, model_type, sparsity, **options)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_the_router_groups_are_kept(tmp_path: Path) -> None:
    report = removed(tmp_path, "deepseek_v3", "experts:25%")
    for mixture in report.mixtures:
        assert sum(expert < 4 for expert in mixture.kept) == 3
    assert "as many in each of 2 groups" in report.sparsity["removed"][0]


def test_a_dry_run_tells_the_smaller_size(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "source", **FAMILIES["mixtral"])
    asked = job(tmp_path / "source", tmp_path / "out", token_file(tmp_path / "tokens.safetensors"), "experts:50%")
    told, report = dry_run(asked), prune(asked)
    assert told["size"]["pruned"] == sum(tensor.nbytes for tensor in on_disk(tmp_path / "out").values())
    assert told["model"]["parameters_left"] == report.model["parameters_left"]
    assert told["estimate"]["seconds"] > 0


@pytest.mark.skipif(not STORIES.exists(), reason="the model that was trained lies beside the checkout")
def test_the_refit_undoes_a_third_of_what_reap_costs(tmp_path: Path) -> None:
    text = (ROOT.parent / "shared" / "data" / "stories.txt").read_text(encoding="utf-8")
    calibration, evaluation = tmp_path / "calibration.txt", tmp_path / "evaluation.txt"
    calibration.write_text(text[:200_000], encoding="utf-8")
    evaluation.write_text(text[-60_000:], encoding="utf-8")
    options: dict[str, Any] = {"samples": 16, "seq_len": 512, "eval_context": 512, "eval_windows": 20, "evaluate": True}
    options |= {"eval_text": str(evaluation), "method": "reap"}
    logs = {}
    for refit in (False, True):
        how = {"targets": "dense"} if refit else {"refit": False}
        found = prune(job(STORIES, tmp_path / f"{refit}", calibration, "experts:25%", **how, **options)).evaluation
        assert found is not None
        logs[refit] = math.log(found["pruned"]["value"] / found["dense"]["value"])
    assert logs[True] < 2 / 3 * logs[False]
