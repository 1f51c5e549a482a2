"""Recorded results say which commit gave them, and neither they nor the pages show a path of a machine."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from eval import families, record, sweep

FILES = sorted(record.RESULTS.glob("*.json*"))
PAGES = sorted(page for folder in (".", "docs/**", "eval") for page in ROOT.glob(f"{folder}/*.md"))
MACHINE = re.compile(r"(?<![\w.-])(?:/(?:root|home|work|tmp|Users)/|[A-Za-z]:\\)")
UNCOMMITTED = re.compile(r"dirty|\+changes")


def rows(path: Path) -> list[dict[str, Any]]:
    return record.rows(path) if path.suffix == ".jsonl" else [json.loads(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path", [*FILES, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_neither_a_machine_nor_uncommitted_code_is_named(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for pattern in (MACHINE, UNCOMMITTED):
        assert [line[:200] for line in text.splitlines() if pattern.search(line)] == []


@pytest.mark.parametrize("text", ["--out /root/w/a", "'/home/me/x'", "=/tmp/x", r"C:\\a", "(/Users/me/x)"])
def test_paths_of_machines_are_recognised(text: str) -> None:
    assert MACHINE.search(text)
    assert not MACHINE.search(str(record.portable(text)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_result_names_its_command_and_a_commit(path: Path) -> None:
    found = [row for row in rows(path) if "dense" not in row or "settings" in row or path.suffix == ".json"]
    assert found
    for row in found:
        assert re.fullmatch(r"[0-9a-f]{7,40}", row["commit"])
        assert row["command"].startswith(("llmprune ", "python -m eval."))


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.suffix == ".jsonl" and path != families.OUT], ids=lambda path: path.name
)
def test_every_row_is_a_cell_of_the_grid_of_that_name_once(path: Path) -> None:
    grid = tomllib.loads((ROOT / "eval" / "grids" / f"{path.stem}.toml").read_text(encoding="utf-8"))
    found, dense = sweep.read(path)
    named = sweep.cells(grid)
    assert all(settings in named for settings, _ in found)
    assert len({json.dumps(settings) for settings, _ in found}) == len(found)
    assert bool(dense) == ("also" in grid)
    assert sum("dense" in row and "settings" not in row for row in record.rows(path)) == ("also" in grid)
