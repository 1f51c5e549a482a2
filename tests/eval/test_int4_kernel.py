"""The int4 kernel is timed beside dense products of the same weight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eval import int4_kernel


def test_all_products_are_of_one_weight() -> None:
    products = int4_kernel.products_of(32, 64, 3, 32)
    assert products.keys() == {"float32", "bfloat16", "int4", "int4 in float32"}
    wanted = products["float32"]().double()
    for product in products.values():
        assert float((product().double() - wanted).norm() / wanted.norm()) < 2**-6
    assert "int4 in float32" not in int4_kernel.products_of(1024, 1024, 1024, 64)


def test_every_shape_and_number_of_tokens_is_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads, out = torch.get_num_threads(), tmp_path / "kernel.json"
    flags = ["--shapes", "32x64", "64x32", "--tokens", "1", "2", "--group", "32", "--repeats", "2"]
    assert int4_kernel.main([*flags, "--threads", str(threads), "--out", str(out)]) == 0
    rows = json.loads(out.read_text(encoding="utf-8"))["products"]
    assert [(row["shape"], row["tokens"]) for row in rows] == [(s, t) for t in (1, 2) for s in ("32x64", "64x32")]
    assert all(row["over_bfloat16"]["bfloat16"] == 1 for row in rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| outputs x inputs | tokens | float32, µs |")
    assert lines[2].startswith("| 32x64 | 1 | ")
