"""On another device than the CPU: pretended, so that no tensor is made on the wrong one unseen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import chosen, random_tokens, save_tiny, skeleton_of, stream_through
from pretend import FAR, pretended_device
from torch import Tensor

from llmprune.errors import InputError
from llmprune.pipeline.allocation import allocate
from llmprune.pruning.criteria import CRITERIA, load_criterion
from llmprune.pruning.layer_solver import LayerSolver
from llmprune.pruning.methods import METHODS, load_method
from llmprune.pruning.pattern import NM, Unstructured, parse_pattern
from llmprune.pruning.problem import GroupProblem, LayerProblem, UnitRemoval
from llmprune.pruning.recipe import Recipe
from llmprune.pruning.statistics import RunningPair, ZeroCounter
from llmprune.pruning.structured_solver import StructuredSolver
from llmprune.runtime.device import pick_device
from llmprune.runtime.process_group import SINGLE
from llmprune.streaming.block_reconstruction import Peers, reconstruct_block

NEAR = torch.device("cpu")


def test_the_pretended_device_refuses_what_a_gpu_refuses() -> None:
    near = torch.arange(3.0)
    with pretended_device():
        far = near.to(FAR)
        assert far.device == FAR
        assert (far * 2 + torch.tensor(1.0)).device == FAR
        assert far[torch.tensor([2, 0])].tolist() == [2, 0]
        assert torch.zeros(2, device=FAR).device == FAR
        assert torch.equal(far.cpu(), near)
        assert near.copy_(far).device == NEAR
        for meet in (lambda: far + near, lambda: near @ far, lambda: near[far.long()], lambda: torch.cat([far, near])):
            with pytest.raises(RuntimeError, match="same device"):
                meet()
        with pytest.raises(TypeError, match="numpy"):
            far.numpy()


def test_a_device_without_float64_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def without(*shape: int, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
        if dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return empty(*shape, dtype=dtype, **options)

    monkeypatch.setattr(torch, "empty", without)
    with pytest.raises(InputError, match="no float64") as caught:
        pick_device("cpu")
    assert "--device cpu" in caught.value.hint


def pruned_blocks(folder: Path, device: torch.device) -> list[dict[str, Tensor]]:
    """The tensors of all blocks after every stage there is, for weights."""
    skeleton = skeleton_of(folder, device=device)
    recipe = Recipe("admm", targets="dense", permute=True, ridge=0.3, steps=2, refit=True)
    solver = LayerSolver(load_method("admm"), recipe)
    stream = stream_through(
        skeleton,
        random_tokens(8),
        batch_tokens=48,
        chosen=chosen(skeleton),
        dense_stream=True,
        permute=True,
        reconstruct=True,
    )
    found = []
    for block in stream:
        for group in stream.groups(block):
            solution = solver.solve(group.problem, NM(2, 4))
            group.write(solution.layers, solution.order)
        reconstruct_block(block, Peers(SINGLE, stream.sharding.batches), 1)
        found.append({name: tensor.clone() for name, tensor in block.export()})
        block.finish()
    assert not stream.immovable
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "phi3"])
def test_blocks_are_pruned_alike_on_another_device(family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / "m", tokenizer=False)
    expected = pruned_blocks(folder, NEAR)
    with pretended_device():
        found = pruned_blocks(folder, FAR)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["error", "owl"])
def test_shares_are_found_on_another_device(kind: str, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "m", tokenizer=False)
    pattern = parse_pattern("70%")
    assert isinstance(pattern, Unstructured)
    with pretended_device():
        skeleton = skeleton_of(folder, device=FAR)
        stream = stream_through(skeleton, random_tokens(8), batch_tokens=48, chosen=chosen(skeleton))
        assert len(
            allocate(stream, pattern, kind, LayerSolver(load_method("admm"), Recipe("admm")), lambda: None)
        ) == len(skeleton.blocks)  # type: ignore[arg-type]


def problem_on(device: torch.device) -> GroupProblem:
    generator = torch.Generator().manual_seed(0)
    inputs, noise, weight = (torch.randn(*shape, generator=generator) for shape in ((300, 16), (300, 16), (8, 16)))
    weight[0, :3] = 0
    running = RunningPair(16, device, ZeroCounter(16, 0.1, device=device))
    running.add(inputs.to(device), (inputs + 0.1 * noise).to(device))
    return GroupProblem((LayerProblem("layer", weight.to(device)),), running.result())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("pattern", ["2:4", "50%"])
@pytest.mark.parametrize("scope", ["row", "layer"])
def test_methods_solve_on_another_device(name: str, pattern: str, scope: str) -> None:
    with pretended_device():
        problem = problem_on(FAR)
        problem = replace(problem, stats=replace(problem.stats, scale=torch.rand(16).to(FAR)))
        (solution,) = load_method(name).solve(problem, parse_pattern(pattern, scope))  # type: ignore[arg-type]
        assert solution.weight.device == FAR


@pytest.mark.parametrize("name", CRITERIA)
def test_inputs_are_removed_on_another_device(name: str) -> None:
    with pretended_device():
        recipe = Recipe("admm", targets="dense", permute=True, steps=2)
        solver = StructuredSolver(load_criterion(name, {}), recipe, LayerSolver(load_method("admm"), recipe))
        scale = torch.rand(16, dtype=torch.float64) if "channel_scale" in solver.needs else None
        removal = UnitRemoval(torch.arange(16).view(1, 16, 1), 8, scale)
        problem = replace(problem_on(FAR), classes=(torch.arange(16)[None],), removal=removal)
        found = solver.solve(problem, NM(2, 4))
        assert found.layers[0].weight.device == FAR
        assert found.order is not None
        assert len(found.order) == 8
