"""Removals of several sizes are timed, each in a process of its own; what stands in the file is not done again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval import structured_scale


def test_sizes_are_measured_once_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scale.json"
    flags = ["--outputs", "16", "--methods", "lasso", "--out", str(out)]
    assert structured_scale.main(["--inputs", "64", *flags]) == 0
    first = json.loads(out.read_text(encoding="utf-8"))["cells"]
    assert structured_scale.main(["--inputs", "64", "128", *flags, "--json"]) == 0
    cells = json.loads(out.read_text(encoding="utf-8"))["cells"]
    assert cells[0] == first[0]
    assert [cell["inputs"] for cell in cells] == [64, 128]
    assert all(cell["seconds"] > 0 and cell["memory"] >= 0 and 0 < cell["unfitted"] < 1 for cell in cells)
    text = structured_scale.table({"cells": [{**cells[0], "seconds": 1.0}, {**cells[1], "seconds": 8.0}]})
    assert "inputs^3.0" in text
    assert "| lasso | 16 x 128 |" in text
    assert "16 x 64" in capsys.readouterr().out


def test_an_unknown_method_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert structured_scale.main(["--methods", "tails"]) == 2
    assert "hint: choose from" in capsys.readouterr().err
