"""What a user types decides what a user gets: bad input two lines and exit code 2, good input a folder and a table."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import edit_tensor, save_tiny, with_entry
from safetensors.torch import load_file, save_file

from llmprune.cli import main
from llmprune.flags import build_parser, verify_parser
from llmprune.methods import METHODS
from llmprune.terminal import TerminalProgress

ROOT = Path(__file__).parents[1]
WEIGHTS = "model.safetensors"
REPORT = "prune_report.json"
Disk = namedtuple("Disk", "total used free")


class Outcome(namedtuple("Outcome", "code out err")):
    """Exit code, stdout and stderr."""

    def line(self, start: str) -> str:
        """The only line of stderr with this start."""
        lines = [line for line in self.err.splitlines() if line.startswith(start)]
        assert len(lines) == 1, self.err
        return lines[0]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run the command line in this process and in an empty working folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def call(*arguments: object) -> Outcome:
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def flags(tiny: Path, text: Path) -> list[str]:
    """A whole small job."""
    small = ["--samples", "4", "--seq-len", "32", "--eval-windows", "3", "--eval-context", "32"]
    return ["--model", str(tiny), "--sparsity", "2:4", "--calib", str(text), "--eval", str(text), *small]


@pytest.fixture
def refused(run: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """Run a job that must be refused: exit code 2, one error, one hint, an empty stdout, and nothing written."""

    def call(*arguments: object, says: str = "", hints: str = "", code: int = 2) -> Outcome:
        before = listing(Path.cwd())
        result = run(*arguments)
        assert result.code == code, result
        error, hint = result.line("error: "), result.line("hint: ")
        assert re.search(says, error), error
        assert re.search(hints, hint), hint
        assert result.err.endswith(f"{error}\n{hint}\n")
        assert "Traceback" not in result.err
        assert result.out == ""
        assert listing(Path.cwd()) == before
        return result

    return call


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes; folders without."""
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def with_value(flags: list[str], flag: str, value: object) -> list[str]:
    """The job with one flag set to something else."""
    return [*flags[: flags.index(flag) + 1], str(value), *flags[flags.index(flag) + 2 :]]


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model, to be damaged."""
    return shutil.copytree(tiny, tmp_path / "model")


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


# Patterns


@pytest.mark.parametrize("spec", ["4:2", "2:0", "0:4", "4:4", "0%", "100%", "150%", "0", "1", "0.0", "1.0", "2"])
def test_a_pattern_that_prunes_nothing_or_everything_is_refused(
    refused: Callable[..., Outcome], flags: list[str], spec: str
) -> None:
    refused(*with_value(flags, "--sparsity", spec), hints="N:M with 0 < N < M")


@pytest.mark.parametrize("spec", ["-0.1", "-1:4", "-50%"])
def test_a_negative_share_is_refused_however_it_is_written(
    refused: Callable[..., Outcome], flags: list[str], spec: str
) -> None:
    refused(*with_value(flags, "--sparsity", spec))
    refused(*flags, f"--sparsity={spec}", hints="N:M with 0 < N < M")


@pytest.mark.parametrize(
    "spec", ["", " ", "half", "2/4", "2:4:8", "2.5:4", "nan", "inf", "50%%", "1e-1", "²:4", "%", ":"]
)
def test_an_unknown_pattern_is_refused(refused: Callable[..., Outcome], flags: list[str], spec: str) -> None:
    refused(*with_value(flags, "--sparsity", spec), hints="N:M with 0 < N < M")


def test_a_pattern_that_does_not_divide_a_width_names_the_layer(
    refused: Callable[..., Outcome], flags: list[str]
) -> None:
    refused(
        *with_value(flags, "--sparsity", "2:5"), says=r"'model\.layers\.0\.self_attn\.q_proj'.*32.*5", hints="--skip"
    )


def test_a_share_that_rounds_to_nothing_is_refused(refused: Callable[..., Outcome], flags: list[str]) -> None:
    refused(*with_value(flags, "--sparsity", "0.001%"), says="rounds to 0")


def test_a_scope_for_n_of_m_is_refused(refused: Callable[..., Outcome], flags: list[str]) -> None:
    refused(*flags, "--scope", "row", says="--scope row does not apply to 2:4")


def test_a_permutation_for_unstructured_sparsity_is_refused(refused: Callable[..., Outcome], flags: list[str]) -> None:
    refused(*with_value(flags, "--sparsity", "50%"), "--permute", says="--permute does not apply to 50%")


def test_a_ridge_for_removals_alone_is_refused(refused: Callable[..., Outcome], flags: list[str]) -> None:
    removal = with_value(flags, "--sparsity", "channels:50%")
    refused(*removal, "--ridge", "0.3", says="--ridge 0.3 does not apply to channels:50%", hints="held-out tokens")


# Flags

VALUED = sorted(
    option
    for action in build_parser()._actions
    if action.nargs is None and action.option_strings
    for option in action.option_strings
)


@pytest.mark.parametrize("flag", VALUED)
def test_a_flag_without_its_value_is_named(refused: Callable[..., Outcome], flags: list[str], flag: str) -> None:
    refused(*flags, flag, says=f"argument {flag}: expected one argument", hints="--help")


NONSENSE = {
    "--method": ["foo", "", "SparseGPT", "sparse-gpt"],
    "--effort": ["slow", "", "Best"],
    "--targets": ["sparse", ""],
    "--steps": ["0", "-1", "x", "1.5"],
    "--refine": ["-1", "x", "0.5", ""],
    "--ridge": ["-1", "x", "inf", "nan", "30%", ""],
    "--own": ["-1", "x", "nan", "15%", ""],
    "--allocate": ["alike", ""],
    "--scope": ["column", ""],
    "--samples": ["0", "-1", "1.5", "many", "", "1e3", "99999999999999999999", "١"],
    "--seq-len": ["0", "1", "-8", "8.0", "x"],
    "--seed": ["-1", "0.5", "x", "9" * 30],
    "--eval-windows": ["0", "-1", "x"],
    "--eval-context": ["0", "1", "x"],
    "--dtype": ["int8", "float64", "fp16", ""],
    "--threads": ["0", "-1", "x", "999999999"],
    "--device": ["tpu", "cuda:99", "cuda:-1", "", "meta", "cpu:x"],
    "--calib": ["no/such/file.txt", "c5", "no.safetensors", "/dev/zero"],
    "--eval": ["no/such/file.txt", "c5"],
    "--model": ["no/such/folder", "./none", "none.gguf", "", "a/b/c", "../x", "a b"],
    "--option": ["damping", "=1", "damping=", "=", ""],
    "--only": ["nothing*", ""],
    "--skip": ["nothing*", ""],
}


@pytest.mark.parametrize(
    ("flag", "value"),
    [(flag, value) for flag, values in NONSENSE.items() for value in values],
)
def test_a_bad_value_of_any_flag_is_refused(
    refused: Callable[..., Outcome], flags: list[str], flag: str, value: str
) -> None:
    names_itself = flag not in {"--model", "--calib", "--eval"}
    refused(*flags, f"{flag}={value}", says=flag if names_itself else "")


def test_a_misspelt_choice_gets_a_suggestion(refused: Callable[..., Outcome], flags: list[str]) -> None:
    refused(*flags, "--method", "sparsgpt", says="--method 'sparsgpt' is unknown", hints="did you mean sparsegpt")


def test_refinement_needs_a_window_to_hold_out(refused: Callable[..., Outcome], flags: list[str]) -> None:
    refused(*with_value(flags, "--samples", 1), "--effort", "best", says="there is 1", hints="--refine 0")


@pytest.mark.parametrize("kind", ["error", "owl"])
def test_shares_of_blocks_add_up_and_verify_knows(run: Callable[..., Outcome], flags: list[str], kind: str) -> None:
    sparse = with_value(flags, "--sparsity", "70%")
    assert run(*sparse, "--method", "wanda", "--allocate", kind, "--out", "out", "--no-eval").code == 0
    report = json.loads(Path("out", REPORT).read_text())
    weights = {layer["name"]: layer["shape"][0] * layer["shape"][1] for layer in report["layers"]}
    pruned = sum(layer["pruned"] for layer in report["layers"])
    assert pruned == pytest.approx(0.7 * sum(weights.values()), abs=len(weights) * 64)
    assert len({layer["pattern"] for layer in report["layers"]}) > 1
    assert report["sparsity"]["meaning"] == "70 % unstructured on average, every block with a share of its own"
    verified = run("verify", "out")
    assert verified.code == 0
    assert report["sparsity"]["meaning"] in verified.out
    lowest = min((layer["pattern"] for layer in report["layers"]), key=lambda text: float(text.rstrip("%")))
    assert run("verify", "out", "--sparsity", lowest, "--scope", "row").code == 0
    assert run("verify", "out", "--sparsity", "70%", "--scope", "row").code == 1


def test_shares_of_blocks_are_for_unstructured_patterns(refused: Callable[..., Outcome], flags: list[str]) -> None:
    refused(*flags, "--allocate", "error", says="--allocate error does not apply to 2:4", hints="every group")


def test_a_misspelt_flag_gets_a_suggestion(refused: Callable[..., Outcome], flags: list[str]) -> None:
    refused(*flags, "--sample", "4", says="'--sample'", hints="--samples")


def test_an_unknown_flag_or_a_stray_word_is_refused(refused: Callable[..., Outcome], flags: list[str]) -> None:
    refused(*flags, "--xyzzy", says="'--xyzzy'", hints="--help")
    refused(*flags, "tiny", says="'tiny'", hints="--help")


@pytest.mark.parametrize("arguments", [[], ["--model", "demo"], ["--sparsity", "2:4"], ["prune"], ["verify"]])
def test_a_missing_flag_is_named(refused: Callable[..., Outcome], arguments: list[str]) -> None:
    refused(*arguments, says="required: ", hints="--help")


def test_globs_that_match_nothing_show_a_name_that_exists(refused: Callable[..., Outcome], flags: list[str]) -> None:
    for flag in ("--only", "--skip"):
        refused(*flags, flag, "*.w1", says=r"'\*\.w1' matches none of 14 layers", hints=r"model\.layers\.0\.")
    refused(*flags, "--skip", "*", says="no layer left")


# Text


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
    refused(*with_value(flags, "--calib", tmp_path / "none"), says="holds no .txt file")


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


# Models


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
        ({"model_type": "llava"}, "multi-modal"),
        ({"model_type": "qwen2_vl"}, "multi-modal"),
        ({"model_type": "gemma3"}, "multi-modal"),
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
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
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


# Output


def test_an_output_below_a_file_is_refused(refused: Callable[..., Outcome], flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(*flags, "--out", tmp_path / "file" / "out", says="cannot write below", hints="--out")
    refused(*flags, "--out", tmp_path / "file" / "deep" / "out", says="cannot write below", hints="--out")
    refused(*flags, "--out", tmp_path / "file", "--overwrite", says="is a file", hints="--out")
    refused(*flags, "--out", "/", "--overwrite", says="no usable path", hints="--out")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("out", ["/dev/null/x", "/proc/x", "x" * 300, "x" * 250, "a\0b"])
def test_an_output_that_cannot_be_made_is_refused(refused: Callable[..., Outcome], flags: list[str], out: str) -> None:
    refused(*flags, "--out", out, hints="--out")


def test_a_folder_of_others_is_never_replaced(
    refused: Callable[..., Outcome], flags: list[str], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refused(
        *flags, "--out", tmp_path / "mine", "--overwrite", says="not written by llmprune", hints="nothing was touched"
    )
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_the_model_itself_is_never_the_output(
    run: Callable[..., Outcome], refused: Callable[..., Outcome], flags: list[str], copy: Path
) -> None:
    before = listing(copy)
    refused(*with_value(flags, "--model", copy), "--out", copy, "--overwrite")
    assert listing(copy) == before
    assert run(*flags, "--out", "pruned").code == 0
    refused(*with_value(flags, "--model", "pruned"), "--out", "./pruned", "--overwrite", says="is the model itself")


def test_a_complete_output_is_refused_then_replaced(
    run: Callable[..., Outcome], refused: Callable[..., Outcome], flags: list[str], copy: Path, text: Path
) -> None:
    assert run(*flags, "--method", "magnitude", "--out", "out").code == 0
    before = listing(Path("out"))
    refused(*flags, "--out", "out", says="exists already", hints="--overwrite")
    # Whatever goes wrong with --overwrite, the old folder stays as it was.
    refused(*with_value(flags, "--samples", 10**6), "--out", "out", "--overwrite")
    edit_tensor(copy, "model.layers.1.mlp.up_proj.weight", lambda weight: weight.mul_(1e38))
    refused(*with_value(flags, "--model", copy), "--out", "out", "--overwrite", says="NaN or Inf")
    assert listing(Path("out")) == before
    assert run(*flags, "--method", "wanda", "--out", "out", "--overwrite").code == 0
    assert json.loads(Path("out", REPORT).read_text())["method"]["name"] == "wanda"
    assert os.listdir() == ["out"]


def test_an_output_behind_a_link_is_replaced_without_leftovers(run: Callable[..., Outcome], flags: list[str]) -> None:
    assert run(*flags, "--out", "real").code == 0
    Path("link").symlink_to("real")
    assert run(*flags, "--out", "link", "--overwrite").code == 0
    assert Path("link", REPORT).exists()
    assert sorted(os.listdir()) == ["link", "real"]


def test_a_stopped_run_goes_on_and_says_so(
    run: Callable[..., Outcome], refused: Callable[..., Outcome], flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("llmprune.run.verify_written", lambda *_: 1 / 0)
        assert run(*flags, "--out", "out").code == 1
    refused(*flags, "--out", "out", "--skip", "*.q_proj", says="2 finished blocks of another run", hints="--restart")
    result = run(*flags, "--out", "out")
    assert result.code == 0
    assert "2 blocks were finished before" in result.err
    assert os.listdir() == ["out"]


def test_restart_drops_the_finished_blocks(
    run: Callable[..., Outcome], flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("llmprune.run.verify_written", lambda *_: 1 / 0)
        assert run(*flags, "--out", "out").code == 1
    result = run(*flags, "--out", "out", "--skip", "*.q_proj", "--restart")
    assert result.code == 0
    assert "finished before" not in result.err


def test_the_rest_of_a_killed_run_is_removed(run: Callable[..., Outcome], flags: list[str]) -> None:
    Path(".out.partial").mkdir()
    Path(".out.partial", "model").mkdir()
    Path(".out.partial", "model", "shard-00001.safetensors").write_text("half")
    result = run(*flags, "--out", "out")
    assert result.code == 0
    assert ".out.partial" in result.err
    assert os.listdir() == ["out"]


def test_an_empty_folder_may_become_the_output(run: Callable[..., Outcome], flags: list[str]) -> None:
    Path("out").mkdir()
    assert run(*flags, "--out", "out").code == 0
    assert os.listdir() == ["out"]


def test_a_full_disk_is_found_before_anything_is_written(
    refused: Callable[..., Outcome], flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(10**9, 10**9 - 1000, 1000))
    refused(*flags, says="needs 32 MiB, but .* has 0 MiB free", hints="free disk space")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, less than the tiny model takes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if execute(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], tmp_path).returncode:
        pytest.skip("only root can mount a small file system")
    yield folder
    assert execute(["umount", str(folder)], tmp_path).returncode == 0


def test_a_small_disk_is_refused(
    refused: Callable[..., Outcome], flags: list[str], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(*flags, "--out", small_disk / "out", says="MiB free", hints="free disk space")
    # A disk that fills up meanwhile is the run's failure, not the user's.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(10**12, 0, 10**12))
    refused(*flags, "--out", small_disk / "out", says="cannot write", hints="free disk space", code=1)
    assert os.listdir(small_disk) == []


# What a run says


def test_help_lists_every_flag_and_method_without_importing_torch() -> None:
    script = "import sys; from llmprune.cli import main; code = main(['--help'])\n"
    script += "print({'torch', 'numpy', 'transformers'} & set(sys.modules), file=sys.stderr); sys.exit(code)"
    done = execute([sys.executable, "-c", script], ROOT)
    assert (done.returncode, done.stderr) == (0, "set()\n")
    for action in build_parser()._actions:
        assert all(option in done.stdout for option in action.option_strings)
    assert all(re.search(rf"^  {name} +\S", done.stdout, re.MULTILINE) for name in METHODS)
    assert all(re.search(rf"^  {code} ", done.stdout, re.MULTILINE) for code in (0, 1, 2, 130))
    assert max(map(len, done.stdout.splitlines())) <= 110


def test_verify_has_help_of_its_own(run: Callable[..., Outcome]) -> None:
    result = run("verify", "--help")
    assert result.code == 0
    assert all(option in result.out for action in verify_parser()._actions for option in action.option_strings)


def test_the_version_is_the_packages(run: Callable[..., Outcome]) -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.*)"', pyproject, re.MULTILINE)
    assert version
    assert run("--version") == (0, f"llmprune {version[1]}\n", "")


def test_the_summary_says_what_was_measured_on_what(run: Callable[..., Outcome], flags: list[str], text: Path) -> None:
    result = run(*flags, "--out", "out")
    assert result.code == 0
    report = json.loads(Path("out", REPORT).read_text())
    dense, pruned = (f"{report['evaluation'][key]['value']:.2f} ±" for key in ("dense", "pruned"))
    assert re.search(rf"^perplexity +dense {dense} \d+\.\d\d, pruned {pruned} \d+\.\d\d$", result.out, re.MULTILINE)
    assert f"{text}, 3 windows of 32 tokens" in result.out
    assert f"4 x 32 tokens of {text}, seed 0" in result.out
    assert "2:4, prunes 2 of every 4 weights, 50 %" in result.out
    assert "50.00% of" in result.out
    assert "99.2% of 0.0 M block parameters" in result.out
    assert re.search(r"^memory +peak \d", result.out, re.MULTILINE)
    assert re.search(r"^time +\d", result.out, re.MULTILINE)
    assert f'AutoModelForCausalLM.from_pretrained("{Path("out").absolute()}")' in result.out
    assert result.out.splitlines()[-1].startswith("2:4 leaves file size and CPU speed unchanged; ")


def test_what_stays_dense_is_said(run: Callable[..., Outcome], flags: list[str]) -> None:
    result = run(*flags, "--skip", "*.down_proj")
    assert re.search(r"^coverage .*; left dense: --skip 19\.8%$", result.out, re.MULTILINE)


def test_text_in_both_calibration_and_evaluation_is_warned_of(run: Callable[..., Outcome], flags: list[str]) -> None:
    job = with_value(with_value(flags, "--samples", 100), "--seq-len", 40)
    assert "also stands in the calibration text" in run(*job).line("warning: ")


@pytest.mark.parametrize(("method", "tries"), [("magnitude", "--effort balanced"), ("auto", "--effort best")])
def test_an_exploding_perplexity_is_warned_of_with_what_to_try(
    run: Callable[..., Outcome], flags: list[str], monkeypatch: pytest.MonkeyPatch, method: str, tries: str
) -> None:
    assert "hardly usable" not in run(*flags, "--method", method).err
    monkeypatch.setattr("llmprune.outcome.EXPLODED", 0.1)
    result = run(*flags, "--method", method, "--overwrite")
    warning = result.line("warning: the perplexity rose")
    assert "hardly usable" in warning
    assert f"try {tries}" in warning or f"({tries}" in warning


def test_json_is_one_document_on_stdout_and_equals_the_report(run: Callable[..., Outcome], flags: list[str]) -> None:
    result = run(*flags, "--json")
    assert result.code == 0
    assert json.loads(result.out) == json.loads(Path("tiny-balanced-2of4", REPORT).read_text())
    assert "perplexity   dense" in result.err


def test_quiet_says_nothing_but_warnings(run: Callable[..., Outcome], flags: list[str]) -> None:
    assert run(*flags, "--quiet", "--out", "out") == (0, "", "")
    report = json.loads(run(*flags, "--quiet", "--json", "--out", "other").out)
    assert report["out"].endswith("other")


def test_quiet_still_warns(run: Callable[..., Outcome], flags: list[str]) -> None:
    warned = run(*with_value(with_value(flags, "--samples", 100), "--seq-len", 40), "--quiet")
    assert warned.out == ""
    assert warned.err == warned.line("warning: ") + "\n"


def test_a_dry_run_shows_the_plan_and_writes_nothing(run: Callable[..., Outcome], flags: list[str]) -> None:
    result = run(*flags, "--dry-run")
    assert result.code == 0
    assert os.listdir() == []
    for key in ("model", "sparsity", "method", "coverage", "calibration", "estimate", "efforts", "size", "would save"):
        assert re.search(rf"^{key} ", result.out, re.MULTILINE), key
    assert result.out.endswith("dry run: nothing was written\n")
    plan = json.loads(run(*flags, "--dry-run", "--json").out)
    assert len(plan["layers"]) == 14
    assert plan["estimate"]["seconds"] > 0
    assert plan["estimate"]["memory"] > 0
    assert plan["size"]["pruned"] == plan["size"]["dense"] > 0
    assert os.listdir() == []


def test_a_local_job_opens_no_connection(
    run: Callable[..., Outcome], flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr("socket.create_connection", lambda *arguments, **_: asked.append(arguments))
    assert run(*flags).code == 0
    time.sleep(0.1)
    assert asked == []


def test_the_hub_token_is_in_nothing_that_is_written_or_said(
    run: Callable[..., Outcome], flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "hf_ThisIsASecretThatNobodyMaySee"
    monkeypatch.setenv("HF_TOKEN", secret)
    result = run(*flags, "--json", "--debug", "--out", "out")
    assert result.code == 0
    assert secret not in result.out + result.err
    assert all(secret.encode() not in content for content in listing(Path("out")).values())


def test_options_of_a_method_are_checked_and_reported(
    run: Callable[..., Outcome], refused: Callable[..., Outcome], flags: list[str]
) -> None:
    flags += ["--method", "sparsegpt"]
    refused(*flags, "--option", "damp=0.1", says="sparsegpt has no option 'damp'", hints="damping")
    refused(*flags[:-2], "--method", "wanda", "--option", "damping=0.1", says="wanda has no option")
    for value in ("0", "-1", "x", "nan", "inf"):
        refused(*flags, "--option", f"damping={value}", says=f"damping={value} is no positive")
    assert run(*flags, "--option", "damping=0.5", "--out", "out").code == 0
    assert json.loads(Path("out", REPORT).read_text())["method"]["options"] == {"damping": 0.5}


def test_without_a_terminal_progress_is_plain_lines(run: Callable[..., Outcome], flags: list[str]) -> None:
    result = run(*flags)
    assert "\r" not in result.err
    assert "\x1b" not in result.err
    assert re.search(r"^pruning 1/2  error 0\.\d{4}  \d+ s left$", result.err, re.MULTILINE)
    assert ".tiny-balanced-2of4.partial" in result.err


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Make stderr a terminal; what was drawn is in the list afterwards."""
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 100))
    drawn: list[str] = []

    def read() -> None:
        try:
            while chunk := os.read(reader, 4096):
                drawn.append(chunk.decode(errors="replace"))
        except OSError:
            pass  # the other end is closed

    thread = threading.Thread(target=read)
    thread.start()
    with os.fdopen(writer, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        yield drawn
    thread.join(5)
    os.close(reader)


def test_in_a_terminal_every_stage_has_a_bar(
    run: Callable[..., Outcome], flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with terminal(monkeypatch) as drawn:
        result = run(*flags)
    assert result.code == 0
    for stage in ("checking weights", "dense perplexity", "pruning", "verifying", "pruned perplexity"):
        assert re.search(rf"\r{stage} .* left", "".join(drawn)), stage


def test_a_bar_shows_count_figure_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as drawn:
        progress = TerminalProgress()
        progress.start("pruning", 2)
        time.sleep(0.15)
        progress.step(1, "error 0.1234")
        progress.warn("look here")
        progress.finish()
    assert re.search(r"\rpruning +█+ +1/2, error 0\.1234  00:00 left", "".join(drawn))
    assert re.search(r"\r *\rwarning: look here\r\n", "".join(drawn))


def test_a_closed_stdout_ends_quietly(tiny: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "llmprune", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    error = process.stderr.read()
    process.wait(10)
    process.stderr.close()
    assert b"Traceback" not in error


def test_debug_adds_the_traceback(run: Callable[..., Outcome], flags: list[str]) -> None:
    result = run(*with_value(flags, "--sparsity", "4:2"), "--debug")
    assert result.code == 2
    assert "Traceback" in result.err
    assert result.line("error: ")


def test_what_nobody_foresaw_is_exit_code_1_with_two_lines(
    run: Callable[..., Outcome], flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("of some kind")

    monkeypatch.setattr("llmprune.run.verify_written", fail)
    result = run(*flags, "--out", "out")
    assert (result.code, result.out) == (1, "")
    assert result.line("error: ") == "error: ZeroDivisionError: of some kind"
    assert "--debug" in result.line("hint: ")
    assert "2 of 2 blocks are finished and kept" in result.line("warning: ")
    assert os.listdir() == [".out.partial"]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    run: Callable[..., Outcome], flags: list[str]
) -> None:
    for out, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert run(*flags, "--seed", seed, "--out", out).code == 0
    a, b, c = (listing(Path(out)) for out in "abc")
    assert [v for k, v in a.items() if k.endswith(".safetensors")] == [
        v for k, v in b.items() if k.endswith(".safetensors")
    ]
    assert [v for k, v in a.items() if k.endswith(".safetensors")] != [
        v for k, v in c.items() if k.endswith(".safetensors")
    ]


# As processes


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that takes seconds to prune."""
    sizes = {"vocab_size": 100, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 24}
    folder = tmp_path_factory.mktemp("slow") / "slow"
    return save_tiny("llama", folder, max_position_embeddings=512, num_attention_heads=8, **sizes)


@pytest.mark.parametrize(
    ("until", "number", "kept"),
    [("loading libraries", signal.SIGTERM, False), ("pruning 1/24", signal.SIGINT, True)],
)
def test_an_interrupt_ends_at_once_in_one_line_and_keeps_only_finished_blocks(
    slow_model: Path, text: Path, tmp_path: Path, until: str, number: int, kept: bool
) -> None:
    job = ["--model", str(slow_model), "--sparsity", "2:4", "--calib", str(text), "--no-eval", "--out", "out"]
    job += ["--samples", "24", "--seq-len", "128"]
    command = [sys.executable, "-m", "llmprune", *job]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        # A shell's background jobs ignore interruptions, and so would what this test starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    ) as process:  # fmt: skip
        assert process.stdout
        assert process.stderr
        while until not in (line := process.stderr.readline()):
            assert line, "the run ended too early"
        time.sleep(0.3)
        process.send_signal(number)
        sent = time.monotonic()
        rest = process.stderr.read()
        code = process.wait(10)
        took = time.monotonic() - sent
        assert (code, process.stdout.read()) == (130, "")
    assert took < 2
    said = [line for line in rest.splitlines() if line and not line.startswith(("pruning", "checking", "writing"))]
    assert said[-1] == "interrupted; the output folder is as it was"
    assert os.listdir(tmp_path) == ([".out.partial"] if kept else [])
    assert len(said) == 1 + kept
    assert (
        re.match(r"warning: \d+ of 24 blocks are finished and kept in .*\.out\.partial; the same command", said[0])
        or not kept
    )


def execute(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run another process, this checkout first on its path."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"} | environment
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment, timeout=90)


def test_module_and_script_are_the_same_program(flags: list[str], tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("llmprune")
    for command in ([sys.executable, "-m", "llmprune"], [str(script)]):
        done = execute([*command, "--version"], tmp_path)
        assert (done.returncode, done.stdout[:9], done.stderr) == (0, "llmprune ", "")
        done = execute([*command, "--sparsity"], tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]
    done = execute([sys.executable, "-m", "llmprune", *flags], tmp_path)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["tiny-balanced-2of4"]
    assert "Warning" not in done.stderr


HUB = """
import contextlib, io, json, os, sys, time
from hub_server import Hub

server = Hub().__enter__()
server.fail("/slow", 0, delay=60)
server.fail("/gated", 401, code="GatedRepo", says="Access to model org/gated is restricted.")
server.fail("listed/auth-check", 403, code="GatedRepo", says="Access to model org/listed is restricted.")
server.add("org/listed", gated="manual")
server.add("org/any")
server.fail("/broken", 500)
os.environ["HF_ENDPOINT"] = server.url
import datasets, llmprune.run
from llmprune.cli import main

def case(model, *more):
    out, err, start = io.StringIO(), io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["--model", model, "--sparsity", "2:4", "--out", "out", *more])
    return code, out.getvalue(), err.getvalue(), time.monotonic() - start

found = {name: case(f"org/{name}") for name in ("gated", "listed", "missing", "broken", "slow")}
found["revision"] = case("org/any", "--revision", "gone")
server.stop()
found["closed"] = case("org/any")
tiny, text = sys.argv[1:]
# What libraries take to load for a first model is not the Hub's doing.
assert case(tiny, "--calib", text, "--samples", "2", "--seq-len", "32", "--no-eval", "--dry-run")[0] == 0
found["dataset"] = case(tiny, "--calib", "c4", "--eval-context", "32", "--seq-len", "32")
print(json.dumps(found), flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def hub(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str, float]]:
    """What the command line says to the answers of a Hub of our own: code, stdout, stderr, seconds."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "work").mkdir()
    settings = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    done = execute([sys.executable, "-c", HUB, str(tiny), str(text)], folder / "work", **settings)
    assert done.returncode == 0, done.stderr
    assert os.listdir(folder / "work") == []
    found: dict[str, tuple[int, str, str, float]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("case", "says", "hints"),
    [
        ("gated", "org/gated is gated", "hf auth login"),
        ("listed", "org/listed is gated", "hf auth login"),
        ("missing", "no Hub model 'org/missing'", "spelling"),
        ("broken", "refused org/broken", "later"),
        ("slow", "Hugging Face Hub cannot be reached", "network"),
        ("closed", "Hugging Face Hub cannot be reached", "network"),
        ("revision", "no revision 'gone'", "--revision"),
        ("dataset", "data set c4", "network"),
    ],
)
def test_what_the_hub_refuses_is_said_within_five_seconds(
    hub: dict[str, tuple[int, str, str, float]], case: str, says: str, hints: str
) -> None:
    code, out, err, seconds = hub[case]
    assert (code, out) == (2, ""), err
    outcome = Outcome(code, out, err)
    assert re.search(says, outcome.line("error: "))
    assert re.search(hints, outcome.line("hint: "))
    assert "Traceback" not in err
    assert seconds < 5


# llmprune verify


@pytest.fixture
def pruned(run: Callable[..., Outcome], flags: list[str]) -> Path:
    """A pruned tiny model in the working folder."""
    assert run(*flags, "--method", "wanda", "--out", "pruned").code == 0
    return Path("pruned")


def test_verify_believes_the_files(run: Callable[..., Outcome], pruned: Path) -> None:
    result = run("verify", pruned)
    assert (result.code, result.err) == (0, "")
    assert result.out.endswith("the pattern holds in every layer\n")
    assert run("verify", pruned, "--sparsity", "2:4").code == 0
    assert run("verify", pruned, "--sparsity", "50%").code == 0
    assert run("verify", pruned, "--sparsity", "50%", "--scope", "row").code == 0
    edit_tensor(pruned, "model.layers.1.mlp.up_proj.weight", lambda weight: weight[0, :4].fill_(1.0))
    for arguments in ((), ("--sparsity", "2:4")):
        broken = run("verify", pruned, *arguments)
        assert broken.code == 1
        assert "VIOLATED model.layers.1.mlp.up_proj: 2 zeros missing" in broken.out
        assert broken.out.count("VIOLATED") == 1
    report = json.loads(run("verify", pruned, "--json").out)
    assert report["violations"] == 2
    assert [layer["name"] for layer in report["layers"] if layer["violations"]] == ["model.layers.1.mlp.up_proj"]
    assert run("verify", pruned, "--skip", "*.1.mlp.up_proj").code == 0
    assert run("verify", pruned, "--only", "*.up_proj").code == 1


def test_verify_says_when_the_pattern_is_another(run: Callable[..., Outcome], pruned: Path, tiny: Path) -> None:
    assert run("verify", pruned, "--sparsity", "3:4").code == 1
    assert run("verify", pruned, "--sparsity", "1:4").code == 0
    dense = run("verify", tiny, "--sparsity", "2:4")
    assert dense.code == 1
    assert "14 layers violate the pattern" in dense.out


def test_verify_refuses_what_it_cannot_check(
    refused: Callable[..., Outcome], tiny: Path, tmp_path: Path, pruned: Path
) -> None:
    refused("verify", "no/such/folder", says="there is no folder")
    refused("verify", tmp_path, "--sparsity", "2:4", says="config.json")
    refused("verify", tiny, says=REPORT, hints="--sparsity")
    refused("verify", tiny, "--sparsity", "4:2")
    refused("verify", tiny, "--sparsity", "2:4", "--only", "nothing", says="matches none")
    refused("verify", tiny, "--method", "wanda", says="'--method'")
    index = json.loads((pruned / "model.safetensors.index.json").read_text())["weight_map"]
    shard = pruned / index["model.norm.weight"]
    shard.write_bytes(shard.read_bytes()[:-1])
    refused("verify", pruned, says="not a whole safetensors file")


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"sparsity": {"pattern": "2:4"}}'])
def test_verify_refuses_a_damaged_report(refused: Callable[..., Outcome], pruned: Path, content: str) -> None:
    (pruned / REPORT).write_text(content)
    refused("verify", pruned, says=REPORT)


def test_verify_does_not_ask_of_skipped_layers_what_they_cannot_hold(
    run: Callable[..., Outcome], flags: list[str]
) -> None:
    job = with_value(flags, "--sparsity", "1:3")
    assert run(*job, "--only", "*.down_proj", "--out", "out").code == 0
    assert run("verify", "out").code == 0


def test_verify_misses_no_layer_of_the_report(run: Callable[..., Outcome], pruned: Path) -> None:
    report = json.loads((pruned / REPORT).read_text())
    report["layers"][0]["name"] = "model.layers.7.self_attn.q_proj"
    (pruned / REPORT).write_text(json.dumps(report))
    assert run("verify", pruned).code != 0
