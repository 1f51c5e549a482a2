"""Where a layer's output joins the residual stream is found by watching, and only where that is really so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import (
    chosen,
    edit_tensor,
    random_tokens,
    recorded_inputs,
    reload,
    save_tiny,
    skeleton_of,
    stream_through,
    whole_logits,
)
from torch import Tensor, nn
from variants import prune_group

from llmprune.pruning.layer_solver import LayerSolver
from llmprune.pruning.linalg import relative_error
from llmprune.pruning.methods import load_method
from llmprune.pruning.pattern import NM
from llmprune.pruning.recipe import Recipe
from llmprune.streaming.hooks import BLOCK
from llmprune.streaming.stream import BlockStream


def twin_stream(folder: Path, memory: int = 2**30, samples: int = 5) -> BlockStream:
    skeleton = skeleton_of(folder)
    return stream_through(
        skeleton,
        random_tokens(samples),
        batch_tokens=48,
        chosen=chosen(skeleton),
        block_memory=memory,
        dense_stream=True,
    )


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": BLOCK}),
        ("qwen3", {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": BLOCK}),
        ("gpt2", {"attn.c_proj": "ln_2", "mlp.c_proj": BLOCK}),
        ("opt", {"self_attn.out_proj": "final_layer_norm", "fc2": BLOCK}),
        ("falcon", {"self_attention.dense": BLOCK, "mlp.dense_4h_to_h": BLOCK}),
        ("gpt_neox", {"mlp.dense_4h_to_h": BLOCK}),
        ("gemma3_text", {}),
        ("olmo2", {}),
    ],
)
def test_residual_adds(model_type: str, expected: dict[str, str], tmp_path: Path) -> None:
    save_tiny(model_type, tmp_path, tokenizer=False)
    stream = twin_stream(tmp_path)
    for block in stream:
        found = {}
        schedule = stream.groups(block)
        for number, group in enumerate(schedule):
            if number in schedule.analysis.residual_adds:
                found[group.refs[0].local] = schedule.analysis.residual_adds[number]
        assert found == expected


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1, 10, 100])
def test_residual_adds_are_found_beside_a_much_larger_stream(compute: torch.dtype, factor: int, tmp_path: Path) -> None:
    """Which is rounded by more than a layer adds to it."""
    save_tiny("llama", tmp_path, tokenizer=False, dtype=torch.bfloat16)
    edit_tensor(tmp_path, "model.embed_tokens.weight", lambda weight: weight.mul_(factor))
    skeleton = skeleton_of(tmp_path, compute=compute)
    stream = stream_through(skeleton, random_tokens(), batch_tokens=48, chosen=chosen(skeleton), dense_stream=True)
    for block in stream:
        schedule = stream.groups(block)
        for _ in schedule:
            pass
        assert schedule.analysis.residual_adds == {1: "post_attention_layernorm", 3: BLOCK}


@pytest.mark.parametrize("memory", [2**30, 0], ids=["pausing", "repeating"])
@pytest.mark.parametrize("model_type", ["llama", "falcon", "gpt2"])
def test_what_a_layer_lacks_is_what_the_stream_behind_it_lacks(model_type: str, memory: int, tmp_path: Path) -> None:
    """With the statistics of a residual add, the correction brings the stream nearer to the dense one than none."""
    save_tiny(model_type, tmp_path, tokenizer=False)

    def distance(targets: str) -> float:
        stream = twin_stream(tmp_path, memory, samples=24)
        solver = LayerSolver(load_method("sparsegpt"), Recipe("sparsegpt", targets=targets))  # type: ignore[arg-type]
        for block in stream:
            for group in stream.groups(block):
                solution = solver.solve(group.problem, NM(2, 4))
                group.write(solution.layers, solution.order)
        missed = [(b.hidden - b.dense).square().sum() for b in stream.inputs.batches if b.dense is not None]
        return float(torch.stack(missed).sum())

    assert distance("dense") < 0.95 * distance("pruned")


@pytest.mark.parametrize("memory", [2**30, 0], ids=["pausing", "repeating"])
def test_statistics_behind_a_layer_are_those_of_the_whole_models(memory: int, tmp_path: Path) -> None:
    """An independent pair of models, one dense and one with the layers before pruned, gives `XᵀE`."""
    save_tiny("llama", tmp_path, tokenizer=False)
    stream = twin_stream(tmp_path, memory)
    dense, plain = reload(tmp_path), reload(tmp_path)
    tokens = random_tokens(5)
    checked = 0
    for block in stream:
        schedule = stream.groups(block)
        for number, group in enumerate(schedule):
            stats, name = group.problem.stats, group.refs[0].name
            if stats.residual_cross is not None:
                after = "model.norm" if block.index else "model.layers.1.input_layernorm"
                add = schedule.analysis.residual_adds[number]
                place = f"{block.name}.{add}" if add else after
                seen: list[dict[str, list[Tensor]]] = []
                for model in (dense, plain):
                    with recorded_inputs(model, [name, place]) as found:
                        whole_logits(model, tokens)
                    seen.append(found)
                X = torch.cat(seen[1][name]).double().flatten(0, -2)
                E = (torch.cat(seen[0][place]) - torch.cat(seen[1][place])).double().flatten(0, -2)
                expected = X.T @ E / len(X)
                assert torch.allclose(
                    stats.residual_cross.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max() + 1e-3)
                )
                checked += 1
            prune_group(group)
            for ref in group.refs:
                plain.get_submodule(ref.name).weight.data.copy_(block.changed[f"{ref.name}.weight"])
    assert checked == 4


def disturb_biases(module: nn.Module) -> None:
    """Fresh biases are zero, and would not be missed."""
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))


def inputs_in(model: nn.Module, name: str, tokens: Tensor) -> Tensor:
    with recorded_inputs(model, [name]) as found:
        whole_logits(model, tokens)
    return torch.cat(found[name]).double().flatten(0, -2)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "falcon"])
def test_products_with_the_dense_outputs_are_those_of_the_whole_models(model_type: str, tmp_path: Path) -> None:
    """They give the error that the dense model's own inputs give, with or without biases."""
    save_tiny(model_type, tmp_path, tokenizer=False)
    stream, tokens = twin_stream(tmp_path), random_tokens(5)
    dense, plain = reload(tmp_path), reload(tmp_path)
    disturb_biases(dense)
    disturb_biases(plain)
    checked = 0
    for block in stream:
        disturb_biases(block.module)
        for group in stream.groups(block):
            stats, (ref, *others) = group.problem.stats, group.refs
            if stats.output_cross is not None and stats.output_energy is not None:
                assert not others
                weight = group.problem.layers[0].weight
                X, Y = inputs_in(plain, ref.name, tokens), inputs_in(dense, ref.name, tokens) @ weight.double().T
                assert torch.allclose(stats.output_cross.double(), X.T @ Y / len(X), rtol=1e-3, atol=1e-5)
                assert torch.allclose(stats.output_energy.double(), Y.square().mean(0), rtol=1e-3, atol=1e-7)
                pruned = weight.sign()
                expected = float((X @ pruned.double().T - Y).square().sum() / Y.square().sum())
                assert relative_error(weight, pruned, stats) == pytest.approx(expected, rel=1e-3)
                checked += 1
            prune_group(group)
            for ref in group.refs:
                changed = block.changed[f"{ref.name}.weight"]
                plain.get_submodule(ref.name).weight.data.copy_(changed)
    assert checked >= 2
