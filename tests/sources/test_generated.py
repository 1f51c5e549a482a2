"""Self-generated windows follow the dense model's distribution and start with pieces of the calibration text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import random_tokens, reload, save_tiny, skeleton_of, token_file
from safetensors import SafetensorError
from torch import Tensor

from llmprune import Job, prune
from llmprune.errors import InputError, PruneError
from llmprune.model.skeleton import Skeleton
from llmprune.run import dry_run
from llmprune.sources import generated
from llmprune.sources.generated import (
    MAX_BATCH_SIZE,
    generate,
    generation_batch_size,
    model_bytes,
    sample_prompts,
    window_bytes,
)


def generated_windows(
    skeleton: Skeleton, text: Tensor, windows: int, seed: int = 0, batch_size: int = MAX_BATCH_SIZE
) -> Tensor:
    return generate(skeleton, sample_prompts(text, windows, seed), text.shape[1], seed, batch_size)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "gemma3_text", "falcon", "opt", "mamba"])
def test_windows_continue_the_text(model_type: str, tmp_path: Path) -> None:
    save_tiny(model_type, tmp_path, tokenizer=False)
    skeleton, text = skeleton_of(tmp_path), random_tokens(3, 40)
    written = generated_windows(skeleton, text, 7, batch_size=4)
    assert written.shape == (7, 40)
    assert written.dtype == torch.int64
    assert int(written.max()) < skeleton.config.get_text_config().vocab_size
    runs = {tuple(run.tolist()) for row in text for run in row.unfold(0, generated.PROMPT_TOKENS, 1)}
    for number, row in enumerate(written):
        own = {tuple(run.tolist()) for run in text[number % 3].unfold(0, generated.PROMPT_TOKENS, 1)}
        assert tuple(row[: generated.PROMPT_TOKENS].tolist()) in own <= runs
    # Nothing stays in memory.
    assert all(parameter.device.type == "meta" for parameter in skeleton.model.parameters())


def test_tokens_are_drawn_from_the_models_distribution(tmp_path: Path) -> None:
    """With the frequencies of the softmax given the prefix, up to chance."""
    save_tiny("llama", tmp_path, tokenizer=False)
    model = reload(tmp_path)
    model.lm_head.weight.data.mul_(8)
    model.save_pretrained(tmp_path)
    text = random_tokens(1, 32)[:, :20]
    written = generated_windows(skeleton_of(tmp_path), text, 3000, batch_size=1000)
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
    first, again, other = (generated_windows(skeleton, text, 4, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_model_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path, tokenizer=False)
    skeleton = skeleton_of(tmp_path)
    assert model_bytes(skeleton) == sum(p.numel() * 4 for p in reload(tmp_path).parameters())
    assert generation_batch_size(skeleton, 40) == generated.MAX_BATCH_SIZE
    whole, window = model_bytes(skeleton), window_bytes(skeleton, 40)
    for windows, there in ((1, 2 * (whole + window)), (3, 2 * (whole + 4 * window) - 1)):
        monkeypatch.setattr(generated, "device_memory", lambda _, there=there: there)
        assert generation_batch_size(skeleton, 40) == windows
    monkeypatch.setattr(generated, "device_memory", lambda _: 2 * (whole + window) - 1)
    with pytest.raises(InputError, match="whole model"):
        generation_batch_size(skeleton, 40)


def test_a_model_without_room_is_pruned_by_best_without_it_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path / "model")
    monkeypatch.setattr(generated, "device_memory", lambda _: 1000)
    calib = token_file(tmp_path / "tokens.safetensors", random_tokens(4, 32))
    job = Job(str(tmp_path / "model"), "2:4", effort="best", calib=str(calib), evaluate=False, out=tmp_path / "out")
    estimate = dry_run(job)
    assert estimate["efforts"]["best"] == pytest.approx(estimate["estimate"]["seconds"], rel=0.5)
    report = prune(job)
    assert report.recipe["self_calibration"] == report.calibration["self_generated"] == 0
    assert any("without self-generated text" in warning for warning in report.warnings)
    with pytest.raises(InputError, match="whole model"):
        prune(replace(job, self_calibration=1.0, out=tmp_path / "other"))


@pytest.mark.parametrize(("own", "windows"), [(0.0, 0), (0.01, 1), (0.5, 2), (1.0, 4), (2.6, 10)])
def test_as_many_windows_as_requested_are_generated(own: float, windows: int, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    calib = token_file(tmp_path / "tokens.safetensors", random_tokens(4, 32))
    job = Job(
        str(tmp_path / "model"),
        "2:4",
        "wanda",
        calib=str(calib),
        self_calibration=own,
        evaluate=False,
        out=tmp_path / "out",
    )
    report = prune(job)
    assert report.calibration["self_generated"] == windows
    assert {layer.tokens for layer in report.layers} == {(4 + windows) * 32}


@pytest.mark.parametrize("model_type", ["llama", "mamba", "gpt2"])
def test_a_dry_run_estimates_the_generation(model_type: str, tmp_path: Path) -> None:
    save_tiny(model_type, tmp_path / "model")
    calib = token_file(tmp_path / "tokens.safetensors", random_tokens(4, 32))
    job = Job(str(tmp_path / "model"), "50%", calib=str(calib), evaluate=False, out=tmp_path / "out")
    without, with_it = (dry_run(replace(job, self_calibration=own))["estimate"]["seconds"] for own in (0.0, 50.0))
    assert with_it > without


def test_windows_of_one_token_are_all_prompt(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, tokenizer=False)
    text = random_tokens(3, 8)[:, :1]
    assert torch.equal(generated_windows(skeleton_of(tmp_path), text, 3), text)


def test_a_model_whose_own_code_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path, tokenizer=False)
    skeleton = skeleton_of(tmp_path)
    monkeypatch.setattr(type(skeleton.model), "generate", lambda *_, **__: {}["cache"])
    with pytest.raises(PruneError, match="LlamaForCausalLM fails to generate text: 'cache'"):
        generated_windows(skeleton, random_tokens(3, 40), 2)


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path / "model")
    calib = token_file(tmp_path / "tokens.safetensors", random_tokens(4, 32))
    job = Job(
        str(tmp_path / "model"),
        "2:4",
        "wanda",
        calib=str(calib),
        self_calibration=1.0,
        evaluate=False,
        out=tmp_path / "out",
    )

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("llmprune.sources.tokens.save_file", full)
    with pytest.raises(PruneError, match=r"cannot write .*No space left on device"):
        prune(job)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tokens.safetensors"]
