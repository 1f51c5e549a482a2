"""The picture of size and perplexity shows what the results say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.front import main, points
from llmprune.errors import InputError


def cell(sparsity: str, size: int, value: float, **settings: str) -> dict[str, Any]:
    result = {"size": {"dense": 9 * 2**20, "pruned": size * 2**20}, "texts": {"a.txt": {"value": value}}}
    return {"settings": {"sparsity": sparsity, **settings}, **result}


def written(path: Path, text: str, *cells: dict[str, Any]) -> Path:
    rows = [{"dense": {text: {"value": 20.0}}}, *cells]
    path.write_text("".join(json.dumps({"command": "x", "commit": "0" * 12, **row}) + "\n" for row in rows))
    return path


def test_a_line_joins_cells_that_differ_in_their_bits() -> None:
    rows = [cell("2:4", 8, 30.0), cell("2:4", 4, 31.0, quantize="int4"), cell("none", 5, 22.0, quantize="int4")]
    found = points([(row["settings"], row) for row in rows], "a.txt")
    assert found == {"2:4": [(4, 31.0, "int4"), (8, 30.0, "bfloat16")], "none": [(5, 22.0, "int4")]}


def test_a_line_joins_how_much_of_a_kind_is_removed() -> None:
    rows = [cell("blocks:6", 8, 30.0), cell("blocks:3", 9, 25.0), cell("channels:25%", 8, 29.0, effort="best")]
    for number, row in enumerate(rows):
        row["speed"] = {"llama.cpp": {"decode": {"median": 1.5 - number / 10}}}
    cells = [(row["settings"], row) for row in rows]
    found = points(cells, "a.txt", "decode", "llama.cpp")
    assert found == {"blocks": [(1.4, 25.0, "3"), (1.5, 30.0, "6")], "channels, best": [(1.3, 29.0, "25%")]}
    assert points(cells, "a.txt")["blocks"] == [(8, 30.0, "6"), (9, 25.0, "3")]
    rows[0]["sparsity"] = {"pattern": "blocks:6"}
    with pytest.raises(InputError, match="no speed in transformers"):
        points(cells, "a.txt", "prefill")


def test_results_on_other_texts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = written(tmp_path / "one.jsonl", "a.txt", cell("2:4", 8, 30.0))
    other = written(tmp_path / "other.jsonl", "b.txt", cell("2:4", 8, 30.0))
    assert main([str(one), str(other), "--out", str(tmp_path / "x.png")]) == 2
    assert "1 cells on b.txt" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
