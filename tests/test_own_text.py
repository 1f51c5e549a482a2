"""The dense model's own text: drawn from its very distribution, from places in the calibration text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import random_tokens, reload, save_tiny, skeleton_of

from llmprune import own_text
from llmprune.errors import InputError
from llmprune.own_text import check_room, whole_bytes, write_text


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "gemma3_text", "falcon", "opt", "mamba"])
def test_windows_go_on_from_the_text(model_type: str, tmp_path: Path) -> None:
    save_tiny(model_type, tmp_path, tokenizer=False)
    skeleton, text = skeleton_of(tmp_path), random_tokens(3, 40)
    written = write_text(skeleton, text, 7, at_once=4)
    assert written.shape == (7, 40)
    assert written.dtype == torch.int64
    assert int(written.max()) < skeleton.config.get_text_config().vocab_size
    runs = {tuple(run.tolist()) for row in text for run in row.unfold(0, own_text.PROMPT, 1)}
    for number, row in enumerate(written):
        own = {tuple(run.tolist()) for run in text[number % 3].unfold(0, own_text.PROMPT, 1)}
        assert tuple(row[: own_text.PROMPT].tolist()) in own <= runs
    # Nothing stays in memory.
    assert all(parameter.device.type == "meta" for parameter in skeleton.model.parameters())


def test_tokens_are_drawn_from_the_models_distribution(tmp_path: Path) -> None:
    """Given what stands before them, as often as the softmax says, as far as chance goes."""
    save_tiny("llama", tmp_path, tokenizer=False)
    model = reload(tmp_path)
    model.lm_head.weight.data.mul_(8)
    model.save_pretrained(tmp_path)
    text = random_tokens(1, 32)[:, :20]
    written = write_text(skeleton_of(tmp_path), text, 3000, at_once=1000)
    with torch.no_grad():
        chances = model(written).logits[:, :-1].double().softmax(-1)
    drawn = written[:, 10:]
    chances = chances[:, 9:]
    # The chance that each draw had, against what it has on average: Σ p² of its distribution.
    had, expected = chances.gather(-1, drawn[..., None])[..., 0], chances.square().sum(-1)
    spread = (chances.pow(3).sum(-1) - expected.square()).sum().sqrt()
    assert float(expected.mean()) > 2 / chances.shape[-1]
    assert abs(float((had - expected).sum() / spread)) < 4


def test_the_seed_decides_and_the_callers_numbers_stay(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, tokenizer=False)
    skeleton, text = skeleton_of(tmp_path), random_tokens(3, 40)
    torch.manual_seed(5)
    before = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (write_text(skeleton, text, 4, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_model_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path, tokenizer=False)
    skeleton = skeleton_of(tmp_path)
    assert whole_bytes(skeleton) == sum(p.numel() * 4 for p in reload(tmp_path).parameters())
    check_room(skeleton)
    monkeypatch.setattr(own_text, "memory_of", lambda _: 2 * whole_bytes(skeleton) - 1)
    with pytest.raises(InputError, match="whole model"):
        check_room(skeleton)
