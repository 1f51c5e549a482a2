"""Variants of tiny models, and toy blocks whose couplings are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers import (
    TOY_BLOCKS,
    Plain,
    save_tiny,
    toy_block,
)
from torch import Tensor, nn

from llmprune.model.blocks import LayerRef
from llmprune.pruning.methods import load_method
from llmprune.pruning.pattern import NM
from llmprune.pruning.problem import LayerSolution
from llmprune.streaming.schedule import Group
from llmprune.structure.coupling import Coupling
from llmprune.structure.find_couplings import find_couplings

EXTRA: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon-new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "llama-bias": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "lfm2": ("lfm2", {"intermediate_size": 240, "block_multiple_of": 8}),
}


def source_of(name: str, folder: Path, **options: Any) -> Path:
    model_type, extra = EXTRA.get(name, (name, {}))
    return save_tiny(model_type, folder, **{**extra, **options})


def toy_couplings(kind: str, width: int = 16) -> list[Coupling]:
    torch.manual_seed(0)
    block = TOY_BLOCKS[kind](width)
    shared: dict[str, Tensor] = {}
    layers = [
        LayerRef(local, local, tuple(module.weight.shape), False)  # type: ignore[arg-type]
        for local, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]

    def run(module: nn.Module, hidden: Tensor) -> Any:
        shared.clear()
        return (module(hidden, shared) if kind == "Leaking" else module(hidden)), shared

    return find_couplings(block, run, torch.zeros(1, 8, width), layers)


PATTERN = NM(2, 4)


def prune_group(group: Group) -> list[LayerSolution]:
    solutions = load_method("sparsegpt").solve(group.problem, PATTERN)
    group.write(solutions, None)
    return solutions


@toy_block
class Odd(nn.Module):
    """Gate and up interleaved, reversed, and a LayerNorm before the sink."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fused, self.norm, self.down = (
            nn.Linear(width, 4 * width),
            nn.LayerNorm(2 * width),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.fused(x).unflatten(-1, (-1, 2)).unbind(-1)
        return x + self.down(self.norm((gate.relu() * up).flip(-1)))


@toy_block
class Experts(nn.Module):
    """Three experts as plain linear layers; a token goes to the one that its first feature names, never to the last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Plain(width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        choice = (x[..., 0] > 0).long()
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            if bool((choice == number).any()):
                out[choice == number] = expert(x[choice == number])
        return x + out
