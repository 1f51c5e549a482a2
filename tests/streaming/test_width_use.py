"""What the stream loses with some heads or channels, against plain regressions of a whole model in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import random_tokens, reload, save_tiny, skeleton_of
from torch import Tensor

from llmprune.pruning.criteria.reconstruct import DEFAULT_RIDGE, SCALE_FLOOR
from llmprune.pruning.criteria.scores import Wanda
from llmprune.streaming.stream import BlockStream, Observe, Resources
from llmprune.streaming.width_use import width_use
from llmprune.structure.coupling import Coupling
from llmprune.structure.cut import Cut

HEAD, CHANNELS = 8, 40


def slow_error(weight: Tensor, inputs: Tensor, residual: Tensor, groups: int, count: int, fitted: Tensor) -> float:
    """Channels, or groups of them, go by Wanda's score; a ridge regression fits the others; tokens are held out."""
    rows = inputs / residual.square().mean(1).sqrt()[:, None]
    some, held = rows[fitted], rows[~fitted]
    gram = some.T @ some / len(some)
    score = (weight.norm(dim=0) * gram.diagonal().sqrt()).view(-1, weight.shape[1] // groups).sum(1)
    if groups == weight.shape[1]:
        score = weight.norm(dim=0) * gram.diagonal().sqrt()
    gone = score.argsort()[:count]
    size = weight.shape[1] // groups
    kept = torch.tensor([index for index in range(weight.shape[1]) if index // size not in gone.tolist()])
    ridge = DEFAULT_RIDGE * (gram.diagonal() + SCALE_FLOOR * gram.diagonal().mean())
    matrix = gram + torch.diag(ridge)
    found = torch.zeros_like(weight)
    found[:, kept] = torch.linalg.solve(matrix[kept][:, kept], (weight @ matrix)[:, kept].T).T
    return float((held @ (found - weight).T).square().mean())


@torch.no_grad()
def test_errors_are_those_of_plain_regressions(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": CHANNELS, "num_attention_heads": 4, "num_key_value_heads": 4}
    save_tiny("llama", tmp_path, num_hidden_layers=3, head_dim=HEAD, **sizes)
    tokens, skeleton = random_tokens(8, 32), skeleton_of(tmp_path)
    cuts = {}
    for index in range(3):
        block = skeleton.block_name(index)
        for local, width, groups in (("self_attn.o_proj", 32, 4), ("mlp.down_proj", CHANNELS, CHANNELS)):
            units = torch.arange(width).view(1, groups, width // groups)
            coupling = Coupling(local, False, width, (), ())
            cuts[f"{block}.{local}"] = [Cut("channels", block, coupling, units, count) for count in (1, groups // 2)]
    observe = Observe(frozenset(cuts), dense_stream=True, removed={name: own[0] for name, own in cuts.items()})
    stream = BlockStream(skeleton, tokens, observe, Resources(2 * 32))
    fitted = torch.cat([_fitted(batch.tokens.numel(), batch.fitted) for batch in stream.inputs.batches])
    found = width_use(stream, cuts, Wanda())

    model = reload(tmp_path).double()
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name in cuts:
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].flatten(0, 1)}))
        if name.endswith("post_attention_layernorm"):
            at = name.replace("post_attention_layernorm", "self_attn.o_proj residual")
            module.register_forward_pre_hook(lambda _, args, at=at: seen.update({at: args[0].flatten(0, 1)}))
    hidden: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, output: hidden.append(output.flatten(0, 1)))
    model(tokens)
    for index in range(3):
        for local, groups in (("self_attn.o_proj", 4), ("mlp.down_proj", CHANNELS)):
            name = f"model.layers.{index}.{local}"
            residual = seen[f"{name} residual"] if local == "self_attn.o_proj" else hidden[index]
            weight = model.get_submodule(name).weight
            wanted = [slow_error(weight, seen[name], residual, groups, count, fitted) for count in (1, groups // 2)]
            assert found[name] == pytest.approx(wanted, rel=1e-3)


def _fitted(tokens: int, count: int) -> Tensor:
    """Which tokens of a batch are not held out."""
    return torch.arange(tokens) < count
