"""Two folders are timed in turns, each in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import job, save_tiny, token_file

from eval import speed
from llmprune import prune
from llmprune.export.int4_kernels import processor_obstacle


def test_the_spread_is_median_and_quartiles() -> None:
    assert speed.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "low": 1.5, "high": 4.5}
    assert speed.spread([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_a_smaller_folder_is_told_as_smaller(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = save_tiny("llama", tmp_path / "dense", intermediate_size=256)
    pruned = save_tiny("llama", tmp_path / "pruned", intermediate_size=128)
    out = tmp_path / "figures.json"
    flags = ["--repeats", "2", "--prompt", "8", "--new", "2", "--threads", "1", "--out", str(out)]
    assert speed.main([str(dense), str(pruned), *flags]) == 0
    figures = json.loads(out.read_text(encoding="utf-8"))
    assert figures["pruned"]["size"] < figures["dense"]["size"]
    # Two blocks of hidden width 64: attention, gate, up and down of 8 tokens; the head of the last one.
    attention = 2 * 8 * 64 * (64 + 2 * 32 + 64) + 2 * 2 * 4 * 8 * 8 * 16
    for name, width in (("dense", 256), ("pruned", 128)):
        assert figures[name]["flops"] == pytest.approx(2 * (attention + 2 * 8 * 3 * 64 * width) + 2 * 64 * 96, rel=0.02)
        assert min(figures[name][key] for key in ("prefill", "decode", "memory")) > 0
    assert figures["promised"] == pytest.approx(figures["dense"]["flops"] / figures["pruned"]["flops"])
    assert "prefill, tokens/s" in capsys.readouterr().out
    assert figures["command"].startswith("python -m eval.speed ")


def test_sparse_kernels_are_a_third_model_where_there_are_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "has_kernels", lambda _: True)
    dense = save_tiny("llama", tmp_path / "dense")
    flags = ["--repeats", "1", "--prompt", "8", "--new", "1", "--threads", "1"]
    assert speed.main([str(dense), str(dense), *flags, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["sparse"]["flops"] is None
    assert figures["settings"]["dtype"] == "bfloat16"
    assert figures["sparse_speedup"].keys() == {"prefill", "decode"}
    head, prefill, *_ = speed.text(figures).splitlines()
    assert head.split() == ["dense", "pruned", "sparse", "over", "dense"]
    assert prefill.count("(") == 2


def test_a_model_in_int4_is_measured_on_its_kernel_beside_bfloat16(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = save_tiny("llama", tmp_path / "dense")
    calib = token_file(tmp_path / "tokens.safetensors")
    prune(job(dense, tmp_path / "int4", calib, "2:4", method="magnitude", quantize="int4:g32"))
    flags = ["--repeats", "1", "--prompt", "8", "--new", "1", "--threads", "1", "--accelerate", "--json"]
    assert speed.main([str(dense), str(dense), *flags]) == 2
    assert "is stored as floating point" in capsys.readouterr().err
    monkeypatch.setattr("llmprune.export.int4_kernels.processor_obstacle", lambda: "too old")
    assert speed.main([str(dense), str(tmp_path / "int4"), *flags]) == 2
    assert "--accelerate: too old" in capsys.readouterr().err
    monkeypatch.undo()
    if processor_obstacle():
        pytest.skip("needs AVX2")
    assert speed.main([str(dense), str(tmp_path / "int4"), *flags]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["int4"]["flops"] is None
    assert figures["bfloat16"]["flops"] == figures["dense"]["flops"]
    assert {"speedup", "bfloat16_speedup", "int4_speedup"} <= figures.keys()
    ratio = figures["int4"]["decode"] / figures["bfloat16"]["decode"]
    assert figures["int4_over_bfloat16"]["decode"]["median"] == pytest.approx(ratio)
    assert speed.table(figures).splitlines()[-1].startswith("Int4 over bfloat16: prefill ")
    head, prefill, *_ = speed.text(figures).splitlines()
    assert head.split() == ["dense", "pruned", "bfloat16", "int4", "over", "dense"]
    assert prefill.count("(") == 3


def test_llama_cpp_is_another_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="xllamacpp is missing", exc_type=ImportError)
    for name, width in (("dense", 256), ("pruned", 128)):
        folder = save_tiny("llama", tmp_path / name, tokenizer=False, vocab_size=320, intermediate_size=width)
        llama_cpp.ascii_tokenizer().save_pretrained(folder)
    folders = [str(tmp_path / name) for name in ("dense", "pruned")]
    flags = ["--engine", "llama.cpp", "--gguf-type", "q8_0", "--repeats", "2", "--prompt", "8", "--new", "4"]
    assert speed.main([*folders, *flags, "--threads", "1", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["pruned"]["size"] < figures["dense"]["size"]
    assert figures["promised"] is None
    assert min(figures[name][key] for name in ("dense", "pruned") for key in ("prefill", "decode", "memory")) > 0
    assert speed.text(figures).splitlines()[-1].startswith("prefill, GFLOP")
    assert speed.table(figures).count("\n") == 6
    assert speed.main([*folders, *flags, "--batch", "2"]) == 2
    assert "one sequence at a time" in capsys.readouterr().err
    assert speed.main([*folders, "--gguf-type", "f16"]) == 2
    assert "--gguf-type means nothing" in capsys.readouterr().err


def test_a_folder_without_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert speed.main([str(tmp_path), str(tmp_path)]) == 2
    assert "hint:" in capsys.readouterr().err
