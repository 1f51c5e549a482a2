"""Channels of experts are removed: every expert loses its own, and the rest is a stock model of one narrower width."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    job,
    on_disk,
    random_tokens,
    reload,
    rewrite,
    save_tiny,
    skeleton_of,
    stopped_behind_the_first_block,
    stream_through,
    streamed_logits,
    token_file,
    whole_logits,
)
from torch import Tensor

from llmprune import InputError, PruneReport, prune
from llmprune.export.verify import verify_folder
from llmprune.model.experts import storage_of
from llmprune.model.routed_call import RoutedCall
from llmprune.pruning.problem import unchanged
from llmprune.pruning.sparsity import Removal
from llmprune.run import dry_run
from llmprune.streaming import stream as streaming
from llmprune.streaming.block_types import all_couplings, block_runs
from llmprune.structure.cut import Structure
from llmprune.structure.plan import plan_structure

FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe", "nemotron_h"]


def narrowed(work: Path, model_type: str = "mixtral", sparsity: str = "channels:25%", **options: Any) -> PruneReport:
    source = work / "source"
    if not source.exists():
        save_tiny(model_type, source)
    out = options.pop("out", work / "out")
    return prune(job(source, out, token_file(work / "tokens.safetensors"), sparsity, **options))


def structure_of(folder: Path) -> Structure:
    skeleton, tokens = skeleton_of(folder), random_tokens(1, 16)
    removals = [Removal("channels", Fraction(1, 4))]
    return plan_structure(skeleton, removals, all_couplings(skeleton, tokens), block_runs(skeleton, tokens))


def zero_some(folder: Path, structure: Structure) -> None:
    """Zero random channels of every MLP and expert in a folder, its own in each, as many as are to go."""
    model, skeleton = reload(folder), skeleton_of(folder)
    state, generator = dict(model.state_dict()), torch.Generator().manual_seed(0)
    for cut in structure.cuts:
        block = skeleton.model.get_submodule(cut.block)
        gone = torch.randperm(cut.coupling.width, generator=generator)[: cut.count]

        def stored(local: str, block: Any = block, prefix: str = cut.block) -> Tensor | None:
            place = storage_of(block, local)
            return None if place is None else place[1](state[f"{prefix}.{place[0]}"])

        column = stored(f"{cut.coupling.consumer}.weight")
        assert column is not None
        column[(gone,) if cut.coupling.transposed else (slice(None), gone)] = 0
        for dependency in cut.coupling.dependencies:
            rows = torch.isin(dependency.single, gone)
            for kind in ("weight", "bias"):
                value = stored(f"{dependency.local}.{kind}")
                if value is not None:
                    value[(slice(None), rows) if dependency.transposed and value.dim() == 2 else (rows,)] = 0
    model.load_state_dict(state)
    model.save_pretrained(folder)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_channels_that_carry_nothing_are_chosen_and_change_nothing(
    model_type: str, refit: bool, tmp_path: Path
) -> None:
    source = save_tiny(model_type, tmp_path / "source")
    structure = structure_of(source)
    zero_some(source, structure)
    report = narrowed(tmp_path, model_type, refit=refit)
    dense, smaller = reload(source), reload(tmp_path / "out")
    tokens = random_tokens(3, seed=3)
    assert torch.allclose(whole_logits(smaller, tokens), whole_logits(dense, tokens), atol=1e-4 if refit else 1e-5)
    assert smaller.num_parameters() == report.model["parameters_left"] < dense.num_parameters()
    assert all(layer.error < 1e-6 for layer in report.layers)
    assert torch.equal(streamed_logits(skeleton_of(tmp_path / "out"), tokens), whole_logits(smaller, tokens))
    assert not verify_folder(tmp_path / "out").violations
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert report.sparsity["config"].items() <= config.items()


@pytest.mark.parametrize(
    "options", [{"method": "magnitude", "refit": False}, {"method": "wanda"}, {"method": "obs"}], ids=str
)
def test_a_single_expert_is_solved_as_the_dense_network_that_it_is(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statistics = streaming.StatisticsOptions

    def without_weights(**given: Any) -> Any:
        # The tokens of a dense MLP count by the residual stream behind it, those of an expert by their gate values: 1.
        return statistics(**{**given, "token_weights": False})

    monkeypatch.setattr(streaming, "StatisticsOptions", without_weights)
    alike = {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    dense = save_tiny("llama", tmp_path / "dense", **alike)
    one = {"num_local_experts": 1, "num_experts_per_tok": 1, "sliding_window": None}
    mixture = save_tiny("mixtral", tmp_path / "mixture", **one, **alike)
    values, names = on_disk(dense), {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    renamed = {}
    for name, value in values.items():
        head, _, last = name.rpartition(".mlp.")
        part = last.removesuffix(".weight")
        renamed[f"{head}.block_sparse_moe.experts.0.{names[part]}.weight" if head else name] = value
    rewrite(mixture, lambda tensors: {**tensors, **renamed})
    calib, tokens = token_file(tmp_path / "tokens.safetensors"), random_tokens(2, seed=5)
    difference = whole_logits(reload(mixture), tokens) - whole_logits(reload(dense), tokens)
    assert float(difference.abs().max()) < 1e-5
    found = {}
    for source in (dense, mixture):
        prune(job(source, tmp_path / "out" / source.name, calib, "channels:25%", **options))
        found[source.name] = on_disk(tmp_path / "out" / source.name)
    for name, value in found["dense"].items():
        head, _, last = name.rpartition(".mlp.")
        if not head:
            continue
        part = last.removesuffix(".weight")
        other = found["mixture"][f"{head}.block_sparse_moe.experts.0.{names[part]}.weight"]
        if part == "down_proj":
            assert torch.allclose(other, value, atol=1e-5)
        else:
            assert torch.equal(other, value)


def test_tokens_count_by_their_gate_values(tmp_path: Path) -> None:
    """The Gram of an expert that loses inputs is `Σ g² x xᵀ / Σ g²`: errors count as in the mixture's output."""
    save_tiny("mixtral", tmp_path, tokenizer=False)
    tokens, skeleton, structure, model = (
        random_tokens(),
        skeleton_of(tmp_path),
        structure_of(tmp_path),
        reload(tmp_path),
    )
    stream = stream_through(skeleton, tokens, chosen=frozenset(structure.by_name), removed=structure.by_name)
    blocks = iter(stream)
    block = next(blocks)
    owner, calls = model.model.layers[0].mlp.experts, []
    owner.register_forward_pre_hook(lambda _, args, kwargs: calls.append(RoutedCall.of(args, kwargs)), with_kwargs=True)
    whole_logits(model, tokens)
    call, checked = RoutedCall.joined(calls), 0
    for group in stream.groups(block):
        (ref,), stats = group.refs, group.problem.stats
        assert ref.expert is not None
        assert group.problem.removal is not None
        mine, gates = call.gates_of(ref.expert.index)
        rows = owner._apply_gate(call.hidden[mine] @ owner.gate_up_proj[ref.expert.index].T) * gates[:, None]
        assert stats.tokens == len(rows)
        if len(rows):
            assert torch.allclose(stats.gram, rows.T @ rows / gates.square().sum(), rtol=1e-3, atol=1e-6)
            assert stats.held is not None
            checked += 1
        group.write(unchanged(group.problem).layers, None)
    assert checked > 1


def test_an_expert_without_tokens_keeps_its_largest_channels_as_they_are(tmp_path: Path) -> None:
    source = save_tiny("qwen3_moe", tmp_path / "source", num_hidden_layers=1, num_experts=5)
    rewrite(source, lambda tensors: {n: _lonely(n, t) for n, t in tensors.items()})
    report = narrowed(tmp_path, "qwen3_moe")
    alone = [layer for layer in report.layers if not layer.tokens]
    assert alone
    before, after = on_disk(source), on_disk(tmp_path / "out")
    for layer in alone:
        old, new = (found[f"{layer.name}.weight"] for found in (before, after))
        kept = old.norm(dim=0).sort().indices[8:].sort().values
        assert torch.equal(new, old[:, kept])
        assert layer.status.startswith("no calibration token")


def _lonely(name: str, tensor: Tensor) -> Tensor:
    """A router `(5, hidden)` two of whose first four rows every token prefers to the last."""
    if not name.endswith("mlp.gate.weight"):
        return tensor
    return torch.stack([tensor[0], -tensor[0], 2 * tensor[0], -2 * tensor[0], 0 * tensor[0]])


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_fewer_and_narrower_experts(model_type: str, tmp_path: Path) -> None:
    asked = "channels:25%+experts:50%+2:4"
    source = save_tiny(model_type, tmp_path / "source")
    told = dry_run(job(source, tmp_path / "out", token_file(tmp_path / "tokens.safetensors"), asked))
    report = narrowed(tmp_path, model_type, asked, effort="balanced")
    model = reload(tmp_path / "out")
    experts = model.model.layers[0].mlp.experts
    assert sorted(experts.down_proj.shape) == [2, 64, 96]
    assert sorted(experts.gate_up_proj.shape) == [2, 64, 192]
    assert model.num_parameters() == report.model["parameters_left"] == told["model"]["parameters_left"]
    assert told["size"]["pruned"] == sum(tensor.nbytes for tensor in on_disk(tmp_path / "out").values())
    assert not verify_folder(tmp_path / "out").violations
    assert not [layer for layer in report.layers if ".experts.2." in layer.name]
    weight = experts.down_proj.mT if model_type == "gpt_oss" else experts.down_proj
    assert ((weight.reshape(-1, 4) == 0).sum(-1) >= 2).all()


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "nemotron_h"])
def test_the_weights_are_the_same_whatever_memory_there_is(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrowed(tmp_path, model_type, "channels:25%", out=tmp_path / "wide")
    monkeypatch.setattr("llmprune.model.skeleton.EXPERT_MEMORY", 1)
    narrowed(tmp_path, model_type, "channels:25%")
    found = [on_disk(tmp_path / name) for name in ("wide", "out")]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = narrowed(tmp_path, "qwen3_moe", out=tmp_path / "whole")
    with stopped_behind_the_first_block(monkeypatch):
        narrowed(tmp_path, "qwen3_moe")
    report = narrowed(tmp_path, "qwen3_moe")
    assert [layer.error for layer in report.layers] == [layer.error for layer in whole.layers]
    before, after = on_disk(tmp_path / "whole"), on_disk(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("model_type", "sparsity", "options", "message"),
    [
        ("mixtral", "channels:99%", {"round_to": 32}, "rounds to 0"),
        ("mixtral", "channels:100%", {}, "leaves none"),
        ("mixtral", "channels:25%", {"method": "scaling"}, "no learned scale multiplies the inputs of .*experts.0"),
        ("llama4_text", "channels:25%", {}, "do not say how gate and up lie"),
        ("dbrx", "channels:25%", {}, "do not say how gate and up lie"),
        ("jetmoe", "channels:25%", {}, "do not say how gate and up lie"),
    ],
)
def test_bad_input(model_type: str, sparsity: str, options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        narrowed(tmp_path, model_type, sparsity, **options)
    assert caught.value.hint
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))
