"""A text, a model or a checkpoint that cannot be used is refused in two lines, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import WEIGHTS, Outcome, edit_config, with_value
from helpers import edit_tensor, with_entry
from safetensors.torch import load_file, save_file


@pytest.mark.parametrize("flag", ["--calib", "--eval"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no text"),
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"\x7fELF\x02\x00\x00\x01\x00", "binary"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "not UTF-8"),
        ("na\u00efve caf\u00e9 ".encode("latin-1"), "not UTF-8"),
        ("w1 w2 ".encode("utf-16"), "not UTF-8"),
    ],
)
def test_a_missing_empty_binary_or_otherwise_encoded_text_is_refused(
    refused: Callable[..., Outcome], flags: list[str], tmp_path: Path, flag: str, content: bytes | None, says: str
) -> None:
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    refused(*with_value(flags, flag, path), says=says)


def test_a_folder_without_text_is_refused(refused: Callable[..., Outcome], flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    refused(*with_value(flags, "--calib", tmp_path / "none"), says="holds no .txt and no .jsonl file")


def test_too_little_text_says_how_much_there_is(
    refused: Callable[..., Outcome], flags: list[str], tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("w1 w2 w3 " * 32)
    short = with_value(flags, "--calib", tmp_path / "short.txt")
    refused(*short, says="3 windows of 32 tokens, but 4 were asked for")
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    refused(*with_value(flags, "--eval", tmp_path / "short.txt"), says="shorter than one window of 32 tokens")


def test_windows_beyond_the_models_positions_are_refused(refused: Callable[..., Outcome], flags: list[str]) -> None:
    refused(*with_value(flags, "--seq-len", 129), says="--seq-len 129 exceeds the model's 128", hints="--seq-len 128")
    refused(*with_value(flags, "--eval-context", 129), says="--eval-context 129 exceeds the model's 128")


def test_dynamic_rope_beyond_the_models_positions_is_refused_with_the_reason(
    refused: Callable[..., Outcome], flags: list[str], copy: Path
) -> None:
    edit_config(copy, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    refused(
        *with_value(with_value(flags, "--model", copy), "--seq-len", 129), says="(dynamic NTK)", hints="--seq-len 128"
    )


def test_default_windows_fit_a_model_with_few_positions(run: Callable[..., Outcome], tiny: Path, text: Path) -> None:
    job = ["--model", tiny, "--sparsity", "2:4", "--calib", text, "--eval", text, "--samples", 4]
    assert run(*job).code == 0


def test_a_damaged_token_file_is_refused(
    refused: Callable[..., Outcome], flags: list[str], tmp_path: Path, tiny: Path
) -> None:
    damaged = tmp_path / "tokens.safetensors"
    damaged.write_bytes(b"\x10" * 100)
    refused(*with_value(flags, "--calib", damaged), says="is no token file", hints="python -m calib")
    refused(*with_value(flags, "--calib", tiny / WEIGHTS), says="is no token file", hints="python -m calib")


def test_a_folder_that_is_no_model_is_refused(
    refused: Callable[..., Outcome], flags: list[str], tmp_path: Path
) -> None:
    refused(*with_value(flags, "--model", tmp_path), says="no config.json")
    (tmp_path / "config.json").write_text("{not json")
    refused(*with_value(flags, "--model", tmp_path), says="cannot be used")


@pytest.mark.parametrize(
    "config",
    [
        "[]",
        '"llama"',
        "{}",
        '{"model_type": "never-heard-of"}',
        '{"model_type": 7}',
        '{"model_type": "llama", "hidden_size": "many"}',
    ],
)
def test_a_config_that_describes_no_model_is_refused(
    refused: Callable[..., Outcome], flags: list[str], copy: Path, config: str
) -> None:
    (copy / "config.json").write_text(config)
    refused(*with_value(flags, "--model", copy))


def test_a_file_that_is_no_model_is_refused(
    refused: Callable[..., Outcome], flags: list[str], text: Path, tmp_path: Path
) -> None:
    refused(*with_value(flags, "--model", text), says="is a file, not a model folder")
    fake = tmp_path / "fake.gguf"
    for content in (b"", b"GGUF", b"GGUF" + b"\xff" * 60, b"nothing of the kind" * 9):
        fake.write_bytes(content)
        refused(*with_value(flags, "--model", fake), "--cache-dir", tmp_path / "cache", says="not a readable GGUF file")


def test_a_truncated_checkpoint_is_refused(refused: Callable[..., Outcome], flags: list[str], copy: Path) -> None:
    whole = (copy / WEIGHTS).read_bytes()
    for size in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        (copy / WEIGHTS).write_bytes(whole[:size])
        refused(*with_value(flags, "--model", copy), says="not a whole safetensors file", hints="download")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shape", [31]),
        ("shape", [-32]),
        ("dtype", "F33"),
        ("data_offsets", [0, 128]),
        ("data_offsets", [10**12, 10**12 + 128]),
        ("data_offsets", [128, 0]),
        ("data_offsets", ["a", "b"]),
        ("data_offsets", None),
    ],
)
def test_a_corrupt_checkpoint_is_refused(
    refused: Callable[..., Outcome], flags: list[str], copy: Path, key: str, value: Any
) -> None:
    (copy / WEIGHTS).write_bytes(with_entry((copy / WEIGHTS).read_bytes(), "model.norm.weight", key, value))
    refused(*with_value(flags, "--model", copy))


def test_a_checkpoint_that_misses_tensors_or_has_others_is_refused(
    refused: Callable[..., Outcome], flags: list[str], copy: Path
) -> None:
    edit_config(copy, num_hidden_layers=3)
    refused(*with_value(flags, "--model", copy), says=r"lacks 9 of 30 tensors.*'model\.layers\.2\.")
    edit_config(copy, num_hidden_layers=2, intermediate_size=64)
    refused(*with_value(flags, "--model", copy), says=r"\(32, 48\) on disk but \(32, 64\) in the config")
    (copy / WEIGHTS).unlink()
    refused(*with_value(flags, "--model", copy), says="no model.safetensors")


def test_a_broken_index_is_refused(refused: Callable[..., Outcome], flags: list[str], copy: Path) -> None:
    (copy / WEIGHTS).rename(copy / "model-00001-of-00001.safetensors")
    for content in (
        "{",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"a": "../b.safetensors"}}',
        '{"weight_map": {"a": "b"}}',
    ):
        (copy / "model.safetensors.index.json").write_text(content)
        refused(*with_value(flags, "--model", copy), says="index|outside|not a whole safetensors")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "bert"}, "encoder-only"),
        ({"model_type": "roberta"}, "encoder-only"),
        ({"model_type": "modernbert"}, "encoder-only"),
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "bart"}, "encoder-decoder"),
        ({"model_type": "whisper"}, "encoder-decoder"),
        ({"model_type": "florence2"}, "encoder-decoder"),
        ({"model_type": "t5gemma2"}, "encoder-decoder"),
        ({"model_type": "siglip"}, "multi-modal"),
        ({"model_type": "clip"}, "multi-modal"),
        ({"model_type": "vit"}, "'vit'"),
        ({"model_type": "wav2vec2"}, "'wav2vec2'"),
    ],
)
def test_what_is_no_decoder_only_language_model_is_refused(
    refused: Callable[..., Outcome], flags: list[str], copy: Path, config: dict[str, Any], says: str
) -> None:
    (copy / "config.json").write_text(json.dumps(config))
    refused(*with_value(flags, "--model", copy), says=says, hints="decoder-only")


@pytest.mark.parametrize(
    ("quantisation", "says"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "already quantised"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ],
)
def test_a_quantised_model_is_refused(
    refused: Callable[..., Outcome], flags: list[str], copy: Path, quantisation: dict[str, Any], says: str
) -> None:
    edit_config(copy, quantization_config=quantisation)
    refused(*with_value(flags, "--model", copy), says=f"already quantised.*{says}|{says}", hints="original model")


def test_an_adapter_is_refused(refused: Callable[..., Outcome], flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    refused(*with_value(flags, "--model", tmp_path), says="PEFT adapter", hints="merge")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth"])
def test_pickled_weights_are_refused_unread(
    refused: Callable[..., Outcome], flags: list[str], copy: Path, file: str
) -> None:
    (copy / WEIGHTS).rename(copy / file)
    refused(*with_value(flags, "--model", copy), says="pickled weights", hints="save_pretrained")


def test_code_that_comes_with_a_model_is_not_run(refused: Callable[..., Outcome], flags: list[str], copy: Path) -> None:
    edit_config(copy, model_type="homemade", auto_map={"AutoConfig": "code.Config"})
    (copy / "code.py").write_text("raise SystemExit('this ran')")
    refused(*with_value(flags, "--model", copy), says="code of its own", hints="--trust-remote-code")


def test_a_model_without_tokenizer_is_refused(refused: Callable[..., Outcome], flags: list[str], copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").unlink()
    refused(*with_value(flags, "--model", copy), says="no tokenizer", hints="--calib FILE.safetensors --no-eval")


def test_a_tokenizer_of_another_model_is_refused(refused: Callable[..., Outcome], flags: list[str], copy: Path) -> None:
    edit_config(copy, vocab_size=50)
    tensors = load_file(copy / WEIGHTS)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:50].clone()
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    refused(*with_value(flags, "--model", copy), says="vocabulary ends at 49", hints="tokenizer")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_weights_that_are_not_finite_name_the_tensor(
    refused: Callable[..., Outcome], flags: list[str], copy: Path, name: str, bad: float
) -> None:
    edit_tensor(copy, name, lambda weight: weight.view(-1)[5:6].fill_(bad))
    refused(*with_value(flags, "--model", copy), says=f"{name!r} hold NaN or Inf")


@pytest.mark.parametrize("evaluation", [[], ["--no-eval"]])
def test_activations_that_overflow_name_the_layer(
    refused: Callable[..., Outcome], flags: list[str], copy: Path, evaluation: list[str]
) -> None:
    for name in ("gate", "up"):
        edit_tensor(copy, f"model.layers.1.mlp.{name}_proj.weight", lambda weight: weight.mul_(1e25))
    refused(*with_value(flags, "--model", copy), *evaluation, says=r"'model\.layers\.1.*' holds? NaN or Inf")


def test_logits_that_overflow_name_the_head(refused: Callable[..., Outcome], flags: list[str], copy: Path) -> None:
    edit_tensor(copy, "lm_head.weight", lambda weight: weight.mul_(1e38))
    refused(*with_value(flags, "--model", copy), says="NaN or Inf")
