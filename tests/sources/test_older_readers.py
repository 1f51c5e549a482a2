"""A folder that is made here says to readers from before transformers 5 what it says to transformers 5."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import write_gguf
from helpers import tiny_config, word_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmprune.progress import Progress
from llmprune.sources.gguf import cached_gguf
from llmprune.sources.older_readers import add_older_keys

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 2e4, "factor": 2.5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "a base": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
    "linear": ("qwen2", {"rope_parameters": LINEAR}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "yarn": ("qwen3", {"rope_parameters": YARN}),
    "a part of the head": ("stablelm", {"rope_parameters": {"rope_theta": 3e4, "partial_rotary_factor": 0.5}}),
    "a local base": ("gemma3_text", {}),
    "a local base, scaled": (
        "gemma3_text",
        {"rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        }},
    ),
}  # fmt: skip


def older_frequencies(config: Mapping[str, Any], base: str = "rope_theta") -> Tensor:
    """The frequencies of `rope_theta` and `rope_scaling`, by the formulas of their papers, without `rope_parameters`.

    RoFormer (arXiv 2104.09864), position interpolation (2306.15595), YaRN (2309.00071), Llama 3.1 (2407.21783).
    """
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    size = int(head * config.get("partial_rotary_factor", 1.0))
    plain = config[base] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    scaling = config.get("rope_scaling") if base == "rope_theta" else None
    if scaling is None:
        return plain
    kind, factor = scaling["rope_type"], scaling["factor"]
    if kind == "linear":
        return plain / factor
    # Of the positions of the first training: how often every frequency turns, and from where to where it is scaled.
    turns = plain * scaling["original_max_position_embeddings"] / (2 * math.pi)
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    else:
        trained = scaling["original_max_position_embeddings"]
        ends = [
            size * math.log(trained / (2 * math.pi * turn)) / math.log(config[base]) / 2
            for turn in (scaling.get("beta_fast", 32), scaling.get("beta_slow", 1))
        ]
        first, last = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), size - 1)
        kept = 1 - ((torch.arange(size // 2) - first) / max(last - first, 0.001)).clamp(0, 1)
    return kept * plain + (1 - kept) * plain / factor


@pytest.mark.parametrize("name", MODELS)
def test_the_older_keys_give_the_frequencies_of_the_model(name: str, tmp_path: Path) -> None:
    model_type, options = MODELS[name]
    tiny_config(model_type, **options).save_pretrained(tmp_path)
    word_tokenizer(10).save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path)
    add_older_keys(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    after = AutoConfig.from_pretrained(tmp_path)
    assert after.rope_parameters == before.rope_parameters
    buffers = dict(AutoModelForCausalLM.from_config(after).model.rotary_emb.named_buffers())
    local = "rope_local_base_freq" in config
    assert local == ("local" in name)
    wanted = {"full_attention_inv_freq" if local else "inv_freq": older_frequencies(config)}
    if local:
        wanted["sliding_attention_inv_freq"] = older_frequencies(config, "rope_local_base_freq")
    for buffer, frequencies in wanted.items():
        torch.testing.assert_close(buffers[buffer].double(), frequencies, rtol=1e-5, atol=0)


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "mamba", "gemma4_text", "gemma2", "phi3", "olmo2", "gpt_neox"])
def test_transformers_reads_the_same_with_the_older_keys(model_type: str, tmp_path: Path) -> None:
    tiny_config(model_type).save_pretrained(tmp_path)
    word_tokenizer(10).save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path).to_dict()
    add_older_keys(tmp_path)
    after = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert {key: after[key] for key in before} == before


def test_a_converted_file_says_nothing_of_where_it_was_made(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", rope={"freq_base": 1e5})
    folder = cached_gguf(file, tmp_path / "cache", Progress())
    assert not any(str(tmp_path) in path.read_text() for path in folder.glob("*.json"))
    config, tokenizer = (json.loads((folder / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e5
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]
    assert not {"is_local", "local_files_only", "name_or_path", "_name_or_path"} & (config.keys() | tokenizer.keys())
    loaded = AutoTokenizer.from_pretrained(folder)
    direct = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    text = "word1 word2 new </s> word3"
    assert loaded(text)["input_ids"] == direct(text)["input_ids"]
    assert loaded.special_tokens_map == direct.special_tokens_map
