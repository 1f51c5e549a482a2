"""One block in memory at a time, whatever the number of blocks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import VOCAB, random_tokens, token_file
from safetensors.torch import save_file
from transformers import LlamaConfig

HIDDEN, FEED = 1024, 1536
BLOCK = 4 * (4 * HIDDEN**2 + 3 * HIDDEN * FEED)
"""Bytes of a block in float32."""
SCRIPT = """
import resource, sys
from pathlib import Path
from llmprune import Job, prune

model, out, calib, method = sys.argv[1:]
prune(Job(model, "2:4", method, calib=calib, out=Path(out), evaluate=False, device="cpu", threads=1))
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


def start(blocks: int, work: Path) -> subprocess.Popen[str]:
    """A run in a process of its own, which prints its peak resident memory."""
    model = llama_of(blocks, work / f"model{blocks}")
    calib = token_file(work / f"tokens{blocks}.safetensors", random_tokens(4, 32))
    command = [sys.executable, "-c", SCRIPT, str(model), str(work / f"out{blocks}"), str(calib), "wanda"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_sixteen_blocks_take_no_more_memory_than_four(work: Path) -> None:
    peaks = []
    for process in [start(blocks, work) for blocks in (4, 16)]:
        out, errors = process.communicate()
        assert process.returncode == 0, errors
        peaks.append(int(out.split()[-1]) * (1 if sys.platform == "darwin" else 1024))
    few, many = peaks
    assert abs(many - few) < BLOCK
