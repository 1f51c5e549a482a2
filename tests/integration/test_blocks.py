"""Whole blocks are removed: the rest is a stock model, and the block before a gap compensates for what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    job,
    on_disk,
    random_tokens,
    reload,
    save_tiny,
    stopped_behind_the_first_block,
    text_file,
    token_file,
)

from llmprune import InputError, PruneReport, prune
from llmprune.cli.terminal import summary
from llmprune.export.verify import verify_folder
from llmprune.pipeline.block_choice import without_blocks
from llmprune.pipeline.prepare import prepare
from llmprune.progress import Progress
from llmprune.reporting.html_report import facts
from llmprune.run import dry_run

TYPES = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("llama", "gpt2", "opt", "gpt_neox", "bloom", "falcon", "mpt", "phi3", "mamba", "dbrx")},
    "gemma2": {"layer_types": TYPES * 2},
    "gpt_oss": {"layer_types": TYPES * 2},
    "smollm3": {},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "qwen2_moe": {"mlp_only_layers": [1]},
    "mistral3": {},
}


def removed(work: Path, sparsity: str = "blocks:1", model_type: str = "llama", **options: Any) -> PruneReport:
    source = work / "source"
    if not source.exists():
        save_tiny(model_type, source, **{"num_hidden_layers": 4, **FAMILIES[model_type]})
    tokens = token_file(work / "tokens.safetensors", random_tokens(8, 32))
    return prune(job(source, options.pop("out", work / "out"), tokens, sparsity, **options))


def gone(report: PruneReport, total: int = 4) -> list[int]:
    """The numbers of the removed blocks, from the report's words."""
    said = report.sparsity["removed"][0].rpartition(": ")[2].partition(" of 0")[0]
    pairs = [(part + "-" + part).split("-")[:2] for part in said.split(", ")]
    found = [number for first, last in pairs for number in range(int(first), int(last) + 1)]
    assert all(0 < number < total for number in found)
    return found


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_rest_is_a_stock_model(model_type: str, tmp_path: Path) -> None:
    report = removed(tmp_path, model_type=model_type, refit=False)
    dense, smaller = reload(tmp_path / "source"), reload(tmp_path / "out")
    (index,) = gone(report)
    blocks = next(m for m in dense.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)
    left = next(m for m in smaller.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    tokens = random_tokens(2, 12, smaller.config.get_text_config().vocab_size)
    # The dense model, in which that block hands on what it is given.
    returns_tuple = isinstance(output_of(dense, blocks[index], tokens), tuple)
    blocks[index].forward = lambda hidden, *args, **kwargs: (hidden, None, None) if returns_tuple else hidden
    with torch.no_grad():
        assert torch.allclose(smaller(tokens, use_cache=False).logits, dense(tokens, use_cache=False).logits, atol=1e-5)
    assert len(left) == 3
    assert sum(p.numel() for p in smaller.parameters()) == report.model["parameters_left"]
    cached, plain = (
        smaller.generate(tokens, max_new_tokens=8, do_sample=False, use_cache=cache) for cache in (True, False)
    )
    assert torch.equal(cached, plain)


def output_of(model: Any, block: torch.nn.Module, tokens: torch.Tensor) -> Any:
    """What a block returns in a forward of its model."""
    found: list[Any] = []
    with torch.no_grad():
        handle = block.register_forward_hook(lambda _, args, output: found.append(output))
        model(tokens, use_cache=False)
        handle.remove()
    return found[0]


def test_the_block_before_a_gap_compensates(tmp_path: Path) -> None:
    report = removed(tmp_path, "blocks:2")
    plain = removed(tmp_path, "blocks:2", refit=False, out=tmp_path / "plain")
    assert gone(report) == gone(plain)
    tokens = random_tokens(8, 32)
    dense, fitted, bare = (reload(tmp_path / name) for name in ("source", "out", "plain"))
    with torch.no_grad():
        wanted = dense(tokens).logits
        errors = [float((model(tokens).logits - wanted).square().mean()) for model in (fitted, bare)]
    assert errors[0] < 0.9 * errors[1]
    assert {layer.name.rpartition(".")[2] for layer in report.layers} == {"o_proj", "down_proj"}
    assert all(layer.name in dict(fitted.named_modules()) for layer in report.layers)
    before, after = on_disk(tmp_path / "plain"), on_disk(tmp_path / "out")
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    assert all(name.endswith(("o_proj.weight", "down_proj.weight")) for name in changed)
    assert not verify_folder(tmp_path / "out").wrong_sizes


@pytest.mark.parametrize("effort", ["fast", "balanced", "best"])
def test_every_effort_removes_blocks(effort: str, tmp_path: Path) -> None:
    report = removed(tmp_path, effort=effort)
    assert report.sparsity["config"] == {"num_hidden_layers": 3}
    assert len(report.blocks) == 3
    assert [block.name for block in report.blocks] == [f"model.layers.{number}" for number in range(3)]
    assert len(report.reconstructions) == (3 if effort == "best" else 0)


def test_blocks_then_channels_then_weights_then_bits(tmp_path: Path) -> None:
    report = removed(tmp_path, "blocks:1+channels:25%+2:4", quantize="int8", effort="balanced", round_to=8)
    check = verify_folder(tmp_path / "out")
    assert not check.violations
    assert check.on_grid == len(report.layers) == 3 * 7
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 3
    dense = json.loads((tmp_path / "source" / "config.json").read_text())
    assert config["intermediate_size"] < dense["intermediate_size"]
    assert reload(tmp_path / "out")(random_tokens(1, 8)).logits.isfinite().all()
    assert report.sparsity["pattern"] == "blocks:1+channels:25%+2:4"


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed(tmp_path, "blocks:1", effort="balanced")
    with stopped_behind_the_first_block(monkeypatch):
        removed(tmp_path, "blocks:1", effort="balanced", out=tmp_path / "again")
    removed(tmp_path, "blocks:1", effort="balanced", out=tmp_path / "again")
    for name, value in on_disk(tmp_path / "out").items():
        assert torch.equal(on_disk(tmp_path / "again")[name], value)


def test_perplexity_and_plan(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source", num_hidden_layers=4)
    text = text_file(tmp_path / "text.txt", 2000)
    tokens = token_file(tmp_path / "tokens.safetensors", random_tokens(8, 32))
    task = job(tmp_path / "source", tmp_path / "out", tokens, "blocks:25%", evaluate=True, eval_text=str(text))
    plan = dry_run(task)
    assert "transformer blocks 4 -> 3" in json.dumps(plan)
    report = prune(task)
    assert report.evaluation is not None
    assert report.size["pruned"] < report.size["dense"]
    assert len(plan["layers"]) == len(report.layers) == 2 * 3
    assert plan["coverage"] == report.coverage
    assert plan["size"]["pruned"] == pytest.approx(report.size["pruned"], rel=0.02)
    assert "25 % of the transformer blocks removed" in report.sparsity["meaning"]


def test_the_plan_of_narrower_experts_in_fewer_blocks_is_that_of_those_that_stay(tmp_path: Path) -> None:
    source = save_tiny("qwen3_moe", tmp_path / "source", num_hidden_layers=4)
    tokens = token_file(tmp_path / "tokens.safetensors")
    run = prepare(job(source, tmp_path / "out", tokens, "experts:50%+blocks:2", effort="fast"), Progress())
    plans = [without_blocks(run, gone, (), Progress()).plan for gone in ((1, 2), (2, 3))]
    first, last = ([layer.name for layer in plan.removed] for plan in plans)
    assert len(first) == len(last) == 2 * 2 * 2
    assert {name.split(".")[2] for name in first} == {"0", "3"}
    assert plans[0].covered == plans[1].covered < plans[0].block_parameters
    assert plans[0].block_parameters * 2 == run.plan.block_parameters


def test_the_size_of_fewer_blocks_in_fewer_bits_is_foretold(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source", num_hidden_layers=4)
    tokens = token_file(tmp_path / "tokens.safetensors", random_tokens(8, 32))
    task = job(source, tmp_path / "out", tokens, "blocks:3", quantize="int8", effort="fast")
    assert dry_run(task)["size"]["pruned"] == pytest.approx(prune(task).size["pruned"], rel=0.1)


def test_no_error_is_told_where_nothing_is_solved(tmp_path: Path) -> None:
    report = removed(tmp_path, refit=False, effort="fast")
    assert "error 0" not in summary(report)
    assert "mean" not in report._repr_html_() + facts(report)
    assert "mean relative" not in (tmp_path / "out" / "README.md").read_text().partition("## Load")[0]
    assert set(report.coverage["skipped"]) == {"no channels, heads or experts to lose"}


@pytest.mark.parametrize(
    ("sparsity", "options", "said"),
    [
        ("blocks:4", {}, "leaves none of the 4"),
        ("blocks:1%", {}, "rounds to none"),
        ("blocks:1+50%", {"allocate": "owl"}, "--allocate owl"),
        ("blocks:1", {"targets": "pruned"}, "--targets pruned"),
        ("blocks:1", {"method": "reap"}, "rule for whole blocks"),
        ("blocks:1", {"ridge": 0.1}, "--ridge"),
        ("blocks:1", {"only": ("*.o_proj",)}, "--only"),
    ],
)
def test_what_cannot_be_done_is_refused(sparsity: str, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        removed(tmp_path, sparsity, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("model_type", "said"), [("gemma4", "cannot express"), ("zaya", "shares more than hidden")])
def test_blocks_that_need_others_are_refused(model_type: str, said: str, tmp_path: Path) -> None:
    save_tiny(model_type, tmp_path / "source")
    tokens = token_file(tmp_path / "tokens.safetensors")
    with pytest.raises(InputError, match=said):
        dry_run(job(tmp_path / "source", tmp_path / "out", tokens, "blocks:1"))


def test_nearly_all_blocks_may_go(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source", num_hidden_layers=12)
    tokens = token_file(tmp_path / "tokens.safetensors", random_tokens(8, 32))
    report = prune(job(tmp_path / "source", tmp_path / "out", tokens, "blocks:11"))
    assert gone(report, 12) == list(range(1, 12))
    assert len(reload(tmp_path / "out").model.layers) == 1
