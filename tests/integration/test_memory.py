"""One block in memory at a time, whatever the number of blocks."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCAB, job, random_tokens, save_tiny, token_file
from safetensors.torch import save_file
from transformers import LlamaConfig

from llmprune import prune
from llmprune.streaming.block import Block

HIDDEN, FEED = 1024, 1536
LENGTH = 128
BLOCK = 4 * (4 * HIDDEN**2 + 3 * HIDDEN * FEED)
"""Bytes of a block in float32."""
SCRIPT = """
import resource, sys
from pathlib import Path
from llmprune import Job, prune
from llmprune.streaming import stream

model, out, calib, method, memory = sys.argv[1:]
stream.BLOCK_MEMORY = 2 * int(memory)
options = {"evaluate": False, "device": "cpu", "threads": 1, "activation_memory": int(memory)}
prune(Job(model, "2:4", method, calib=calib, out=Path(out), **options))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def llama_of(blocks: int, folder: Path) -> Path:
    """A Llama of equal blocks, bfloat16 on disk, a file a block."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FEED,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    torch.manual_seed(0)
    attention = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
    shapes = attention | {f"mlp.{n}_proj": (FEED, HIDDEN) for n in ("gate", "up")} | {"mlp.down_proj": (HIDDEN, FEED)}
    block = {f"{name}.weight": (torch.randn(shape) * 0.02).bfloat16() for name, shape in shapes.items()}
    norms = {f"{name}_layernorm.weight": torch.ones(HIDDEN).bfloat16() for name in ("input", "post_attention")}
    index = {}
    for number in range(blocks):
        file = f"model-{number + 1:05d}.safetensors"
        tensors = {f"model.layers.{number}.{name}": tensor for name, tensor in (block | norms).items()}
        if number == 0:
            tensors["model.embed_tokens.weight"] = torch.randn(VOCAB, HIDDEN).bfloat16()
            tensors["model.norm.weight"] = torch.ones(HIDDEN).bfloat16()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)


def start(model: Path, calib: Path, memory: int = 2**31) -> subprocess.Popen[str]:
    """A run in a process of its own, which prints its peak resident memory."""
    out = calib.with_suffix(".out")
    command = [sys.executable, "-c", SCRIPT, str(model), str(out), str(calib), "wanda", str(memory)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def peaks(processes: list[subprocess.Popen[str]]) -> list[int]:
    """What the runs took, in bytes."""
    found = []
    for process in processes:
        out, errors = process.communicate()
        assert process.returncode == 0, errors
        found.append(int(out.split()[-1]) * (1 if sys.platform == "darwin" else 1024))
    return found


def test_sixteen_blocks_take_no_more_memory_than_four(work: Path) -> None:
    texts = {blocks: token_file(work / f"{blocks}.safetensors", random_tokens(4, 32)) for blocks in (4, 16)}
    few, many = peaks([start(llama_of(blocks, work / f"model{blocks}"), text) for blocks, text in texts.items()])
    assert abs(many - few) < BLOCK


def test_beyond_the_budget_four_times_the_text_takes_no_more_memory(work: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "max_position_embeddings": LENGTH}
    model = save_tiny("llama", work / "model", **sizes)
    budget, windows = 4 * 2**20, (128, 512)
    texts = [token_file(work / f"{many}.safetensors", random_tokens(many, LENGTH)) for many in windows]
    few, many = peaks([start(model, text, budget) for text in texts])
    # Of hidden states alone, what enters a block and what leaves it.
    more = 2 * 4 * 256 * LENGTH * (windows[1] - windows[0])
    assert many - few < more / 8


@pytest.mark.parametrize("sparsity", ["2:4", "experts:50%+2:4"])
def test_no_block_waits_for_the_collector_of_cycles(
    sparsity: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny("qwen3_moe", tmp_path / "source", num_hidden_layers=4)
    blocks: list[weakref.ref[Block]] = []
    alive: list[int] = []
    make = Block.__init__

    def noted(self: Block, *args: Any) -> None:
        alive.append(sum(block() is not None for block in blocks))
        blocks.append(weakref.ref(self))
        make(self, *args)

    monkeypatch.setattr(Block, "__init__", noted)
    gc.collect()
    gc.disable()
    try:
        prune(job(source, tmp_path / "out", token_file(tmp_path / "tokens.safetensors"), sparsity, effort="balanced"))
    finally:
        gc.enable()
    # The loop still holds the one before.
    assert alive[:4] == [0, 1, 1, 1]
