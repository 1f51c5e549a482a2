"""Experts that exceed the memory for them are read one by one, and pruned to the same weights."""

from __future__ import annotations

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
    skeleton_of,
    streamed_logits,
    token_file,
    whole_logits,
)
from quantised import save_mxfp4

from llmprune import prune
from llmprune.model.expert_slices import SliceCache, SlicedValues
from llmprune.streaming.stream import BlockStream

FUSED = ("gpt_oss", "mixtral", "qwen3_moe", "nemotron_h")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Room for one matrix of an expert; the numbers of those that are read."""
    numbers: list[int] = []
    read = SlicedValues._read

    def counted(self: SlicedValues, index: int, written: bool) -> torch.Tensor:
        numbers.append(index)
        return read(self, index, written)

    monkeypatch.setattr(SlicedValues, "_read", counted)
    return numbers


def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.model.skeleton.EXPERT_MEMORY", 1)


@pytest.mark.parametrize("model_type", FUSED)
def test_a_model_whose_experts_are_read_one_by_one_computes_the_same(
    model_type: str, read: list[int], tmp_path: Path
) -> None:
    save_tiny(model_type, tmp_path, tokenizer=False)
    tokens = random_tokens()
    assert torch.equal(
        streamed_logits(skeleton_of(tmp_path, expert_memory=1), tokens), whole_logits(reload(tmp_path), tokens)
    )
    assert set(read) == set(range(4))


@pytest.mark.parametrize("options", [{"effort": "fast"}, {"effort": "balanced"}, {"only": ("*down_proj",)}], ids=str)
@pytest.mark.parametrize("model_type", FUSED)
def test_the_weights_are_the_same_whatever_memory_there_is(
    model_type: str, options: dict[str, Any], read: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, calib = save_tiny(model_type, tmp_path / "source"), token_file(tmp_path / "tokens.safetensors")
    found = []
    for room in ("wide", "narrow"):
        assert not read
        if room == "narrow":
            narrow(monkeypatch)
        prune(job(source, tmp_path / room, calib, **options))
        found.append(on_disk(tmp_path / room))
    assert read
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize("model_type", ["gpt_oss", "mixtral"])
def test_repeated_forwards_and_another_dtype_find_the_same(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmprune.streaming.stream.BLOCK_MEMORY", 0)
    source, calib = save_tiny(model_type, tmp_path / "source"), token_file(tmp_path / "tokens.safetensors")
    found = []
    for room in ("wide", "narrow"):
        if room == "narrow":
            narrow(monkeypatch)
        prune(job(source, tmp_path / room, calib, effort="balanced", dtype="bfloat16"))
        found.append(on_disk(tmp_path / room))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_experts_in_four_bits_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, calib = save_mxfp4(tmp_path / "source"), token_file(tmp_path / "tokens.safetensors")
    found = []
    for room in ("wide", "narrow"):
        if room == "narrow":
            narrow(monkeypatch)
        prune(job(source, tmp_path / room, calib, effort="balanced"))
        found.append(on_disk(tmp_path / room))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_what_is_trained_is_loaded_whole(read: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch)
    source, calib = save_tiny("mixtral", tmp_path / "source"), token_file(tmp_path / "tokens.safetensors")
    in_stream: list[int] = []
    groups = BlockStream.groups

    def noted(self: BlockStream, block: Any) -> Any:
        in_stream.append(len(read))
        return groups(self, block)

    monkeypatch.setattr(BlockStream, "groups", noted)
    prune(job(source, tmp_path / "out", calib, method="wanda", reconstruct=1))
    assert in_stream[0] == in_stream[1]


def test_the_cache_holds_what_was_used_last_within_its_limit() -> None:
    cache, made = SliceCache(3 * 4), []

    def get(key: int, size: int = 1) -> None:
        cache.get(key, lambda: made.append(key) or torch.zeros(size))  # type: ignore[func-returns-value]

    for key in (0, 1, 2, 0, 3, 0, 1):
        get(key)
    assert made == [0, 1, 2, 3, 1]
    assert cache.nbytes == 12
    get(4, size=5)
    assert cache.nbytes == 20
    cache.drop(4)
    assert cache.nbytes == 0
