"""What the pages say is what was measured, and what can be run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from helpers import ROOT

import llmprune
from eval import sweep, tables
from llmprune.cli.flags import build_parser, pack_parser, report_parser, unpack_parser, verify_parser
from llmprune.pruning.methods import METHODS
from llmprune.pruning.recipe import EFFORTS

PAGES = sorted(ROOT.glob("docs/*.md"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda path: path.name)
def test_tables_are_made_from_the_recorded_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<!-- results: " in text
    assert tables.rewrite(text) == text


def test_the_first_commands_of_the_readme_do_everything() -> None:
    main, tests = re.findall(r"^pip install .*$", README, re.MULTILINE)[:2]
    assert main.startswith("pip install -c constraints.txt -e . && python -m llmprune --model demo --sparsity 2:4")
    assert tests == 'pip install -c constraints.txt -e ".[test]" && pytest'
    build_parser().parse_args(shlex.split(main.partition("llmprune ")[2]))


def test_every_command_of_the_readme_parses() -> None:
    commands = re.findall(r"^llmprune (--[^#\n]*)", README, re.MULTILINE)
    assert len(commands) > 3
    for command in commands:
        build_parser().parse_args(shlex.split(command))


def test_every_command_on_folders_parses() -> None:
    parsers = {"verify": verify_parser, "pack": pack_parser, "unpack": unpack_parser, "report": report_parser}
    text = "\n".join(page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *PAGES])
    found = re.findall(rf"^(?:`)?llmprune ({'|'.join(parsers)}) ([^#`\n]*)", text, re.MULTILINE)
    assert {command for command, _ in found} == parsers.keys()
    for command, arguments in found:
        parsers[command]().parse_args(shlex.split(arguments))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_code_on_the_pages_compiles(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(code, page.name, "exec")
    for line in re.findall(r"^from llmprune import (.*)$", text, re.MULTILINE):
        assert all(hasattr(llmprune, name) for name in line.split(", "))


def test_pictures_and_pages_of_the_readme_exist() -> None:
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    assert links
    assert all((ROOT / link).exists() for link in links)


def test_the_readme_names_every_method() -> None:
    assert all(f"| `{name}`" in README for name in METHODS)


@pytest.mark.parametrize("effort", EFFORTS)
def test_the_readme_tells_what_an_effort_stands_for(effort: str) -> None:
    recipe = EFFORTS[effort]
    permute = "yes" if recipe.permute else "no"
    stages = f"{recipe.targets} | {permute} | {recipe.ridge:g} | {recipe.self_calibration:g} | {recipe.reconstruct}"
    assert f"| `{effort}` | `{recipe.method}` | {stages} |" in README


def test_cells_may_be_named_one_by_one() -> None:
    cells = [{"method": "wanda", "sparsity": "2:4"}, {"method": "obs", "sparsity": "heads:33%"}]
    assert sweep.cells({"cells": cells, "fixed": {"model": "demo"}}) == cells


def test_a_grid_gives_every_combination() -> None:
    grid = {"grid": {"method": ["wanda", "sparsegpt"], "sparsity": ["2:4", "50%"]}}
    assert [tuple(settings.values()) for settings in sweep.cells(grid)] == [
        *(("wanda", "2:4"), ("wanda", "50%"), ("sparsegpt", "2:4"), ("sparsegpt", "50%")),
    ]
    assert sweep.flags({"model": "demo", "skip": ["a", "b"], "no_eval": True, "refit": False}) == [
        *("--model", "demo", "--skip", "a", "--skip", "b", "--no-eval", "--no-refit"),
    ]
