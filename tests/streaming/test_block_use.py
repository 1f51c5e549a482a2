"""How well a block compensates those behind it, against plain regressions of a whole model in memory."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import random_tokens, reload, save_tiny, skeleton_of
from torch import Tensor

from llmprune.model.selection import make_plan
from llmprune.pruning.blocks import load_block_criterion
from llmprune.pruning.blocks.problem import BlockUse
from llmprune.pruning.dense_targets import TARGET_DAMPING
from llmprune.streaming.block_use import LONGEST as USUAL
from llmprune.streaming.block_use import block_use, longest_run
from llmprune.streaming.stream import BlockStream, Observe

BLOCKS, LONGEST = 5, 3


def slow_error(before: Tensor, behind: Tensor, inputs: Tensor) -> float:
    """The error on the last quarter of the tokens, of a ridge regression on the others, in float64."""
    missing, held = behind - before, len(before) // 4
    weight = before.square().mean(1).sqrt().reciprocal()[:, None]
    rows, targets = (inputs * weight)[:-held], (missing * weight)[:-held]
    gram = rows.T @ rows
    ridge = TARGET_DAMPING * gram.diagonal().mean()
    found = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), rows.T @ targets)
    scale = behind[-held:].square().mean(1).sqrt().reciprocal()[:, None]
    rest, guess = missing[-held:] * scale, inputs[-held:] @ found * scale
    strength = ((rest * guess).sum() / guess.square().sum()).clamp(0, 1)
    return float((rest - strength * guess).square().sum(1).mean() / behind.shape[1])


@torch.no_grad()
def test_errors_are_those_of_plain_regressions(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, num_hidden_layers=BLOCKS)
    tokens, skeleton = random_tokens(8, 32), skeleton_of(tmp_path)
    stream = BlockStream(skeleton, tokens, Observe(make_plan(skeleton, None).names))
    use, adders = block_use(stream, LONGEST)

    model, inputs = reload(tmp_path).double(), []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    hidden: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, output: hidden.append(output.flatten(0, 1)))
    first = model.model.embed_tokens(tokens).flatten(0, 1)
    model(tokens)

    assert adders == tuple(
        f"model.layers.{index}.{local}" for index in range(BLOCKS) for local in ("self_attn.o_proj", "mlp.down_proj")
    )
    streams = [first, *hidden]
    for index in range(BLOCKS):
        cosine = torch.nn.functional.cosine_similarity(streams[index], streams[index + 1], dim=-1).mean()
        assert float(use.influence[index]) == pytest.approx(1 - float(cosine), abs=1e-5)
    for start in range(BLOCKS):
        for length in range(1, LONGEST + 1):
            found = float(use.repaired[start, length - 1])
            if start == 0 or start + length > BLOCKS:
                assert found == math.inf
            else:
                wanted = slow_error(streams[start], streams[start + length], inputs[start - 1])
                assert found == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("blocks", [2, 3, 10, 30])
def test_runs_are_long_enough_for_any_number_of_blocks(blocks: int) -> None:
    for removed in range(1, blocks):
        longest = longest_run(blocks, removed)
        use = BlockUse(torch.empty(blocks), torch.ones(blocks, longest, dtype=torch.float64))
        found = load_block_criterion("repair").select(use, removed)
        assert len(found) == removed
        assert 0 not in found
        assert longest >= min(USUAL, removed)
